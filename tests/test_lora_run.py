"""Whole runs with adapters: what they leave behind, and what they can begin from."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

import srppo
from runs import json_lines, timeless, write_recipe
from srppo.errors import ConfigError, ModelError
from srppo.models.load import load_model

LORA = {"base": "srppo:miniature", "device": "cpu", "lora": {"rank": 4, "alpha": 8.0}}
CONTROLS = {
    "longer": {"sft": {"epochs": 2}},
    "rloo": {"ppo": {"estimator": "rloo", "responses_per_prompt": 2}},
    "lambda-2": {"extrapolate": 2.0},
}
IDS = torch.arange(2, 20)[None]


def start(folder, *overrides, **sections):
    sections = {"model": LORA, "sft": {"optimizer": "adamw", "learning_rate": 0.03}, **sections}
    return srppo.start(write_recipe(folder, **sections), *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = start(tmp_path_factory.mktemp("lora"), controls=CONTROLS)
    return run, run.all()


def adapter(path):
    return load_file(path / "adapter_model.safetensors")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_run_leaves_adapters_and_measures_every_model(finished):
    run, results = finished
    for name in ("sft", "policy", "controls/longer", "controls/rloo"):
        assert not (run.dir.path / name / "model.safetensors").exists()
        assert {w.dtype for w in adapter(run.dir.path / name).values()} == {torch.float32}
    assert {row["model"] for row in results["rows"]} == {"base", "sft", "policy", *CONTROLS}
    assert (run.dir.path / "report.html").exists()


def test_each_is_loaded_by_peft_as_it_was_measured(finished):
    run, _ = finished
    paths = {name: run.dir.path / name for name in ("sft", "policy", "controls/longer")}
    found = {n: logits(AutoPeftModelForCausalLM.from_pretrained(p)) for n, p in paths.items()}
    assert torch.equal(logits(run.pi_sft), found["sft"])
    for name in ("policy", "controls/longer"):
        assert torch.equal(logits(run.pi_sft.sibling(paths[name])), found[name])
    assert torch.equal(logits(run.base), logits(load_model("srppo:miniature")))
    different = [logits(run.base), *found.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_the_policy_starts_at_sft(finished):
    run, _ = finished
    first = json_lines(run.dir.path / "metrics" / "ppo.jsonl")[0]
    assert first["kl_sft"] == pytest.approx(0, abs=1e-6)
    assert first["kl_base"] == pytest.approx(first["reward"], abs=1e-4)
    assert abs(first["reward"]) > 0.01


def test_a_run_with_adapters_repeats_to_the_byte(finished, tmp_path):
    run, _ = finished
    again = start(tmp_path)
    again.sft()
    again.ppo()
    for name in ("sft", "policy"):
        one, two = (adapter(r.dir.path / name) for r in (run, again))
        assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = (timeless(r.dir.path / "metrics" / "ppo.jsonl") for r in (run, again))
    assert one == two


def test_activation_checkpointing_changes_nothing_but_memory(finished, tmp_path):
    run, _ = finished
    again = start(tmp_path, "sft.gradient_checkpointing=true", "ppo.gradient_checkpointing=true")
    again.sft()
    again.ppo()
    one, two = (adapter(r.dir.path / "policy") for r in (run, again))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


def test_stage_2_begins_from_an_adapter_of_another_run(finished, tmp_path):
    """Also without tokenizer files, which an adapter may leave to its base."""
    run, _ = finished
    given = tmp_path / "given"
    given.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (given / name).write_bytes((run.dir.path / "sft" / name).read_bytes())
    again = start(tmp_path / "run", model={**LORA, "sft": str(given)})
    again.ppo()
    one, two = (adapter(r.dir.path / "policy") for r in (run, again))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_without_lora_an_adapter_is_merged_and_everything_trained(finished, tmp_path):
    run, _ = finished
    model = {"base": "srppo:miniature", "device": "cpu", "sft": str(run.dir.path / "sft")}
    again = start(tmp_path, model=model)
    again.ppo()
    torch.testing.assert_close(logits(again.pi_sft), logits(run.pi_sft), atol=1e-4, rtol=0)
    assert (again.dir.path / "policy" / "model.safetensors").exists()


def test_over_a_whole_sft_model(tmp_path):
    """Its adapters lie on it; those of an SFT control on the base."""
    whole = start(tmp_path / "first", model={"base": "srppo:miniature"}).sft()
    controls = {"longer": {"sft": {"epochs": 2}}}
    run = start(tmp_path, model={**LORA, "sft": str(whole)}, controls=controls)
    run.all()
    assert torch.equal(logits(run.pi_sft), logits(load_model(str(whole))))
    for name, origin in (("policy", whole), ("controls/longer", load_model(LORA["base"]))):
        found = AutoPeftModelForCausalLM.from_pretrained(run.dir.path / name)
        with found.disable_adapter():
            below = logits(found)
        expected = origin if not hasattr(origin, "exists") else load_model(str(origin))
        assert torch.equal(below, logits(expected))
    first = json_lines(run.dir.path / "metrics" / "ppo.jsonl")[0]
    assert first["kl_sft"] == pytest.approx(0, abs=1e-6)


def test_dropout_is_for_stage_1_only(finished, tmp_path):
    run, _ = finished
    again = start(tmp_path, "model.lora.dropout=0.5")
    again.sft()
    one, two = (adapter(r.dir.path / "sft") for r in (run, again))
    assert not all(torch.equal(one[key], two[key]) for key in one)
    policy = again.pi_sft.successor()
    assert torch.equal(policy(IDS).logits, policy(IDS).logits)


def test_quantised_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    rloo = {"estimator": "rloo", "responses_per_prompt": 2}
    run = start(tmp_path, "model.quantize=8bit", ppo=rloo)
    results = run.all()
    assert {row["model"] for row in results["rows"]} == {"base", "sft", "policy"}
    assert {w.dtype for w in adapter(run.dir.path / "sft").values()} == {torch.float32}


# --- what cannot be -------------------------------------------------------------------------------


def test_quantising_needs_adapters(tmp_path):
    with pytest.raises(ConfigError, match=r"quantize=4bit without lora.*model\.lora\.rank=16"):
        start(tmp_path, model={"base": "srppo:miniature", "quantize": "4bit"})


def test_quantising_needs_the_extra_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("srppo.models.load.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"srppo\[quantize\]"):
        start(tmp_path, "model.quantize=4bit")


def test_a_misspelt_setting_of_the_adapter_is_explained(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.lora\.rnk.*Did you mean 'rank'"):
        start(tmp_path, "model.lora.rnk=4")
