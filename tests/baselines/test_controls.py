"""Each baseline as a control of a run, and what the three that need no code of their own equal."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from enumerable import (
    EOS,
    LENGTH,
    PROMPTS,
    VOCAB,
    exact,
    fine_tuned,
    sequence_logprobs,
    tiny_llama,
)
from runs import SMALL, json_lines, srppo_command, write_recipe
from srppo.algo.optimum import enumerate_responses
from srppo.baselines.weights import extrapolate_weights
from srppo.config import PPOConfig
from srppo.miniature import BASE
from srppo.models.roles import Role, Roles
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.metrics import MetricsLog
from srppo.train.ppo import train_ppo

REWARD_TO_GO = {"estimator": "all_action", "sampled_share": 1.0}
PAIRS = {"rounds": 2, "epochs": 1, "batch_size": 8, "learning_rate": 1e-3}
CONTROLS = {
    "dft": {"sft": {"loss": "dft"}},
    "iw": {"sft": {"loss": "iw", "epochs": 2}},
    "iw-step": {"sft": {"loss": "iw_step", "epochs": 2}},
    "spin": {"pairs": PAIRS},
    "gsil": {"pairs": {**PAIRS, "loss": "brier"}},
    "dpr": {"ppo": {**REWARD_TO_GO, "steps": 1}, "against": "halfway"},
    "expo": {"extrapolate_weights": 0.5},
    "expo-tiny": {"extrapolate_weights": 1e-9},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """One small run with all of them, begun by `srppo run`."""
    folder = tmp_path_factory.mktemp("baselines")
    path = write_recipe(folder, controls=CONTROLS, eval={"limit": 6, "every": None})
    done = srppo_command("run", path)
    assert done.code == 0, done.err
    return folder / "run"


def model(run_dir, name):
    return load_file(run_dir / name / "model.safetensors")


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())


def test_every_baseline_is_a_model_of_the_run_and_in_its_table(run_dir):
    rows = json.loads((run_dir / "results.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"base", "sft", "policy", *CONTROLS}
    sft = model(run_dir, "sft")
    for name in CONTROLS:
        assert same(model(run_dir, f"controls/{name}"), sft) == (name == "expo-tiny"), name
        assert (run_dir / "controls" / name / "README.md").is_file()


def test_weights_are_extrapolated_past_those_of_pi_sft(run_dir):
    sft, expo = model(run_dir, "sft"), model(run_dir, "controls/expo")
    base = load_file(BASE / "model.safetensors")
    for key, theta in expo.items():
        torch.testing.assert_close(theta, 1.5 * sft[key] - 0.5 * base[key], msg=key)


def test_the_halfway_model_learned_from_half_of_the_demonstrations(run_dir):
    whole, half = (json_lines(run_dir / f"metrics/{n}.jsonl") for n in ("sft", "halfway"))
    assert (len(whole), len(half)) == (2, 1)  # 16 and 8 demonstrations in batches of 8
    assert not same(model(run_dir, "halfway"), model(run_dir, "sft"))


def test_dprs_reward_divides_by_the_halfway_model(run_dir):
    """At the first step pi_theta is pi_sft: the reward is the mean KL to whom it divides by."""
    (dpr,) = json_lines(run_dir / "metrics/controls/dpr.jsonl")
    first = json_lines(run_dir / "metrics/ppo.jsonl")[0]
    assert dpr["reward"] == pytest.approx(dpr["kl_base"], abs=1e-5)
    assert first["reward"] == pytest.approx(first["kl_base"], abs=1e-5)
    assert abs(dpr["reward"]) < 0.5 * abs(first["reward"])  # half of the way lies behind it


def test_pairs_are_logged_step_by_step(run_dir):
    lines = json_lines(run_dir / "metrics/controls/spin.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["round"] for line in lines] == [1, 1, 2, 2]


def test_cards_say_what_the_model_is(run_dir):
    cards = {
        name: (run_dir / "controls" / name / "README.md").read_text()
        for name in ("dft", "spin", "dpr", "expo")
    }
    assert "one stage of its run again" in cards["dft"]
    assert "one stage of its run again" in cards["dpr"]
    assert "another method than its stage 2" in cards["spin"]
    assert "another method on the parts of its run" in cards["expo"]


def test_a_plan_has_a_row_for_what_is_trained(tmp_path):
    done = srppo_command("run", write_recipe(tmp_path, controls=CONTROLS), "--dry-run")
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    found = {row[0]: row[1:3] for row in rows if row and row[0] in CONTROLS}
    assert found.keys() == {name for name in CONTROLS if not name.startswith("expo")}
    assert found["spin"] == ["4", "64"]  # 2 rounds of 2 steps; 16 pairs a round


def test_weights_are_not_extrapolated_with_adapters(tmp_path):
    settings = {**SMALL["model"], "lora": {"rank": 2}}
    path = write_recipe(tmp_path, model=settings, controls={"expo": {"extrapolate_weights": 0.5}})
    done = srppo_command("run", path)
    assert done.code == 2
    assert "controls.expo.extrapolate_weights with model.lora" in done.err


@pytest.mark.slow
def test_pairs_and_the_halfway_model_work_with_adapters(tmp_path):
    settings = {**SMALL["model"], "lora": {"rank": 2}}
    controls = {name: CONTROLS[name] for name in ("iw", "spin", "dpr")}
    done = srppo_command("run", write_recipe(tmp_path, model=settings, controls=controls))
    assert done.code == 0, done.err
    for name in ("halfway", *(f"controls/{c}" for c in controls)):
        assert (tmp_path / "run" / name / "adapter_model.safetensors").is_file()


# --- what they equal ------------------------------------------------------------------------------


def test_extrapolating_by_minus_one_gives_the_base_back():
    base = tiny_llama(seed=0)
    policy = Role(fine_tuned(base, seed=0))
    extrapolate_weights(policy, Role(base), -1.0)
    for theta, origin in zip(policy.model.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(theta, origin)


def trained(base, sft, tmp_path, **settings):
    config = PPOConfig(lr_schedule="cosine", max_kl=1e9, **settings)
    roles = Roles.begin(base, sft, critic=False)
    sampler = HFSampler(roles.policy, eos_token_id=EOS, max_new_tokens=LENGTH)
    with MetricsLog(tmp_path, "ppo") as log:
        train_ppo(roles, sampler, PROMPTS, config, seed=0, log=log, reporter=Reporter(quiet=True))
    return roles.policy.model


@torch.no_grad()
def extrapolated_logprobs(base, sft, lam):
    """(prompts, S) of base (sft/base)^lam, normalised at each token, by plain forwards."""
    ids, mask = enumerate_responses(VOCAB, EOS, LENGTH)
    rows = []
    for prompt in PROMPTS:
        x = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], dim=1)
        p, q = (m(x[:, :-1]).logits.double().log_softmax(-1) for m in (sft, base))
        logprobs = (q + lam * (p - q)).log_softmax(-1)
        rows.append((logprobs.gather(2, ids[:, :, None]).squeeze(2) * mask).sum(1))
    return torch.stack(rows)


def kl(p, q):
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.slow
def test_exopd_becomes_extrapolation_at_decoding_time(tmp_path):
    """gamma 0 leaves each token its own reward: what is optimal is normalised at every token."""
    base = tiny_llama(seed=0)
    sft = fine_tuned(base, seed=0)
    policy = trained(
        base, sft, tmp_path, estimator="all_action", sampled_share=0.0, gamma=0.0, kl_ref="base",
        kl_coef=1 / 3, steps=30, rollouts_per_step=256, epochs=2, minibatch_size=128,
        learning_rate=3e-3,
    )  # fmt: skip
    found, decoded = sequence_logprobs(policy), extrapolated_logprobs(base, sft, 3.0)
    assert kl(sequence_logprobs(sft), decoded) > 3
    assert kl(found, decoded) < 0.05
    assert exact(policy, sft, base, 1 / 3, "base").kl_to_optimum > 0.3  # SRPPO's, looking ahead


@pytest.mark.slow
def test_dpr_reaches_the_optimum_of_its_reward(tmp_path):
    """pi_sft (pi_sft / pi_half)^(1/beta), by the reward to go alone."""
    base = tiny_llama(seed=0)
    half = fine_tuned(base, seed=0)
    sft = fine_tuned(half, seed=0)
    policy = trained(
        half, sft, tmp_path, **REWARD_TO_GO, kl_coef=0.5, steps=100, rollouts_per_step=512,
        epochs=4, minibatch_size=256, learning_rate=1.5e-3,
    )  # fmt: skip
    found = exact(policy, sft, half, 0.5)
    assert found.gap_closed >= 0.99
    assert found.kl_to_optimum <= 0.03
