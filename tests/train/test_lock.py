"""One process a run directory; the lock ends with the process, however that ends."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from srppo.errors import RunDirError
from srppo.train.lock import own

HOLD = """
import sys, time
from pathlib import Path
from srppo.train.lock import own
lock = own(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_named_and_its_death_releases_the_lock(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        name = f"process {other.pid} on {os.uname().nodename}"
        with pytest.raises(RunDirError, match=rf"{name}, which is running it.*output_dir"):
            own(tmp_path)
        other.send_signal(signal.SIGKILL)
    assert own(tmp_path)


def test_a_process_does_not_lock_itself_out(tmp_path):
    assert own(tmp_path) is own(tmp_path / ".")


def test_a_directory_that_was_moved_or_removed_leaves_its_name_free(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    first = own(place)
    shutil.move(place, tmp_path / "old")
    place.mkdir()
    second = own(place)
    assert second is not first
    shutil.rmtree(place)
    place.mkdir()
    assert own(place) is not second
