"""What a plan reckons with: a GPU of the table, or this machine, measured."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace

import torch

from srppo.config import Recipe
from srppo.errors import ConfigError
from srppo.models.load import pick_device
from srppo.models.precision import computing
from srppo.plan.known import GPUS, Device
from srppo.train.pace import matmul_rate


def find_device(recipe: Recipe, gpu: str | None, memory: str | None, nproc: int = 1) -> Device:
    """The GPU that was named, or the recipe's device on this machine, measured; of a CPU the share
    of one of `nproc` processes.

    Raises:
        ConfigError: no such GPU in the table; `memory` is not a size.
    """
    if gpu and gpu not in GPUS:
        raise ConfigError(
            f"--gpu {gpu} is not in srppo's table, so its rates are not known. Name one of "
            f"{', '.join(GPUS)}, or leave it out to measure this machine."
        )
    device = GPUS[gpu] if gpu else _this_machine(pick_device(recipe.model.device))
    device = replace(device, memory=parse_bytes(memory, "--memory")) if memory else device
    if device.gpu:
        return device
    shares = ("memory", "float32", "bfloat16", "bandwidth", "link")
    return replace(device, **{name: getattr(device, name) / nproc for name in shares})


def parse_bytes(text: str, option: str) -> float:
    """`80GB`, `24GiB`, `500 MB`: bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise ConfigError(
            f"{option} {text!r} is not a size above 0: there is nothing to reckon with. Write, for "
            "example, 80GB or 24GiB."
        )
    number, prefix, binary = match.groups()
    return float(number) * (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()))


def _this_machine(place: torch.device) -> Device:
    with computing("float32", place):
        float32 = matmul_rate(place)
    with computing("bfloat16", place):
        bfloat16 = matmul_rate(place)
    if place.type == "cuda":
        name = torch.cuda.get_device_name(place)
        memory = torch.cuda.get_device_properties(place).total_memory
    else:
        name = f"this machine's CPU, {torch.get_num_threads()} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bandwidth = _bandwidth(place)
    known = [gpu.link for key, gpu in GPUS.items() if key in name]
    # On a CPU what is sent is written and read once more.
    link = bandwidth / 2 if place.type == "cpu" else max(known, default=Device.link)
    return Device(
        name, memory, float32, bfloat16, bandwidth, link, measured=True, gpu=place.type != "cpu"
    )


def _bandwidth(place: torch.device) -> float:
    """Bytes per second that memory gives: of a sum over 256 MiB, the best of three."""
    x = torch.ones(1 << 26, device=place)

    def seconds() -> float:
        started = time.monotonic()
        float(x.sum())  # waits for a GPU
        return time.monotonic() - started

    return x.nbytes / min(seconds() for _ in range(3))
