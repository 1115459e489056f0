"""`srppo` for shell scripts without the seconds of importing: forked from a process that has.

    with warm_srppo(folder):       # folder/srppo takes arguments, directory, streams of its caller

A command is a process of its own, as ever; only what it imports is there already.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CLIENT = """
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
told = "\\0".join([os.getcwd(), *sys.argv[1:]])
socket.send_fds(server, [told.encode()], [0, 1, 2])
sys.exit(int(server.recv(16)))
"""


@contextmanager
def warm_srppo(folder: Path) -> Iterator[None]:
    """Makes the command; it works as long as this lasts. Environments are not handed on."""
    address = str(folder / "socket")
    (folder / "client.py").write_text(CLIENT.format(address=address))
    (folder / "srppo").write_text(f'#!/bin/sh\nexec {sys.executable} -S {folder}/client.py "$@"\n')
    (folder / "srppo").chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        # A new interpreter, for this one may have threads.
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(server,))
        process.start()
        server.close()  # ours: if the process dies, its callers are to fail rather than wait
        try:
            yield
        finally:
            process.terminate()
            process.join()


def serve(server: socket.socket) -> None:
    """One command after the other."""
    import srppo.cli
    import srppo.pipeline
    import srppo.train.sft

    while True:
        caller, _ = server.accept()
        told, streams, *_ = socket.recv_fds(caller, 1 << 16, 3)
        where, *arguments = told.decode().split("\0")
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            with suppress(BrokenPipeError):  # a caller that was killed
                caller.send(str(os.waitstatus_to_exitcode(status) % 256).encode())
            for descriptor in (*streams, caller.detach()):
                os.close(descriptor)
            continue
        for descriptor, stream in zip(range(3), streams, strict=True):
            os.dup2(stream, descriptor)
        os.chdir(where)
        sys.stdin = os.fdopen(0)
        sys.argv = ["srppo", *arguments]
        try:
            srppo.cli.main()
        except SystemExit as e:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(e.code or 0))
