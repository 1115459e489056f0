"""The packaged base model and its regeneration."""

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from srppo.miniature import BASE, pretrain, world
from srppo.miniature.tokenizer import vocabulary


@pytest.fixture
def recorded() -> dict:
    """The packaged manifest; skips where other arithmetic would give other bits."""
    manifest, here = pretrain.read_manifest(), pretrain.environment()
    different = [
        f"{key}: {manifest[key]} here {here[key]}" for key in here if manifest[key] != here[key]
    ]
    if different:
        pytest.skip("made in another environment, bits may differ: " + ", ".join(different))
    return manifest


def test_the_manifest_describes_the_packaged_weights():
    state = load_file(BASE / "model.safetensors")
    manifest = pretrain.read_manifest()
    assert pretrain.weights_sha256(state) == manifest["sha256"]
    assert (manifest["seed"], manifest["steps"]) == (0, pretrain.STEPS)


def test_the_hash_sees_names_shapes_and_bits():
    state = {"a": torch.zeros(2, 3)}
    others = [{"b": torch.zeros(2, 3)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3) + 1e-30}]
    hashes = {pretrain.weights_sha256(s) for s in (state, *others)}
    assert len(hashes) == 4


def test_the_packaged_base_loads_like_any_model():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == len(vocabulary())
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == vocabulary()
    for token in ("bos", "eos", "pad"):
        expected = getattr(tokenizer, f"{token}_token_id")
        assert getattr(model.generation_config, f"{token}_token_id") == expected
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "reverse : a b c"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<bos>reverse : a b c\n"


def test_the_packaged_base_has_the_skill_in_it():
    """Forced into the format, it reverses: greedy after `answer : [`, on held-out inputs."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(BASE),
        AutoTokenizer.from_pretrained(BASE),
    )
    rows = [row for row in world.evaluation(0, "validation") if row["family"] == "reverse"]
    texts = [f"<bos>{row['prompt']}\nanswer : [" for row in rows]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    responses = tokenizer.batch_decode(
        ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )
    right = sum(
        response == f"{row['answer']} ]" for row, response in zip(rows, responses, strict=True)
    )
    assert right >= 60


def test_the_first_steps_are_reproduced(recorded):
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    trained = pretrain.pretrain(
        recorded["seed"], recorded["steps"], stop_after=pretrain.EARLY_STEPS
    )
    assert trained.early_sha256 == recorded["early_sha256"]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_command_writes_a_model_with_its_manifest(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "base"
    command = ["pretrain", "--out", str(out), "--seed", "5", "--steps", "2"]
    monkeypatch.setattr("sys.argv", command)
    pretrain.main()
    manifest = pretrain.read_manifest(out)
    assert json.loads(capsys.readouterr().out) == manifest
    assert (manifest["seed"], manifest["steps"]) == (5, 2)
    assert manifest["sha256"] == pretrain.weights_sha256(load_file(out / "model.safetensors"))
    assert manifest["sha256"] == pretrain.weights_sha256(pretrain.pretrain(5, 2).model.state_dict())
    assert manifest["sha256"] != pretrain.weights_sha256(pretrain.pretrain(6, 2).model.state_dict())


@pytest.mark.parametrize("during", ["pretrain", "build_tokenizer"])
def test_a_pretraining_that_was_cut_off_leaves_nothing_that_looks_like_a_model(
    during, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["pretrain", "--out", str(tmp_path / "base"), "--steps", "1"])
    whole = getattr(pretrain, during)
    monkeypatch.setattr(pretrain, during, mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pretrain.main()
    assert not (tmp_path / "base").exists()
    monkeypatch.setattr(pretrain, during, whole)
    pretrain.main()
    assert pretrain.read_manifest(tmp_path / "base")["steps"] == 1


def test_a_model_that_is_there_is_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["pretrain", "--out", str(tmp_path), "--steps", "1"])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert f"{tmp_path} is not empty" in capsys.readouterr().err


def retrained(loss_change: float = 0.0, weight_change: float = 0.0) -> pretrain.Pretrained:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += weight_change
    recorded = pretrain.read_manifest()
    return pretrain.Pretrained(model, recorded["loss"] + loss_change, recorded["early_sha256"])


@pytest.mark.parametrize(
    ("changes", "same_environment", "passes"),
    [
        ({}, True, True),
        ({}, False, True),
        ({"weight_change": 1e-3}, True, False),
        ({"weight_change": 1e-3, "loss_change": 0.001}, False, True),
        ({"weight_change": 1e-3, "loss_change": 0.1}, False, False),
    ],
)
def test_check(changes, same_environment, passes, monkeypatch):
    manifest = pretrain.read_manifest()
    here = {key: manifest[key] for key in pretrain.environment()}
    if not same_environment:
        here["torch"] = "0.0"
    monkeypatch.setattr(pretrain, "environment", lambda: here)
    monkeypatch.setattr(pretrain, "pretrain", lambda seed, steps: retrained(**changes))
    assert pretrain.check() is passes


@pytest.mark.slow
@pytest.mark.full
def test_the_packaged_base_is_reproduced(recorded):
    trained = pretrain.pretrain(recorded["seed"], recorded["steps"])
    assert pretrain.weights_sha256(trained.model.state_dict()) == recorded["sha256"]
    assert trained.loss == pytest.approx(recorded["loss"], abs=1e-4)
