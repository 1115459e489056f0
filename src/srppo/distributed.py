"""Many processes as one run: who this one is, and what all of them tell each other.

Every process does the whole run, but of each list of rows only its share. What it found is added
to what the others found, so that all know the same and decide alike. Alone, nothing here does
anything. `srppo run --nproc` or torchrun start the processes.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous as meet

from srppo.errors import ProcessError, SrppoError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others before it gives up: the first writes models alone."""
WATCH = 0.5
"""Seconds between two looks at whether another process has failed."""
LAST_WORDS = 5.0
"""Seconds for which the process that failed first is waited for: for its message, for its end."""

ENDING = timedelta(minutes=10)
"""How long the launcher waits for processes that were told to end: they finish their step and save,
as checkpoint.grace says."""

GOES_ON = (
    ": killed, perhaps for want of memory, or its machine is gone. The same command goes on from "
    "the last checkpoint, with any number of processes."
)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are to share work with."""
    return dist.get_world_size() if dist.is_initialized() and not _by_itself else 1


def is_joined() -> bool:
    """Whether this is one of the processes of a run, be it the only one."""
    return dist.is_initialized()


def is_first() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def name() -> str:
    """This process, for a message."""
    return f"process {rank()} of {size()} on {socket.gethostname()}"


def add(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, the same bits in each."""
    if size() > 1:
        for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
            assert work is not None
            work.wait()


def of_all(here: Tensor) -> Tensor:
    """(processes, ...) what each has, one after the other."""
    found = here.new_zeros(size(), *here.shape)
    found[rank() if size() > 1 else 0] = here
    add([found])
    return found


def any_of(here: bool) -> bool:
    """Whether it is so in any process."""
    if size() == 1:
        return here
    count = torch.tensor(int(here))
    dist.all_reduce(count)
    return bool(count)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in each of them; the others do not call it, so it
    is a process by itself meanwhile."""
    if size() == 1:
        return make()
    found: list[T | None] = [None]
    if is_first():
        with _alone():
            found = [make()]
    dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]  # type: ignore[return-value]


_by_itself = False


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, work is not shared: the others are waiting."""
    global _by_itself
    _by_itself = True
    try:
        yield
    finally:
        _by_itself = False


def shares(costs: Sequence[float]) -> list[list[int]]:
    """Places in `costs` for each process: the costly ones dealt out first, one to each in turn."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    return [order[k :: size()] for k in range(size())]


# --- beginning and end ----------------------------------------------------------------------------


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of those that torchrun started; without torchrun, alone.

    All but the first are silent on standard output. When one fails, the others end at once, without
    a word: the message is that of the first that failed.

    Raises:
        ProcessError: another process went away without saying why.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    store, number, count = next(meet("env://", timeout=TIMEOUT))
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    # A connection of its own: the other is taken while the main thread waits for a key.
    watch = _Watch(PrefixStore("srppo", store.clone()))
    watch.start()
    speaking = sys.stdout
    try:
        with open(os.devnull, "w") as silence:
            sys.stdout = speaking if is_first() else silence
            yield
        dist.barrier()
    except Exception as e:
        lost = not isinstance(e, SrppoError) and _is_lost_connection(e)
        watch.fail(LAST_WORDS if lost else 0.0, getattr(e, "exit_code", 1))
        if lost:
            reason = str(e).splitlines()[0].split(". ")[0]
            raise ProcessError(f"another process is gone ({reason}){GOES_ON}") from e
        raise
    except BaseException as e:  # an interruption, an exit code
        if not isinstance(e, SystemExit) or e.code:
            watch.fail(0.0, 1)
        raise
    finally:
        sys.stdout = speaking
        watch.done.set()
    dist.destroy_process_group()


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


class _Watch(threading.Thread):
    """Ends this process when another has failed: a collective call would wait for it."""

    def __init__(self, store: Store) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(WATCH):
            try:
                failed = self.store.check(["failed"])
            except RuntimeError as e:
                sys.stderr.write(f"error: {name()} lost the first machine ({e}){GOES_ON}\n")
                sys.stderr.flush()
                os._exit(1)
            if failed:
                self._echo(self.store.get("failed").decode())

    def fail(self, patience: float, code: int) -> None:
        """Tell the others that this process fails, with which exit code; if one did before, end
        here.

        `patience`: seconds to wait for that one's message.
        """
        self.done.wait(patience)  # the thread ends the process meanwhile, should one arrive
        self.done.set()
        try:
            first = self.store.compare_set("failed", "", f"{rank()} {code}").decode()
        except RuntimeError:
            return  # nobody to tell
        if first.split()[0] != str(rank()):
            self._echo(first)

    def _echo(self, first: str) -> None:
        """End without a word after the one that failed first, with its exit code."""
        time.sleep(LAST_WORDS)
        os._exit(int(first.split()[1]))


def launch(nproc: int, arguments: list[str], nodes: int = 1, rendezvous: str | None = None) -> int:
    """`srppo ARGUMENTS` in so many processes on each of the machines; the exit code.

    Args:
        rendezvous: host:port of the first machine, the same on all; None: there is one machine.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ours say it
    options = ["--nproc-per-node", str(nproc), "--nnodes", str(nodes), "--max-restarts", "0"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous or "localhost:0"]
    options += ["--shutdown-timeout", str(round(ENDING.total_seconds()))]
    parsed = run.get_args_parser().parse_args([*options, "-m", "srppo", *arguments])
    try:
        run.run(parsed)
    except ChildFailedError as e:
        failures = e.failures.values()
        for number, failure in e.failures.items():
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                kind = signal.Signals(-failure.exitcode).name
                sys.stderr.write(f"error: process {number} was ended by {kind}{GOES_ON}\n")
        return max(1, *(failure.exitcode for failure in failures))
    except SignalException as e:
        return 128 + e.sigval
    except (RendezvousError, dist.DistError) as e:
        raise ProcessError(
            f"the launcher on {socket.gethostname()} lost the machine where all meet, {rendezvous} "
            f"({str(e).splitlines()[0]}): this one's processes are ended. The same command goes on "
            "from the last checkpoint, with any number of processes."
        ) from e
    return 0
