"""Signals end work at once, or wait for what must not be cut short; a second one does not."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from srppo import signals
from srppo.signals import Interrupted, hold, listening, release


def interrupted(work):
    """The error with which `work` ends, listening."""
    with pytest.raises(Interrupted) as caught, listening():
        work()
    return caught.value


def send(number=signal.SIGTERM, then_wait=0.0):
    os.kill(os.getpid(), number)
    time.sleep(then_wait)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_work_at_once_and_its_code_is_that_of_shells(number, code):
    error = interrupted(lambda: send(number, then_wait=60))
    assert error.exit_code == code
    assert not isinstance(error, Exception)


def test_while_held_it_waits_for_the_release(capfd):
    reached = []

    def work():
        hold(grace=60)
        send()
        reached.append("held")
        assert signals.came()
        release()
        reached.append("released")

    interrupted(work)
    assert reached == ["held"]
    assert "ending the step" in capfd.readouterr().err


def test_it_waits_no_longer_than_the_grace():
    def work():
        hold(grace=0.05)
        send(then_wait=60)

    interrupted(work)


def test_without_a_signal_nothing_happens():
    with listening():
        hold(grace=0.01)
        time.sleep(0.05)
        release()
        assert not signals.came()


def test_one_that_was_swallowed_on_the_way_is_not_forgotten():
    def work():
        with pytest.raises(Interrupted):
            send(then_wait=60)
        hold(grace=60)

    interrupted(work)


def test_one_that_python_dropped_comes_again(monkeypatch):
    """As it does in destructors."""
    monkeypatch.setattr("srppo.signals.AGAIN", 0.05)

    def work():
        with contextlib.suppress(Interrupted):
            send(then_wait=60)
        time.sleep(60)

    interrupted(work)


def test_one_that_was_caught_does_not(monkeypatch):
    """Saving takes its time."""
    monkeypatch.setattr("srppo.signals.AGAIN", 0.05)

    def work():
        try:
            send(then_wait=60)
        except Interrupted:
            signals.caught()
            time.sleep(0.2)
            raise

    assert not interrupted(work).__context__


def test_two_within_an_instant_are_one():
    def work():
        hold(grace=60)
        send()
        send()
        release()

    interrupted(work)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with listening():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


SECOND = """
import os, signal, time
from srppo import signals
signals.SAME = 0.0
with signals.listening():
    signals.hold(60)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_second_one_ends_the_process():
    done = subprocess.run([sys.executable, "-c", SECOND], check=False, timeout=30)
    assert done.returncode == -signal.SIGTERM
