"""`srppo run RECIPE --dry-run` as the shell sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from runs import srppo_command, write_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def dry_run(recipe, *arguments):
    done = srppo_command("run", recipe, *arguments, "--dry-run")
    assert done.code == 0, done.err
    return " ".join(done.out.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral-7b", "llama-3-8b"])
def test_full_fine_tuning_of_8_b_does_not_fit_and_the_plan_says_why_and_what_would(name):
    out = dry_run(RECIPES / f"{name}.yaml", "--gpu", "H100")
    assert "It does not fit: update: passes needs" in out
    assert "With all weights trained it cannot" in out
    assert "What fits" in out
    assert "model.lora.rank=16" in out
    assert "5,094" in out  # optimizer steps of stage 1: 2 (326,154 - 256) / 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mistral-7b-lora", ["--gpu", "H100"]),
        ("llama-3-8b-lora", ["--gpu", "H100"]),
        (
            "llama-3-8b-lora",
            [
                *("--memory", "24GB", "--gpu", "4090", "model.quantize=4bit"),
                *("sft.micro_batch_size=1", "ppo.max_tokens_per_batch=2048"),
            ],
        ),
        ("llama-3-8b", ["--gpu", "H100", "--nproc", "8"]),
        ("llama-3-8b", ["--gpu", "H100", "--nproc", "4"]),
        ("llama-3-70b", ["--gpu", "H100", "--nproc", "8", "--nodes", "8"]),
        (
            "llama-3-70b",
            [
                *("--gpu", "H100", "model.shard=false", "model.shard_sampling=false"),
                *("model.lora.rank=16", "model.quantize=4bit"),
                *("sft.micro_batch_size=2", "ppo.max_tokens_per_batch=4096"),
            ],
        ),
        ("small-gpu", ["--gpu", "4090"]),
        ("small-gpu", ["--gpu", "L40S", "model.base=Qwen/Qwen2.5-1.5B"]),
        ("small-gpu", ["--gpu", "4090", "model.base=Qwen/Qwen2.5-1.5B", "model.lora.rank=16"]),
    ],
)
def test_what_the_recipes_say_of_their_hardware_is_so(name, arguments):
    out = dry_run(RECIPES / f"{name}.yaml", *arguments)
    assert "It fits:" in out
    assert "does not fit" not in out


def test_a_local_config_is_enough_and_nothing_is_written(tmp_path):
    (tmp_path / "model").mkdir()
    config = LlamaConfig(num_hidden_layers=4)  # of Llama 2's 32
    config.save_pretrained(tmp_path / "model")
    path = write_recipe(tmp_path, model={"base": str(tmp_path / "model")})
    before = set(tmp_path.rglob("*"))
    out = dry_run(path, "--gpu", "A100")
    assert "1.07 G weights by its config.json" in out
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (
            ["data.max_prompt_tokens=1000", "data.max_response_tokens=1000"],
            "= 2000, and the model has 512 positions. Try 256 for each.",
        ),
        (
            ["sft.batch_size=6", "sft.micro_batch_size=2", "--nproc", "4"],
            "sft.batch_size=6 cannot be divided among 4 processes. Try sft.batch_size=8.",
        ),
    ],
)
def test_what_keeps_a_run_from_starting_stands_first_and_last(arguments, last, tmp_path):
    LlamaConfig(num_hidden_layers=1, max_position_embeddings=512).save_pretrained(
        tmp_path / "model"
    )
    path = write_recipe(tmp_path, model={"base": str(tmp_path / "model")})
    done = srppo_command("run", path, *arguments, "--dry-run", "--gpu", "A100")
    out = " ".join(done.out.split())
    assert done.code == 2
    assert out.count("It would not start: ") == 2
    assert out.index("It would not start: ") < out.index("It fits:")
    assert out.endswith(last)


@pytest.mark.parametrize(
    ("changes", "said", "anywhere"),
    [
        ({"model": {"sft": "/nope"}}, "model directory '/nope' does not exist", True),
        ({"eval": {"scorer": "python:no_such_module:s"}}, "No module named 'no_such_module'", True),
        ({"eval": {"scorer": "python:json:no_such_score"}}, "has no attribute 'no_such_sc", True),
        ({"eval": {"benchmarks": {"tasks": ["gsm8k"]}}}, "gsm8k", False),
        ({"output_dir": "{folder}/recipe.yaml/run"}, "recipe.yaml is not a directory that", False),
        ({"output_dir": "{folder}"}, "holds files that are not a run of srppo ('model' f", False),
    ],
)
@pytest.mark.parametrize("also", [[], ["--gpu", "A100"]])
def test_what_a_run_checks_first_is_checked(changes, said, anywhere, also, tmp_path, monkeypatch):
    """For another machine only what the recipe itself gets wrong."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "model").mkdir()
    changes = {k: v.format(folder=tmp_path) if k == "output_dir" else v for k, v in changes.items()}
    done = srppo_command("run", write_recipe(tmp_path, **changes), "--dry-run", *also)
    out = " ".join(done.out.split())
    assert "stage 2" in out, done.err
    if anywhere or not also:
        assert done.code == 2
        assert out.count("It would not start: ") == 2
        assert said in out
    else:
        assert done.code == 0
        assert "It would not start" not in out
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_known_is_said(tmp_path):
    path = write_recipe(tmp_path, model={"base": "somebody/model"}, data={"demonstrations": "a/b"})
    out = dry_run(path, "--gpu", "H100")
    assert "somebody/model is not on this machine" in out
    assert "hf download somebody/model config.json" in out
    assert "?" in out


def test_a_plan_for_this_machine_is_measured_here(tmp_path):
    out = dry_run(write_recipe(tmp_path), "--memory", "100MB")
    assert "which measured is" in out
    assert "It does not fit" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "H100"], ["--gpu without --dry-run", "Add --dry-run"]),
        (["--dry-run", "--gpu", "B9000"], ["--gpu B9000", "Name one of"]),
        (["--dry-run", "--memory", "lots"], ["--memory 'lots'", "80GB"]),
        (["--dry-run", "model.base=./nowhere"], ["./nowhere", "does not exist"]),
        (["--dry-run", "data.demonstrations=nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    ],
)
def test_bad_questions(arguments, words, tmp_path):
    done = srppo_command("run", write_recipe(tmp_path), *arguments)
    assert done.code == 2
    assert [word for word in words if word not in done.err] == []


def test_another_rollout_engines_costs_are_said_to_be_unknown(tmp_path):
    rollout = {"engine": "vllm", "url": "http://127.0.0.1:9"}
    assert "by rollout.engine=vllm" in dry_run(write_recipe(tmp_path, rollout=rollout))
