"""Peak memory of a run's two stages above what the process held before the first model. Linux.

    python tests/plan/peak.py RECIPE [KEY=VALUE]...

Prints bytes of stage 1 and of stage 2. To be run with MALLOC_MMAP_THRESHOLD_=65536: freed tensors
then go back to the system at once, so that what is resident is in use.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import srppo


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = srppo.start(sys.argv[1], *sys.argv[2:])
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()  # what libraries load at first use
    before = resident("VmRSS")
    for stage in (run.sft, run.ppo):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        stage()
        print(resident("VmHWM") - before)
