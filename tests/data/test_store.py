import os
from pathlib import Path

import pytest

from srppo.data.store import OnDisk, Picked
from srppo.errors import DataError


def test_items_on_disk_are_those_of_a_list():
    items = [{"ids": list(range(n)), "text": "é" * n} for n in range(50)]
    stored = OnDisk(items)
    assert len(stored) == 50
    assert list(stored) == items
    assert stored[-1] == items[-1]
    assert list(stored[10:20:3]) == items[10:20:3]
    assert list(stored[10:][5:]) == items[15:]
    with pytest.raises(IndexError):
        stored[50]
    stored.append({"ids": [], "text": "last"})
    assert stored[50]["text"] == "last"
    assert list(Picked(stored, [3, 1, 3])) == [items[3], items[1], items[3]]


def test_processes_share_the_file_after_a_fork():
    stored = OnDisk(range(1000))
    child = os.fork()
    if child == 0:
        os._exit(0 if list(stored) == list(range(1000)) else 1)
    assert list(stored) == list(range(1000))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_full_disk_names_the_cure(small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(DataError, match=r"No space left.*TMPDIR"):
        OnDisk("x" * 10_000 for _ in range(1000))
