"""Whole runs: what they leave behind, that they repeat to the byte, and that they go on."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import srppo
import tiny
from runs import grow, json_lines, python, srppo_command, timeless, write_recipe
from srppo.config import load_recipe
from srppo.data.describe import describe_overlap
from srppo.errors import ConfigError, DataError, RunDirError
from srppo.pipeline import Run
from srppo.progress import Reporter
from srppo.report.summary import summarise

CONTROLS = {
    "sft-again": {"sft": {}},
    "ppo-again": {"ppo": {}},
    "longer": {"sft": {"epochs": 2}},
    "rloo": {"ppo": {"estimator": "rloo", "responses_per_prompt": 2}},
    "lambda-1": {"extrapolate": 1.0},
}
MODELS = ["base", "sft", "policy", *CONTROLS]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with every part, by `python -m srppo run` in a process of its own."""
    folder = tmp_path_factory.mktemp("finished")
    done = python("-m", "srppo", "run", str(write_recipe(folder, controls=CONTROLS)))
    assert done.code == 0, done.err
    return folder / "run", done


def weights(path):
    return (path / "model.safetensors").read_bytes()


def start(folder, *overrides, **sections):
    recipe = load_recipe(write_recipe(folder, **sections), list(overrides))
    return Run(recipe, Reporter(quiet=True))


# --- what a run leaves behind ---------------------------------------------------------------------


def test_a_run_ends_with_its_table_and_says_where_things_are(finished):
    path, done = finished
    for model in MODELS:
        assert re.search(rf"^\s*{re.escape(model)}\s+T=1\s+\d\.\d\d/\d\.\d\d", done.out, re.M)
    assert f"Model:  {path}/policy" in done.out
    assert f"Report: {path}/report.html" in done.out
    assert "Traceback" not in done.err
    assert "stage 1 trains on 16 demonstrations, 8 are held out; stage 2 has 16 prompts" in done.err


def test_the_run_directory_is_complete_and_holds_nothing_half_written(finished):
    path, _ = finished
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    expected = {
        "run.json",
        "recipe.yaml",
        "data.json",
        "data.txt",
        "audit.json",
        "results.json",
        "samples.jsonl",
        "report.html",
        "metrics/sft.jsonl",
        "metrics/ppo.jsonl",
        "metrics/controls/rloo.jsonl",
        "sft/model.safetensors",
        "sft/chat_template.jinja",
        "policy/model.safetensors",
        "policy/tokenizer.json",
        "controls/longer/model.safetensors",
    }
    assert expected <= names
    assert not [name for name in names if ".part" in name]
    assert not (path / "controls" / "lambda-1").exists()  # nothing was trained for it


def test_the_record_says_what_ran_on_what(finished):
    path, _ = finished
    record = json.loads((path / "run.json").read_text())
    stages = [
        "sft",
        "audit",
        "ppo",
        *(f"controls/{n}" for n in CONTROLS if n != "lambda-1"),
        "eval",
    ]
    assert list(record["stages"]) == stages
    assert {stage["status"] for stage in record["stages"].values()} == {"done"}
    assert record["seed"] == 3
    assert record["command"].startswith("srppo run ")
    assert record["srppo_version"] == srppo.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", record["commit"])
    assert record["started"] <= record["finished"]
    assert record["hardware"]["threads"] == 1


def test_the_policy_is_a_hugging_face_model_that_talks(finished):
    """Without srppo: load, fill the template in, generate, decode."""
    path, _ = finished
    model = AutoModelForCausalLM.from_pretrained(path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(path / "policy")
    turn = [{"role": "user", "content": "reverse : a b c"}]
    inputs = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    response = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :])
    assert response.strip()
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_the_policy_moved_and_in_number_format_and_shape_it_is_the_base(finished):
    path, _ = finished
    sft, policy = (load_file(path / name / "model.safetensors") for name in ("sft", "policy"))
    assert sft.keys() == policy.keys()
    assert {(n, w.shape, w.dtype) for n, w in sft.items()} == {
        (n, w.shape, w.dtype) for n, w in policy.items()
    }
    assert any(not torch.equal(w, policy[name]) for name, w in sft.items())


def test_every_model_is_measured_at_every_temperature_in_every_group(finished):
    path, _ = finished
    results = json.loads((path / "results.json").read_text())
    found = [(row["model"], row["decoding"], row["group"]) for row in results["rows"]]
    groups = ["in_domain", "ood_prompts", "ood_unseen"]
    assert found == [(m, d, g) for m in MODELS for d in ("greedy", "T=1") for g in groups]
    assert results["primary"] == "accuracy"
    assert sum(row["n"] for row in results["rows"][:3]) == 24
    # Extrapolation has no weights of its own, so no NLL by a plain forward.
    assert set(results["held_out_nll"]) == set(MODELS) - {"lambda-1"}


def test_controls_that_change_nothing_are_what_they_are_compared_with(finished):
    """The same settings and seed give the same weights; lambda = 1 is sampling from sft."""
    path, _ = finished
    assert weights(path / "controls/sft-again") == weights(path / "sft")
    assert weights(path / "controls/ppo-again") == weights(path / "policy")
    assert weights(path / "controls/longer") != weights(path / "sft")
    assert weights(path / "controls/rloo") != weights(path / "policy")
    rows = json.loads((path / "results.json").read_text())["rows"]
    measured = {
        name: [{k: v for k, v in r.items() if k != "model"} for r in rows if r["model"] == name]
        for name in MODELS
    }
    assert measured["sft-again"] == measured["sft"]
    assert measured["ppo-again"] == measured["policy"]
    assert measured["lambda-1"] == measured["sft"]
    assert measured["rloo"] != measured["policy"]


def test_the_parts_agree_where_they_measure_the_same(finished):
    path, _ = finished
    audit = json.loads((path / "audit.json").read_text())
    nll = json.loads((path / "results.json").read_text())["held_out_nll"]
    assert audit["curve"]["nll_base"] == pytest.approx(nll["base"], rel=1e-5)
    assert audit["curve"]["nll_sft"] == pytest.approx(nll["sft"], rel=1e-5)
    assert audit["prompts"] == 8
    data = json.loads((path / "data.json").read_text())
    assert data["demonstrations"]["used"] == 24
    assert data["overlap"]["of"] == 16


def test_the_curve_is_measured_on_the_validation_split_at_the_steps_asked_for(finished):
    path, _ = finished
    lines = json_lines(path / "metrics/ppo.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all("eval/accuracy/in_domain" in line for line in lines)
    assert not [
        k for line in json_lines(path / "metrics/controls/rloo.jsonl") for k in line if "eval/" in k
    ]
    data = json.loads((path / "data.json").read_text())
    assert data["curve"]["used"] == 6


def test_samples_stand_side_by_side_for_the_runs_own_models(finished):
    path, _ = finished
    samples = json_lines(path / "samples.jsonl")
    assert len(samples) == 3
    assert [s["group"] for s in samples] == ["in_domain", "ood_prompts", "ood_unseen"]
    for sample in samples:
        assert list(sample["responses"]) == ["base", "sft", "policy"]


# --- repeating and going on -----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_in_another_process_and_directory(finished, tmp_path):
    path, _ = finished
    done = srppo_command("run", write_recipe(tmp_path, controls=CONTROLS))
    assert done.code == 0, done.err
    again = tmp_path / "run"
    for model in ("sft", "policy", "controls/longer", "controls/rloo"):
        assert weights(again / model) == weights(path / model)
    for name in ("data.json", "data.txt", "audit.json", "results.json", "samples.jsonl"):
        assert (again / name).read_bytes() == (path / name).read_bytes()
    metrics = sorted(p.relative_to(path) for p in (path / "metrics").rglob("*.jsonl"))
    assert len(metrics) == 6
    for name in metrics:
        assert timeless(again / name) == timeless(path / name)


def test_another_seed_gives_another_model(finished, tmp_path):
    path, _ = finished
    run = start(tmp_path, "seed=4")
    run.sft()
    assert weights(tmp_path / "run" / "sft") != weights(path / "sft")


def test_a_finished_run_is_not_run_again(finished):
    path, _ = finished
    before = {
        p: (p.stat().st_mtime_ns, p.read_bytes())
        for name in ("sft", "policy", "controls", "metrics", "results.json", "samples.jsonl")
        for p in ([path / name] if (path / name).is_file() else (path / name).rglob("*.*"))
        if p.is_file() and p.name != "README.md"  # a card, written anew as the report is
    }
    assert len(before) > 20
    done = srppo_command("run", path.parent / "recipe.yaml")
    assert done.code == 0
    assert " step " not in done.err
    assert "policy" in done.out
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before


def test_stage_by_stage_is_the_same_run(finished, tmp_path):
    """sft, audit, ppo, run: each goes on where the one before stopped."""
    path, _ = finished
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"

    def stages():
        return list(json.loads((run / "run.json").read_text())["stages"])

    done = srppo_command("sft", recipe)
    assert (done.code, done.out) == (0, f"Model: {run}/sft\n")
    assert stages() == ["sft"]
    trained = (run / "sft/model.safetensors").stat().st_mtime_ns
    assert not (run / "audit.json").exists()

    done = srppo_command("audit", recipe)
    warnings = json.loads((run / "audit.json").read_text())["warnings"]
    assert done.code == 0
    assert done.out.count("WARNING") == len(warnings)
    assert f"{len(warnings)} warning(s). Report: {run}/report.html" in done.out
    assert stages() == ["sft", "audit"]

    done = srppo_command("ppo", recipe)
    assert done.code == 0
    assert f"Model:  {run}/policy" in done.out
    assert stages() == ["sft", "audit", "ppo"]

    assert srppo_command("run", recipe).code == 0
    assert stages() == ["sft", "audit", "ppo", "eval"]
    assert (run / "sft/model.safetensors").stat().st_mtime_ns == trained
    assert weights(run / "policy") == weights(path / "policy")
    assert timeless(run / "metrics/ppo.jsonl") == timeless(path / "metrics/ppo.jsonl")


def test_a_run_that_was_interrupted_goes_on_with_the_stage_it_was_in(
    finished, tmp_path, monkeypatch
):
    path, _ = finished
    recipe, run = write_recipe(tmp_path), tmp_path / "run"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("srppo.training.train_ppo", interrupt)
        done = srppo_command("run", recipe)
    assert done.code == 130
    assert "Traceback" not in done.err
    assert list(json.loads((run / "run.json").read_text())["stages"]) == ["sft", "audit"]
    trained = (run / "sft/model.safetensors").stat().st_mtime_ns

    assert srppo_command("ppo", recipe).code == 0
    assert (run / "sft/model.safetensors").stat().st_mtime_ns == trained
    assert weights(run / "policy") == weights(path / "policy")


def test_an_sft_model_of_ones_own_takes_the_place_of_stage_1(finished, tmp_path):
    """Given what stage 1 would have made, stage 2 makes the same policy."""
    path, _ = finished
    run = start(tmp_path, model={"sft": str(path / "sft")})
    assert run.sft() == path / "sft"
    torch.manual_seed(12345)  # whatever ran before in the process, a stage starts from its own seed
    run.ppo()
    assert not (tmp_path / "run" / "sft").exists()
    assert not (tmp_path / "run" / "metrics" / "sft.jsonl").exists()
    assert weights(tmp_path / "run" / "policy") == weights(path / "policy")


def test_an_sft_model_and_prompts_are_enough(finished, tmp_path):
    """No demonstrations at all: no audit, no held-out NLL, and a policy all the same."""
    path, _ = finished
    run = start(tmp_path, model={"sft": str(path / "sft")}, data={"demonstrations": None})
    results = run.all()
    assert run.audit() is None
    assert results["held_out_nll"] is None
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_full_disk_ends_the_run_with_a_message_and_the_same_command_goes_on(small_disk):
    """The record fits, a checkpoint does not: known after the first step."""
    recipe = write_recipe(small_disk)
    done = srppo_command("sft", recipe)
    assert done.code == 2
    assert f"error: cannot write {small_disk}/run/checkpoints/sft/step-000001" in done.err
    assert "o space left on device" in done.err
    assert "run the same command again" in done.err
    grow(small_disk)
    done = srppo_command("sft", recipe)
    assert done.code == 0, done.err
    assert AutoModelForCausalLM.from_pretrained(small_disk / "run" / "sft")


# --- single stages and settings -------------------------------------------------------------------


def test_start_is_the_same_from_python(tmp_path):
    recipe = write_recipe(tmp_path)
    run = srppo.start(recipe, "ppo.kl_coef=0.25")
    assert run.recipe.ppo.kl_coef == 0.25
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"]["ppo"]["kl_coef"] == 0.25
    assert record["recipe_source"] == str(recipe)


def test_kl_coef_auto_trains_with_what_the_audit_found(tmp_path):
    """The same run with that number set by hand gives the same bytes."""
    (tmp_path / "auto").mkdir()
    changes = {"data": {"held_out": 24}, "eval": {"every": None, "limit": 6}}
    auto = write_recipe(tmp_path / "auto", **changes, ppo={"kl_coef": "auto"})
    said = srppo_command("run", auto)
    assert said.code == 0, said.err
    curve = json.loads((tmp_path / "auto/run/audit.json").read_text())["curve"]
    beta = 1 / (curve["lam_star"] - 1)
    assert f"ppo.kl_coef=auto is {beta:.3g}" in said.out + said.err
    by_hand = write_recipe(tmp_path / "hand", **changes, ppo={"kl_coef": beta})
    assert srppo_command("run", by_hand).code == 0
    weights = [
        (tmp_path / n / "run/policy/model.safetensors").read_bytes() for n in ("auto", "hand")
    ]
    assert weights[0] == weights[1]


def test_a_control_with_auto_and_nothing_to_extrapolate_is_left_out(tmp_path, capsys):
    """The others are trained all the same, and the run comes to its end."""
    controls = {
        name: {"ppo": {"kl_coef": beta, "steps": 1}}
        for name, beta in (("auto", "auto"), ("one", 1))
    }
    overfitted = {"learning_rate": 0.01, "epochs": 20, "optimizer": "adamw"}
    recipe = write_recipe(tmp_path, sft=overfitted, controls=controls)
    run = Run(load_recipe(recipe), Reporter())
    run.all()
    assert json.loads((run.dir.path / "audit.json").read_text())["curve"]["lam_star"] <= 1
    said = capsys.readouterr()
    assert "auto: left out, for the audit finds nothing to extrapolate" in said.out + said.err
    assert (run.dir.path / "controls/one/model.safetensors").is_file()
    assert not (run.dir.path / "controls/auto").exists()
    rows = json.loads((run.dir.path / "results.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"base", "sft", "policy", "one"}


def test_fewer_held_out_than_asked_for_is_told(tmp_path, capsys):
    Run(load_recipe(write_recipe(tmp_path, data={"demonstrations_limit": None, "held_out": 99})))
    assert "44 are held out (data.held_out=99: where all" in capsys.readouterr().err


def test_kl_coef_auto_without_held_out_demonstrations_says_so_first(tmp_path):
    recipe = write_recipe(tmp_path, data={"held_out": 0}, ppo={"kl_coef": "auto"})
    said = srppo_command("run", recipe)
    assert said.code == 2
    assert "Set data.held_out=200" in said.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["audit", "ppo"])
def test_stage_2_without_stage_1_says_what_to_do(tmp_path, stage):
    run = start(tmp_path)
    with pytest.raises(RunDirError, match=rf"{stage} needs an SFT model.*srppo sft.*model\.sft"):
        getattr(run, stage)()


def test_without_anything_to_evaluate_on_the_run_still_ends_well(tmp_path):
    run = start(
        tmp_path,
        data={"held_out": 0},
        eval={"prompts": None, "scorer": None},
        controls={"lambda-2": {"extrapolate": 2.0}},
    )
    results = run.all()
    assert results["rows"] == []
    assert (tmp_path / "run" / "report.html").is_file()
    assert srppo_command("run", tmp_path / "recipe.yaml").code == 0  # prints no table
    with pytest.raises(ConfigError, match="holds no results"):
        summarise([tmp_path / "run"])


def test_held_out_demonstrations_are_evaluated_on_where_no_prompts_are_given(tmp_path):
    run = start(tmp_path, eval={"prompts": None, "scorer": None, "side_by_side": 0})
    results = run.all()
    assert {row["group"] for row in results["rows"]} == {"in_domain"}
    assert {row["n"] for row in results["rows"]} == {8}
    assert results["primary"] is None
    assert (tmp_path / "run" / "samples.jsonl").read_text() == ""
    lines = json_lines(tmp_path / "run" / "metrics" / "ppo.jsonl")
    assert "eval/reward/in_domain" in lines[0]


def test_prompts_default_to_those_of_the_demonstrations_and_the_overlap_says_so(tmp_path):
    run = start(tmp_path, data={"prompts": None, "prompts_limit": 10})
    trained_on = [e.prompt_ids for e in run.data.train]
    assert [p.ids for p in run.data.prompts] == trained_on[:10]
    overlap = run.data.reports["overlap"]
    assert (overlap["setting"], overlap["of"], overlap["exact"]) == ("same", 10, 10)
    assert overlap["evaluated"] == 0
    assert (tmp_path / "run" / "data.txt").read_text().endswith(describe_overlap(overlap))


def test_a_policy_that_ran_away_is_recorded(tmp_path):
    run = start(tmp_path, ppo={"max_kl": 0.01, "learning_rate": 0.05, "steps": 5})
    run.sft()
    run.ppo()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "ppo.max_kl=0.01" in record["stopped"]["policy"]
    assert record["stages"]["ppo"]["status"] == "done"


def test_the_context_may_be_filled_to_the_last_position(tmp_path):
    start(tmp_path / "fits", data={"max_prompt_tokens": 40, "max_response_tokens": 24})
    with pytest.raises(ConfigError, match=r"= 65 is more than the 64 positions.*Try 32 for each"):
        start(tmp_path / "not", data={"max_prompt_tokens": 41, "max_response_tokens": 24})


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_beyond_which_frequencies_change_are_refused(tmp_path, kind):
    base = tiny.copy_of_miniature(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    width = config["hidden_size"] // config["num_attention_heads"] // 2
    factors = {"short_factor": [1.0] * width, "long_factor": [2.0] * width, "factor": 2.0}
    config["rope_parameters"] = rope | factors
    (base / "config.json").write_text(json.dumps(config))
    model = {"base": str(base)}
    start(tmp_path / "a", model=model, data={"max_prompt_tokens": 20, "max_response_tokens": 12})
    with pytest.raises(ConfigError, match=r"once one passes 32 .* Try 16 for each"):
        start(tmp_path / "b", model=model, data={"max_prompt_tokens": 21})


def test_a_run_goes_on_with_the_date_that_its_template_wrote_first(tmp_path, monkeypatch):
    base = tiny.copy_of_miniature(tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d') | list | join(' ') }} " + template.read_text())
    seen = []
    for day in ("2026-03-14", "2026-03-15"):
        monkeypatch.setattr("srppo.pipeline.now", lambda day=day: f"{day}T12:00:00+00:00")
        run = start(tmp_path, model={"base": str(base)})
        seen.append([e.prompt_ids for e in run.data.train])
        assert run.tokenizer.decode(seen[-1][0]).startswith("1 4")
        del run  # and its lock
    assert seen[0] == seen[1]


def test_prompts_that_are_all_taken_are_noticed_before_anything_is_trained(tmp_path):
    everything = {"demonstrations_limit": 9999, "overlap": "disjoint"}
    with pytest.raises(DataError, match=r"passed over.*Lower data.demonstrations_limit"):
        start(tmp_path, data={"prompts": None, **everything})
    assert not (tmp_path / "run").exists()


# --- going on with what there is ------------------------------------------------------------------


def test_evaluation_is_done_again_when_there_are_more_models(tmp_path):
    run = start(tmp_path, controls={"lambda-1": {"extrapolate": 1.0}}, eval={"every": None})
    run.sft()
    first = run.evaluate()
    assert {r["model"] for r in first["rows"]} == {"base", "sft", "lambda-1"}
    run.ppo()
    again = start(tmp_path, controls={"lambda-1": {"extrapolate": 1.0}}, eval={"every": None})
    assert {r["model"] for r in again.evaluate()["rows"]} == {"base", "sft", "policy", "lambda-1"}


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    data = tmp_path / "mine.jsonl"
    rows = [json.dumps({"prompt": f"copy : {a}", "response": a}) for a in "abcdef123456"]
    data.write_text("\n".join(rows))
    settings = {
        "data": {"demonstrations": str(data), "prompts": None, "demonstrations_limit": None},
        "eval": {"prompts": None, "scorer": None},
    }
    start(tmp_path, **settings).sft()
    start(tmp_path, **settings)
    data.write_text("\n".join(rows[::-1]))
    with pytest.raises(RunDirError, match=r"mine\.jsonl holds something else than.*output_dir"):
        start(tmp_path, **settings)


def test_prompts_that_were_trained_on_are_not_held_out(tmp_path):
    data = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"copy : {a}", "response": b} for a in "abcdef" for b in "123456"]
    data.write_text("\n".join(map(json.dumps, rows)))
    run = start(
        tmp_path,
        data={"demonstrations": str(data), "prompts": None, "demonstrations_limit": 4},
        eval={"prompts": None, "scorer": None, "every": None},
    )
    trained = {tuple(e.prompt_ids) for e in run.data.train}
    assert not any(tuple(e.prompt_ids) in trained for e in run.data.held_out)
    assert run.data.reports["overlap"]["evaluated"] == 0


def test_what_is_trained_is_float32_also_beside_bfloat16_models(tmp_path):
    run = start(tmp_path, model={"dtype": "bfloat16"}, eval={"every": None})
    run.sft()
    run.ppo()
    assert run.base.model.dtype == run.pi_sft.model.dtype == torch.bfloat16
    for name in ("sft", "policy"):
        weights = load_file(run.dir.path / name / "model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.float32}


def test_a_run_directory_that_is_removed_between_two_stages_is_told_as_that(tmp_path):
    """Not as a model that is missing, whose cure would be another model."""
    run = Run(load_recipe(write_recipe(tmp_path)), Reporter(quiet=True))
    run.sft()
    shutil.rmtree(run.dir.path)
    with pytest.raises(RunDirError, match=r"the run directory was removed.*same command again"):
        run.audit()
    assert not run.dir.path.exists()
