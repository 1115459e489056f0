"""A little of `make soak`, in a process that forks from what it has imported."""

from pathlib import Path

import pytest

from runs import python

PARTS = ("kills", "faults", "damage", "recipes", "data")


@pytest.mark.slow
def test_nothing_is_lost(monkeypatch, request):
    """3% of it; with `--full` a tenth."""
    share = "0.1" if request.config.getoption("--full") else "0.03"
    folder = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    options = ("--share", share, "--processes", "1")
    done = python(str(folder / "soak.py"), *options)
    assert done.code == 0, done.out + done.err
    for part in PARTS:
        assert any(
            line.startswith(f"{part}: ") and line.endswith("losses: 0")
            for line in done.out.splitlines()
        ), done.out
