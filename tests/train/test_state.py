"""Checkpoints: what was saved or an earlier one, and never something else."""

import errno
import os
import random
import threading

import pytest
import torch
from torch.optim import SGD, AdamW

from srppo.errors import RunDirError
from srppo.train.state import Checkpoints, load_optimizer, load_tensors, optimizer_state

TREE = {
    "weights": [torch.arange(6.0).view(2, 3), torch.tensor(2.5)],
    "optimizer": {"kind": "AdamW", "state": {0: {"step": torch.tensor(3.0), "none": None}}},
    "best": 0.1 + 0.2,
    "random": {"cpu": torch.get_rng_state()},
}


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n')
    return path


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    """Opens the stage's checkpoints."""
    return lambda keep=2: Checkpoints(tmp_path, "ppo", keep, said.append)


def test_what_was_saved_is_read(checkpoints, log):
    checkpoints().save(7, TREE, log, {"more.json": "{}"})
    found = checkpoints().newest
    assert (found.step, found.metrics) == (7, '{"step": 1}\n')
    read = found.read()
    for ours, theirs in zip(TREE["weights"], read["weights"], strict=True):
        assert torch.equal(ours, theirs)
    assert read["optimizer"]["state"]["0"]["none"] is None
    assert read["best"] == TREE["best"]
    assert torch.equal(read["random"]["cpu"], TREE["random"]["cpu"])
    assert (found.path / "more.json").read_text() == "{}"


def test_nothing_in_it_is_pickled(checkpoints, log):
    checkpoints().save(1, TREE, log)
    names = {p.name for p in checkpoints().newest.path.iterdir()}
    assert names == {"tensors.safetensors", "state.json", "metrics.jsonl", "manifest.json"}


def test_the_newest_so_many_stay(checkpoints, log, tmp_path):
    for step in (1, 2, 9, 10, 1_000_000):
        checkpoints(keep=3).save(step, TREE, log)
    names = {p.name for p in (tmp_path / "checkpoints/ppo").iterdir()}
    assert names == {"step-000009", "step-000010", "step-1000000"}
    assert checkpoints().newest.step == 1_000_000


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_one_is_named_and_the_one_before_is_used(checkpoints, log, said, seed):
    """A bit flipped or an end cut off anywhere in it."""
    for step in (1, 2):
        checkpoints().save(step, TREE, log)
    rng = random.Random(seed)
    path = checkpoints().newest.path
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    if seed % 2:
        content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    else:
        file.write_bytes(content[:place])
    assert checkpoints().newest.step == 1
    (line,) = said
    assert str(path) in line
    assert "damaged" in line


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json", "state.json"])
def test_a_missing_file_is_damage_and_so_is_one_too_many(checkpoints, log, said, name):
    checkpoints().save(1, TREE, log)
    path = checkpoints().newest.path
    content = (path / name).read_bytes()
    (path / name).unlink()
    assert checkpoints().newest is None
    (path / name).write_bytes(content)
    assert checkpoints().newest.step == 1
    (path / "stranger").write_text("")
    assert checkpoints().newest is None
    assert [name in said[0], "stranger" in said[1]] == [True, True]


def test_damaged_ones_do_not_crowd_out_good_ones(checkpoints, log):
    """Going on from step 1, with 2 and 3 damaged: what is saved next is kept."""
    for step in (1, 2, 3):
        checkpoints(keep=3).save(step, TREE, log)
    for step in (2, 3):
        (checkpoints().folder / f"step-{step:06d}" / "state.json").write_text("{}")
    opened = checkpoints(keep=2)
    assert opened.newest.step == 1
    opened.save(2, TREE, log)
    assert checkpoints().newest.step == 2
    assert sorted(p.name for p in opened.folder.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "pathlib.Path.write_text"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_what_the_file_system_refuses_leaves_the_one_before(
    checkpoints, log, monkeypatch, broken, code
):
    checkpoints().save(1, TREE, log)

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(broken, refuse)
        with pytest.raises(RunDirError, match=r"step-000002.*then run the same command again"):
            checkpoints().save(2, TREE, log)
    assert checkpoints().newest.step == 1
    assert [p.name for p in checkpoints().folder.iterdir()] == ["step-000001"]
    checkpoints().save(2, TREE, log)
    assert checkpoints().newest.step == 2


def test_what_a_crash_left_behind_is_no_checkpoint(checkpoints, log):
    checkpoints().save(1, TREE, log)
    aside = checkpoints().folder / "step-000002.part"
    aside.mkdir()
    (aside / "stale").write_text("")
    assert checkpoints().newest.step == 1
    checkpoints().save(2, TREE, log)
    assert checkpoints().newest.step == 2
    assert not aside.exists()


# --- while training goes on -----------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits until this is set."""
    go_on, real = threading.Event(), os.replace

    def replace(*args):
        assert go_on.wait(60)
        real(*args)

    monkeypatch.setattr("os.replace", replace)
    yield go_on
    go_on.set()


def files_of(checkpoint):
    return {p.name: p.read_bytes() for p in checkpoint.path.iterdir()}


def test_what_is_written_meanwhile_is_what_was_there_then(checkpoints, log, slow_disk, tmp_path):
    weight = torch.zeros(3)
    kept = checkpoints()
    kept.save(1, {"weight": weight}, log, overlap=True)
    assert kept.is_writing
    assert checkpoints().newest is None
    weight += 1
    log.write_text("of a later step")
    slow_disk.set()
    kept.wait()
    assert not kept.is_writing
    found = files_of(checkpoints().newest)
    assert kept.written == 1

    log.write_text('{"step": 1}\n')
    other = Checkpoints(tmp_path, "other", 2, print)
    other.save(1, {"weight": torch.zeros(3)}, log)
    assert found == files_of(Checkpoints(tmp_path, "other", 2, print).newest)


def test_one_at_a_time(checkpoints, log, slow_disk):
    kept = checkpoints()
    kept.save(1, TREE, log, overlap=True)
    threading.Timer(0.05, slow_disk.set).start()
    kept.save(2, TREE, log, overlap=True)
    assert kept.written >= 1
    kept.save(3, TREE, log)
    assert (kept.written, kept.is_writing) == (3, False)
    assert sorted(p.name for p in kept.folder.iterdir()) == ["step-000002", "step-000003"]


def look_until_it_is_done(kept, log):
    while kept.is_writing:
        pass


@pytest.mark.parametrize(
    "notice",
    [
        look_until_it_is_done,
        lambda kept, log: kept.wait(),
        lambda kept, log: kept.save(3, TREE, log),
    ],
)
def test_what_the_file_system_refuses_meanwhile_is_told_at_the_next_occasion(
    checkpoints, log, monkeypatch, notice
):
    kept = checkpoints()
    kept.save(1, TREE, log)
    refused = threading.Event()

    def refuse(*args):
        refused.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        kept.save(2, TREE, log, overlap=True)
        assert refused.wait(60)
    with pytest.raises(RunDirError, match=r"step-000002.*No space left"):
        notice(kept, log)
    assert kept.written == 1
    assert [p.name for p in kept.folder.iterdir()] == ["step-000001"]
    kept.save(3, TREE, log)
    assert checkpoints().newest.step == 3


def test_without_a_gpu_nobody_asked_for_a_copy(checkpoints, log):
    before = set(threading.enumerate())  # of other tests; they may end meanwhile
    kept = checkpoints()
    kept.save(1, TREE, log, overlap=None)
    assert kept.written == 1
    assert set(threading.enumerate()) <= before


# --- optimizers -----------------------------------------------------------------------------------


def trained(kind, steps, weights=None, state=None, **settings):
    """A weight after so many steps on a fixed sequence of gradients."""
    torch.manual_seed(0)
    gradients = torch.randn(6, 4)
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = kind([weight], lr=0.1, **settings)
    begin = 0
    if state:
        load_tensors([weight], weights)
        load_optimizer(optimizer, state)
        begin = 3
    for gradient in gradients[begin : begin + steps]:
        weight.grad = gradient
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize(("kind", "settings"), [(AdamW, {}), (SGD, {"momentum": 0.9})])
def test_an_optimizer_goes_on_to_the_bit(checkpoints, log, kind, settings):
    whole, _ = trained(kind, 6, **settings)
    half, optimizer = trained(kind, 3, **settings)
    checkpoints().save(3, {"w": [half], "o": optimizer_state(optimizer)}, log)
    read = checkpoints().newest.read()
    on, _ = trained(kind, 3, read["w"], read["o"], **settings)
    assert torch.equal(on, whole)
    assert not torch.equal(trained(kind, 3, read["w"], None, **settings)[0], whole)


def test_another_optimizer_or_other_weights_are_refused():
    _, optimizer = trained(SGD, 3, momentum=0.9)
    weight = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(RunDirError, match=r"SGD, AdamW is wanted.*--fresh"):
        load_optimizer(AdamW([weight]), optimizer_state(optimizer))
    for saved in ([torch.zeros(5)], [torch.zeros(4)] * 2, []):
        with pytest.raises(RunDirError, match="does not fit"):
            load_tensors([weight], saved)
