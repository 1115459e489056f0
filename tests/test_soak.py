"""A little of `make soak`, in a process that forks from what it has imported and nothing else."""

from pathlib import Path

import pytest

from runs import python

SHARES = {"kills": 0.04, "faults": 0.015, "damage": 0.25, "recipes": 0.05, "data": 0.05}


@pytest.mark.slow
@pytest.mark.parametrize("part", SHARES)
def test_nothing_is_lost(part, monkeypatch):
    folder = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    done = python(str(folder / "soak.py"), part, "--share", str(SHARES[part]))
    assert done.code == 0, done.out + done.err
    assert "losses: 0" in done.out
