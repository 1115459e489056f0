"""The run directory: one run only, and every part whole or as it was."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import tiny
from runs import grow
from srppo.config import parse_recipe
from srppo.errors import RunDirError
from srppo.models.load import load_model, load_tokenizer
from srppo.train.checkpoint import RunDir, move_aside
from srppo.train.files import read_json, writing


def recipe_of(path, **more):
    return parse_recipe(
        {
            "name": "test",
            "output_dir": str(path),
            "model": {"base": "srppo:miniature"},
            "data": {"demonstrations": "demonstrations.jsonl"},
            **more,
        }
    )


def open_dir(path, inputs=None, provenance=None, allow_change=False, **more):
    made_by = {"command": "srppo test", **(provenance or {})}
    return RunDir.open(recipe_of(path, **more), made_by, inputs, allow_change=allow_change)


@pytest.fixture
def run(tmp_path):
    return open_dir(tmp_path / "run")


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- whose directory it is ------------------------------------------------------------------------


def test_a_new_directory_holds_the_recipe_and_where_the_run_comes_from(tmp_path):
    run = open_dir(tmp_path / "a" / "b", seed=3)
    record = json.loads((run.path / "run.json").read_text())
    assert record["recipe"] == recipe_of(tmp_path / "a" / "b", seed=3).model_dump(mode="json")
    assert record["command"] == "srppo test"
    assert record["stages"] == {}


def test_the_saved_recipe_is_a_recipe(run):
    from srppo.config import load_recipe

    assert load_recipe(run.path / "recipe.yaml") == recipe_of(run.path)


def test_the_seed_is_part_of_the_path(tmp_path):
    assert recipe_of(tmp_path / "run-{seed}", seed=7).run_dir == tmp_path / "run-7"


def test_the_same_recipe_goes_on_with_what_is_done(run):
    run.mark_done("sft", 1.23456, best=1)
    again = open_dir(run.path)
    assert again.is_done("sft")
    assert not again.is_done("ppo")
    assert again.record["stages"]["sft"] == {"status": "done", "seconds": 1.23, "best": 1}


def test_another_recipe_is_refused_and_the_difference_named(run):
    with pytest.raises(RunDirError) as error:
        open_dir(run.path, ppo={"kl_coef": 0.5}, seed=1)
    message = str(error.value)
    assert str(run.path) in message
    assert "ppo.kl_coef was 0.2 and is now 0.5" in message
    assert "seed was 0 and is now 1" in message
    assert "set output_dir" in message
    assert "kl_ref" not in message  # equal settings are not listed


def test_another_recipe_is_allowed_where_that_is_said_and_the_record_remembers_it(run):
    run.mark_done("sft", 1.0)
    again = open_dir(run.path, ppo={"kl_coef": 0.5}, allow_change=True)
    assert again.is_done("sft")
    (change,) = again.record["changes"]
    assert change["changed"] == ["ppo.kl_coef was 0.2 and is now 0.5"]
    assert open_dir(run.path, ppo={"kl_coef": 0.5}).record["changes"] == [change]


def test_how_often_it_is_saved_may_change(run):
    again = open_dir(run.path, checkpoint={"every": 5})
    assert again.record["recipe"]["checkpoint"]["every"] == 5
    assert "changes" not in again.record


def test_other_contents_of_an_input_are_refused_and_named(tmp_path):
    open_dir(tmp_path / "run", {"rows.jsonl": "1", "some/model": "a"})
    with pytest.raises(RunDirError, match=r"some/model holds something else.*--allow-change"):
        open_dir(tmp_path / "run", {"rows.jsonl": "1", "some/model": "b"})
    open_dir(tmp_path / "run", {"rows.jsonl": "1", "some/model": "b"}, allow_change=True)
    open_dir(tmp_path / "run", {"rows.jsonl": "1", "some/model": "b"})


def test_other_code_is_refused_until_the_run_is_finished(tmp_path):
    """A finished run computes nothing any more."""
    old, new = ({"versions": {"torch": v}, "finished": None} for v in ("2.9", "2.10"))
    run = open_dir(tmp_path / "run", provenance=old)
    with pytest.raises(RunDirError, match=r"versions\.torch was '2\.9' and is now '2\.10'"):
        open_dir(run.path, provenance=new)
    run.record["finished"] = "2026-01-01"
    run.save_record()
    open_dir(run.path, provenance=new)


def test_a_fresh_start_keeps_the_old_run_under_another_name(run, tmp_path):
    recipe = recipe_of(run.path)
    assert move_aside(recipe) == tmp_path / "run.old-1"
    assert json.loads((tmp_path / "run.old-1" / "run.json").read_text())["command"] == "srppo test"
    assert move_aside(recipe) is None  # nothing is there now
    open_dir(run.path)
    assert move_aside(recipe) == tmp_path / "run.old-2"


def test_a_run_directory_removed_between_look_and_write_is_not_made_anew(run, monkeypatch):
    real = os.mkdir

    def removed_first(path, *args, **kwargs):
        monkeypatch.setattr(os, "mkdir", real)
        shutil.rmtree(run.path)
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", removed_first)
    with pytest.raises(RunDirError, match="cannot write"):
        run.write_text("evals/template.jinja", "")
    assert not run.path.exists()


def test_a_run_directory_that_was_removed_is_not_made_anew(run):
    """Half a run would look like one."""
    shutil.rmtree(run.path)
    with pytest.raises(RunDirError, match="the run directory was removed"):
        run.write_json("results.json", {})
    with pytest.raises(RunDirError, match="the run directory was removed"):
        run.save_model("policy", tiny.model(), tiny.tokenizer())
    assert not run.path.exists()


def test_foreign_files_are_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirError, match=r"'thesis\.tex' first"):
        open_dir(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"name": "somebody else\'s"}'])
def test_a_run_json_of_somebody_else_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunDirError, match="not written by srppo"):
        open_dir(tmp_path)
    assert (tmp_path / "run.json").read_text() == content


def test_a_broken_run_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": ')
    with pytest.raises(RunDirError, match=r"run\.json.*Delete the run directory"):
        open_dir(tmp_path)


def test_an_empty_directory_is_as_good_as_none(tmp_path):
    assert open_dir(tmp_path).path == tmp_path


# --- directories that cannot be written -----------------------------------------------------------


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_path_at_or_below_a_file_cannot_be_written(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError) as error:
        open_dir(tmp_path / below)
    assert str(tmp_path / below) in str(error.value)
    assert "output_dir" in str(error.value)


def test_a_directory_without_permission(tmp_path, monkeypatch):
    """Tests may run as root, whom no permission stops: the refusal itself is put in place."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(RunDirError, match="Permission denied"):
        open_dir(tmp_path / "run")


# --- a full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["pathlib.Path.write_text", "os.replace"])
def test_a_full_disk_names_path_and_cure_and_leaves_the_file_as_it_was(run, monkeypatch, broken):
    run.write_json("results.json", {"rows": [1]})
    with monkeypatch.context() as patch:
        patch.setattr(broken, no_space)
        with pytest.raises(RunDirError) as error:
            run.write_json("results.json", {"rows": [2]})
    assert str(run.path / "results.json") in str(error.value)
    assert "No space left on device" in str(error.value)
    assert "Free space" in str(error.value)
    assert run.read_json("results.json") == {"rows": [1]}
    run.write_json("results.json", {"rows": [3]})  # space was freed
    assert run.read_json("results.json") == {"rows": [3]}


@pytest.mark.parametrize("broken", ["pathlib.Path.write_text", "os.replace"])
def test_after_the_cure_the_same_command_works(tmp_path, monkeypatch, broken):
    """The message says: run the same command again."""
    with monkeypatch.context() as patch:
        patch.setattr(broken, no_space)
        with pytest.raises(RunDirError):
            open_dir(tmp_path / "run")
    assert open_dir(tmp_path / "run").record["stages"] == {}


def test_a_recipe_that_could_not_be_written_is_written_the_next_time(run):
    (run.path / "recipe.yaml").unlink()
    open_dir(run.path)
    assert (run.path / "recipe.yaml").is_file()


def test_a_model_is_whole_or_as_it_was(run, monkeypatch):
    first, second = tiny.model(seed=0), tiny.model(seed=1)
    run.save_model("policy", first, tiny.tokenizer())
    for broken in ("save_pretrained", "tokenizer"):
        with monkeypatch.context() as patch:
            target = type(second) if broken == "save_pretrained" else type(tiny.tokenizer())
            patch.setattr(target, "save_pretrained", no_space)
            with pytest.raises(RunDirError, match="policy"):
                run.save_model("policy", second, tiny.tokenizer())
        saved = load_file(run.path / "policy" / "model.safetensors")
        assert torch.equal(saved["model.norm.weight"], first.state_dict()["model.norm.weight"])
        assert load_model(str(run.path / "policy"))
    run.save_model("policy", second, tiny.tokenizer())
    saved = load_file(run.path / "policy" / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], second.state_dict()["lm_head.weight"])


def test_a_small_disk_holds_the_record_but_not_the_model(small_disk):
    """No simulation: the kernel says that there is no space, here to safetensors."""
    run = open_dir(small_disk / "run")
    model, tokenizer = load_model("srppo:miniature"), load_tokenizer("srppo:miniature")
    with pytest.raises(RunDirError) as error:
        run.save_model("sft", model, tokenizer)
    assert str(run.path / "sft") in str(error.value)
    assert "o space left on device" in str(error.value)
    assert not (run.path / "sft").exists()
    assert not open_dir(run.path).is_done("sft")
    grow(small_disk)
    run.save_model("sft", model, tokenizer)
    assert load_model(str(run.path / "sft"))


def test_files_on_a_full_disk_stay_as_they_were(small_disk):
    run = open_dir(small_disk / "run")
    run.write_json("data.json", {"rows": 1})
    with pytest.raises(RunDirError, match=r"data\.json"):
        run.write_text("data.json", "x" * 2**20)
    assert run.read_json("data.json") == {"rows": 1}


# --- the parts ------------------------------------------------------------------------------------


def test_a_saved_model_loads_with_its_tokenizer(run):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    path = run.save_model("controls/longer", model, tokenizer)
    assert path == run.path / "controls" / "longer"
    assert load_tokenizer(str(path)).get_vocab() == tokenizer.get_vocab()
    ids = torch.tensor([[3, 4]])
    assert torch.equal(load_model(str(path))(ids).logits, model(ids).logits)
    assert not list(run.path.rglob("*.part"))


def test_json_lines_keep_any_text(run):
    rows = [{"text": "über\n<eos>\u2028"}, {"text": ""}]
    run.write_jsonl("samples.jsonl", rows)
    lines = (run.path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == rows


def test_reading_what_is_missing_or_broken(run):
    with pytest.raises(RunDirError, match=r"audit\.json"):
        run.read_json("audit.json")
    (run.path / "audit.json").write_bytes(b"\xff{")
    with pytest.raises(RunDirError, match=r"audit\.json"):
        read_json(run.path / "audit.json")


def test_only_what_the_file_system_refuses_is_translated(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError
    inner = RunDirError("already said")
    with pytest.raises(RunDirError) as error, writing(tmp_path):
        raise inner
    assert error.value is inner


def test_the_error_remembers_its_cause(tmp_path):
    with pytest.raises(RunDirError) as error, writing(tmp_path):
        no_space()
    assert isinstance(error.value.__cause__, OSError)
