"""What tests of several rooms share."""

from __future__ import annotations

import os

# Sums depend on how many threads share them, and bytes are compared between processes. One thread
# is faster, too, where the models are tiny or the cores are shared. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="tests marked full, too; the load test for a minute, a tenth of the soak",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="minutes; with --full"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: a run collects garbage after each stage, and would walk
    through all of it, a fifth of what a small run takes."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 512 KiB: smaller than the miniature's weights."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {getattr(e, 'stderr', e)}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
