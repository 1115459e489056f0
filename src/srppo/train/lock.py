"""One run, one owner: the lock of a run directory, which ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from weakref import WeakValueDictionary

from srppo.errors import RunDirError
from srppo.train.files import writing

FILE = "run.lock"


class Lock:
    """Held as long as this object lives."""

    def __init__(self, directory: Path) -> None:
        """Raises RunDirError if another process holds it; the message names that one."""
        path = directory / FILE
        with writing(path):
            self._file = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                self._file.seek(0)
                owner = self._file.read().strip() or "another process"
                raise RunDirError(
                    f"{directory} belongs to {owner}, which is running it: two would overwrite "
                    "each other's files. Wait for it, end it, or set output_dir to a new directory."
                ) from e
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()

    def is_on(self, directory: Path) -> bool:
        """Whether the file that is locked still lies there: directories are moved and removed."""
        try:
            there = os.stat(directory / FILE)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(self._file.fileno()), there)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


_held: WeakValueDictionary[Path, Lock] = WeakValueDictionary()


def own(directory: Path) -> Lock:
    """The lock of a directory. A process that holds it gets the same one again."""
    place = directory.resolve()
    lock = _held.get(place)
    if lock is None or not lock.is_on(place):
        _held[place] = lock = Lock(place)
    return lock
