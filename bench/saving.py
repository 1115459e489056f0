"""What a checkpoint costs training: written by it, or from a copy while it goes on.

    python bench/saving.py [--parameters 100e6] [--folder DIR]

A model of random weights with AdamW's two moments; training is a product of matrices over and over.
Prints one JSON line; seconds are medians of three.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from srppo.train.state import Checkpoints


def state(parameters: float) -> list[torch.Tensor]:
    """Weights and two moments in matrices of four million numbers."""
    return [torch.randn(2048, 2048) for _ in range(3 * round(parameters / 2048**2))]


def train(seconds: float, x: torch.Tensor) -> float:
    """Products a second."""
    count, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        x = torch.nn.functional.normalize(x @ x)
        count += 1
    return count / (time.monotonic() - started)


def measure(folder: Path, tensors: list[torch.Tensor]) -> dict[str, float]:
    log = folder / "log.jsonl"
    log.write_text("")
    kept = Checkpoints(folder, "ppo", 1, print)
    x = torch.randn(512, 512)
    alone = train(3, x)
    seconds: dict[str, float] = {}
    for name, overlap in (("written", False), ("copied", True)):
        started = time.monotonic()
        kept.save(1, {"tensors": tensors}, log, overlap=overlap)
        seconds[name] = time.monotonic() - started
    beside, began = [], time.monotonic()
    while kept.is_writing:
        beside.append(train(0.2, x))
    seconds["writing beside training"] = time.monotonic() - began
    seconds["training's speed meanwhile"] = statistics.mean(beside) / alone
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--folder", help="on the disk to be measured")
    arguments = parser.parse_args()
    tensors = state(arguments.parameters)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = [measure(Path(folder), tensors) for _ in range(3)]
    medians = {name: round(statistics.median(f[name] for f in found), 2) for name in found[0]}
    gib = sum(x.nbytes for x in tensors) / 2**30
    print(json.dumps({"GiB": round(gib, 2), "threads": torch.get_num_threads(), **medians}))


if __name__ == "__main__":
    main()
