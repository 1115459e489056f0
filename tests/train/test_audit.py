"""The audit: what it measures is right, and it warns when, and only when, there is a reason."""

import copy
import json

import pytest
import torch
from scipy.stats import mannwhitneyu

import tiny
from enumerable import fine_tuned, tiny_llama
from srppo.algo.optimum import extrapolate, optimum
from srppo.algo.reward import Bounds
from srppo.config import PPOConfig, load_recipe
from srppo.data.chat import Example
from srppo.errors import ConfigError, SrppoError
from srppo.eval.evaluate import held_out_nll
from srppo.models.batching import Sequences
from srppo.models.scoring import score
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.train.audit import (
    LAMBDAS,
    auc,
    audit,
    lambda_curve,
    top_tokens,
    warnings_from,
    with_found_beta,
)

BUDGET = 10**6


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama(seed=0)
    return base, fine_tuned(base, seed=0)


HELD_OUT = [Example([1 + i % 4], [1 + i % 7, (3 * i) % 7, 0]) for i in range(24)]


def curve_of(pair, **settings):
    y = Sequences.of([e.prompt_ids for e in HELD_OUT], [e.response_ids for e in HELD_OUT])
    return lambda_curve(*pair, y, PPOConfig(**settings))


# --- the lambda-curve -----------------------------------------------------------------------------


def test_the_curve_passes_through_base_at_0_and_sft_at_1(pair):
    base, sft = pair
    curve = curve_of(pair)
    at = dict(zip(curve["lams"], curve["nll"], strict=True))
    assert curve["nll_base"] == pytest.approx(held_out_nll(base, HELD_OUT, BUDGET), rel=1e-5)
    assert at[0.0] == pytest.approx(curve["nll_base"], rel=1e-5)
    assert (
        at[1.0] == curve["nll_sft"] == pytest.approx(held_out_nll(sft, HELD_OUT, BUDGET), rel=1e-5)
    )
    assert abs(at[0.0] - at[1.0]) > 0.1


def test_in_between_and_beyond_it_is_the_nll_of_the_extrapolated_model(pair):
    """Token by token with plain forwards: base + lambda (sft - base), normalised."""
    base, sft = pair
    curve = curve_of(pair, kl_coef=0.5)
    total = 0.0
    with torch.no_grad():
        for e in HELD_OUT:
            ids = torch.tensor([e.prompt_ids + e.response_ids])
            b, s = (m(ids).logits[0].log_softmax(-1) for m in (base, sft))
            mixed = (b + 3.0 * (s - b)).log_softmax(-1)[len(e.prompt_ids) - 1 : -1]
            total -= float(mixed.gather(1, torch.tensor(e.response_ids)[:, None]).sum())
    assert curve["nll_recipe"] == pytest.approx(total / len(HELD_OUT), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "lam"),
    [
        ({"kl_coef": 0.2}, 6.0),
        ({"kl_coef": 0.5}, 3.0),
        ({"kl_coef": 0.2, "kl_ref": "base"}, 5.0),
        ({"kl_coef": 1.0, "kl_ref": "base"}, 1.0),
        ({"kl_coef": 0.3}, 1 + 1 / 0.3),
        ({"kl_coef": 0.01}, 101.0),
    ],
)
def test_the_recipes_lambda_is_where_ppo_aims(pair, settings, lam):
    """1 + 1/beta past sft, 1/beta past base; on the curve even where the grid has no such point."""
    curve = curve_of(pair, **settings)
    assert curve["lam_recipe"] == pytest.approx(lam)
    place = min(range(len(curve["lams"])), key=lambda k: abs(curve["lams"][k] - lam))
    assert curve["lams"][place] == pytest.approx(lam, rel=1e-6)
    assert curve["nll_recipe"] == curve["nll"][place]
    assert set(LAMBDAS) <= {round(x, 6) for x in curve["lams"]}
    assert curve["lams"] == sorted(curve["lams"])


@pytest.mark.parametrize("bound", [{"plausibility": 0.3}, {"token_clip": 0.4}])
def test_the_curve_of_a_bounded_reward_is_that_of_its_optimum(pair, bound):
    """Token by token: -log pi* summed over demonstrations, pi* ∝ sft exp(rho / beta)."""
    base, sft = pair
    curve, plain = curve_of(pair, kl_coef=0.25, **bound), curve_of(pair, kl_coef=0.25)
    bounds = Bounds(bound.get("token_clip"), bound.get("plausibility"))
    total = 0.0
    with torch.no_grad():
        for example in HELD_OUT:
            ids = torch.tensor([example.prompt_ids + example.response_ids])
            start = len(example.prompt_ids) - 1
            logits = [m(input_ids=ids).logits[0, start:-1] for m in (base, sft)]
            best = extrapolate(*logits, 5.0, bounds)
            total -= float(best.gather(1, torch.tensor(example.response_ids)[:, None]).sum())
    assert curve["nll_recipe"] == pytest.approx(total / len(HELD_OUT), rel=1e-4)
    assert curve["nll_recipe"] != pytest.approx(plain["nll_recipe"], rel=1e-2)
    for key in ("nll_base", "nll_sft"):
        assert curve[key] == pytest.approx(plain[key], rel=1e-5)


def test_the_best_lambda_is_the_lowest_point(pair):
    curve = curve_of(pair)
    assert curve["nll"][curve["lams"].index(curve["lam_star"])] == min(curve["nll"])


def test_the_curve_does_not_depend_on_the_batches(pair):
    whole, cut = curve_of(pair), curve_of(pair, max_tokens_per_batch=8)
    assert cut["nll"] == pytest.approx(whole["nll"], rel=1e-5)


# --- separation and single tokens -----------------------------------------------------------------


def test_auc_is_the_share_of_pairs_ranked_rightly():
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])) == 1.0
    assert auc(torch.tensor([0.0]), torch.tensor([1.0])) == 0.0
    assert auc(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    # 3 above 1 and 2, 1 above nothing and level with 1: (2 + 0.5) / 4
    assert auc(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])) == pytest.approx(2.5 / 4)


def test_auc_is_mann_whitneys_u():
    torch.manual_seed(0)
    a, b = torch.randn(40).round(decimals=1) + 0.3, torch.randn(30).round(decimals=1)
    u = mannwhitneyu(a.numpy(), b.numpy()).statistic
    assert auc(a, b) == pytest.approx(u / (40 * 30), abs=1e-6)


def test_top_tokens_by_hand():
    """Token 2 carries 5 of 10 nats, with both signs; padding carries none."""
    y = Sequences.of([[1], [1]], [[2, 3, 2], [4, 2]])
    ratios = torch.tensor([[3.0, -2.0, -1.0], [3.0, 1.0, 99.0]])
    found = top_tokens(y, ratios * y.mask, tiny.tokenizer(), n=2)
    assert [(t["id"], t["token"], t["count"]) for t in found] == [(2, "a", 3), (4, "c", 1)]
    assert [t["mean"] for t in found] == pytest.approx([1.0, 3.0])
    assert [t["share"] for t in found] == pytest.approx([0.5, 0.3])


# --- warnings -------------------------------------------------------------------------------------


def findings(
    auc_sft=0.9,
    auc_demos=0.95,
    share=0.2,
    corr=0.1,
    star=4.0,
    nll_sft=3.0,
    nll_recipe=2.0,
    earned=1.0,
    cut_off=0.0,
    prompts=100,
):
    return {
        "prompts": prompts,
        "separation": {"sft_vs_base_auc": auc_sft, "demonstrations_vs_base_auc": auc_demos},
        "top_tokens": [{"token": "]", "id": 7, "count": 9, "mean": 0.3, "share": share}],
        "length_corr": {"demonstrations": 0.99, "sft": corr, "base": 0.99},
        "curve": {
            "lam_star": star,
            "lam_recipe": 6.0,
            "nll_sft": nll_sft,
            "nll_recipe": nll_recipe,
        },
        "reward": {"sft": {"mean": earned, "std": 2.0}, "demonstrations": {"mean": 1.5}},
        "cut_off": {"share": cut_off, "reward": 9.5 if cut_off else 0.0},
        "rounding": {"mean": 0.0, "max": 0.0},
    }


REASONS = {
    "the reward separates next to nothing": {"auc_sft": 0.55, "auc_demos": 0.52},
    "one token dominates the reward: ']'": {"share": 0.7},
    "the SFT model's own responses earn more": {"earned": 3.0},
    "60% of the SFT model's own responses are cut off": {"cut_off": 0.6},
    "19 held-out demonstrations are too few": {"prompts": 19},
    "length explains 64% of the reward's variance": {"corr": -0.8},
    "nothing is left to extrapolate": {"star": 1.0},
    "kl_coef=0.2 asks for lambda=6": {"nll_recipe": 3.5},
}


def test_nothing_is_said_where_nothing_is_wrong():
    assert warnings_from(findings(), PPOConfig()) == []


@pytest.mark.parametrize("reason", list(REASONS))
def test_each_reason_gives_its_warning_and_no_other(reason):
    said = warnings_from(findings(**REASONS[reason]), PPOConfig(kl_coef=0.2))
    assert len(said) == 1
    assert said[0].startswith(reason)


def test_several_reasons_give_several_warnings():
    every = {k: v for settings in REASONS.values() for k, v in settings.items()}
    assert (
        len(warnings_from(findings(**every), PPOConfig())) == 7
    )  # the last two exclude each other


def test_warnings_name_a_cure():
    for settings in REASONS.values():
        (warning,) = warnings_from(findings(**settings), PPOConfig())
        assert any(key in warning for key in ("sft.", "ppo.", "train SFT", "data."))


def test_demonstrations_that_stand_out_are_enough_separation():
    assert warnings_from(findings(auc_sft=0.5, auc_demos=0.9), PPOConfig()) == []


@pytest.mark.parametrize(
    ("ref", "cure"), [("sft", "ppo.kl_coef=0.5"), ("base", "ppo.kl_coef=0.33")]
)
def test_the_kl_coef_proposed_aims_at_the_best_lambda(ref, cure):
    """lambda* = 3: beta = 1/(3 - 1) past sft, 1/3 past base."""
    config = PPOConfig(kl_coef=0.1, kl_ref=ref)
    (warning,) = warnings_from(findings(star=3.0, nll_recipe=9.0), config)
    assert cure in warning


@pytest.mark.parametrize("star", [1.25, 3.0, 11.0])
@pytest.mark.parametrize("ref", ["sft", "base"])
def test_the_beta_found_has_its_optimum_at_the_best_lambda(ref, star):
    """Where a response is one token, pi* of that beta is the extrapolation to lambda*."""
    beta = with_found_beta(PPOConfig(kl_coef="auto", kl_ref=ref), findings(star=star)).beta
    base, sft = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1)
    best, _ = optimum(sft, base, beta, ref)
    torch.testing.assert_close(best, extrapolate(base, sft, star))


@pytest.mark.parametrize("swapped", [False, True])
def test_with_auto_the_recipe_aims_at_the_best_lambda(pair, swapped):
    """From sft to base the same demonstrations are likeliest on the other side of 1."""
    curve = curve_of(pair[::-1] if swapped else pair, kl_coef="auto")
    assert curve["lams"] == LAMBDAS
    assert curve["lam_recipe"] == curve["lam_star"]
    assert curve["nll_recipe"] == min(curve["nll"])
    assert (curve["beta_star"] is None) == (curve["lam_star"] <= 1)


@pytest.mark.parametrize("star", [0.5, 1.0])
def test_no_beta_is_found_where_nothing_is_left_to_extrapolate(star):
    with pytest.raises(ConfigError, match=f"lambda={star:g}.*Keep the SFT model"):
        with_found_beta(PPOConfig(kl_coef="auto"), findings(star=star))


def test_more_than_demonstrations_within_the_noise_of_so_few_samples_is_nothing():
    """Two standard errors of 100 with a deviation of 2 are 0.4, and demonstrations earn 1.5."""
    assert warnings_from(findings(earned=1.85), PPOConfig()) == []


def test_samples_that_ramble_on_and_earn_by_it_name_the_penalty():
    (warning,) = warnings_from(findings(earned=4.0, cut_off=0.4), PPOConfig())
    assert (
        "the 40% that are cut off earn +9.50: set ppo.missing_eos_penalty to 8 or more" in warning
    )
    (warning,) = warnings_from(findings(earned=4.0), PPOConfig())
    assert "cut off" not in warning


@pytest.mark.parametrize(("corr", "word"), [(0.9, "longer"), (-0.9, "shorter")])
def test_the_direction_in_which_length_would_drift_is_named(corr, word):
    (warning,) = warnings_from(findings(corr=corr), PPOConfig())
    assert word in warning


# --- the whole audit ------------------------------------------------------------------------------


def whole(base, sft, **settings):
    return audit(
        base,
        sft,
        tiny.tokenizer("a b c d e f"),
        HELD_OUT,
        PPOConfig(**settings),
        max_response_tokens=3,
        seed=0,
        reporter=Reporter(quiet=True),
    )


def test_the_mean_reward_of_demonstrations_is_the_nll_that_sft_saved(pair):
    found = whole(*pair)
    saved = found["curve"]["nll_base"] - found["curve"]["nll_sft"]
    assert found["reward"]["demonstrations"]["mean"] == pytest.approx(saved, rel=1e-4)


def test_the_rewards_looked_at_are_bounded_as_the_recipes(pair):
    plain, clipped = whole(*pair), whole(*pair, token_clip=0.1)
    assert 0 < clipped["reward"]["demonstrations"]["mean"] <= 0.3  # three tokens at most
    assert plain["reward"]["demonstrations"]["mean"] > 0.3
    assert clipped["rounding"] == plain["rounding"]


def test_sft_samples_score_above_base_samples(pair):
    """In expectation the difference is KL(sft||base) + KL(base||sft), which is never negative."""
    found = whole(*pair)
    assert found["prompts"] == len(HELD_OUT)
    assert found["reward"]["sft"]["mean"] > 0 > found["reward"]["base"]["mean"]
    assert found["separation"]["sft_vs_base_auc"] > 0.6


def test_every_response_is_in_the_histograms(pair):
    found = whole(*pair)
    for distribution in found["reward"].values():
        assert sum(distribution["histogram"]["counts"]) == len(HELD_OUT)
        levels = list(distribution["quantiles"].values())
        assert levels == sorted(levels)
        edges = distribution["histogram"]["edges"]
        assert edges[0] <= levels[0]
        assert levels[-1] <= edges[-1]


def test_samples_that_were_cut_off_are_counted(pair):
    """At most three tokens: sampled again with the same seed, and looked at."""
    base, sft = pair
    eos = tiny.tokenizer("a b c d e f").eos_token_id
    sampler = HFSampler(sft, eos_token_id=eos, max_new_tokens=3, max_tokens_per_batch=BUDGET)
    y = sampler.sample([e.prompt_ids for e in HELD_OUT], 0)
    ratios = score(sft, y.sequences, BUDGET) - score(base, y.sequences, BUDGET)
    rewards = [
        float(row[: int(n)].sum()) for row, n in zip(ratios, y.sequences.lengths, strict=True)
    ]
    lost = [r for r, ended in zip(rewards, y.ended.tolist(), strict=True) if not ended]
    assert 0 < len(lost) < len(HELD_OUT)
    found = whole(base, sft)["cut_off"]
    assert found["share"] == len(lost) / len(HELD_OUT)
    assert found["reward"] == pytest.approx(sum(lost) / len(lost), rel=1e-5)


def test_findings_are_json_and_the_same_for_the_same_seed(pair):
    found = whole(*pair)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert whole(*pair) == found


def test_an_sft_model_that_did_not_move_is_found_out(pair):
    """All rewards are zero: no division by zero, and a warning that says so."""
    base, _ = pair
    found = whole(base, base)
    assert found["separation"] == {"sft_vs_base_auc": 0.5, "demonstrations_vs_base_auc": 0.5}
    assert found["warnings"][0].startswith("the reward separates next to nothing")
    json.dumps(found, allow_nan=False)


def test_float32_models_have_no_rounding_error(pair):
    assert whole(*pair)["rounding"] == {"mean": 0.0, "max": 0.0}


def test_the_rounding_error_is_that_of_the_reward_of_each_demonstration(pair):
    """By hand: sums of sft - base in bfloat16 against the same weights in float32."""
    half = [copy.deepcopy(m).bfloat16() for m in pair]
    found = whole(*half)["rounding"]
    y = Sequences.of([e.prompt_ids for e in HELD_OUT[:8]], [e.response_ids for e in HELD_OUT[:8]])
    base, sft = (score(m, y, BUDGET) for m in half)
    base32, sft32 = (score(copy.deepcopy(m).float(), y, BUDGET) for m in half)
    errors = ((sft - base) - (sft32 - base32)).sum(1).abs()
    assert found["mean"] == pytest.approx(float(errors.mean()), rel=1e-3)
    assert found["max"] == pytest.approx(float(errors.max()), rel=1e-3)
    assert 0 < found["mean"] < 0.2


def test_where_there_is_no_room_for_a_float32_copy_the_audit_goes_on_without(pair, monkeypatch):
    half = [copy.deepcopy(m).bfloat16() for m in pair]

    def full(model):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for model in half:
        monkeypatch.setattr(model, "__deepcopy__", full, raising=False)
    found = whole(*half)
    assert found["rounding"] is None
    assert not any("rounding" in warning for warning in found["warnings"])


def test_rounding_that_rivals_the_rewards_spread_is_warned_of():
    harmless, harmful = ({"mean": x, "max": x} for x in (0.01, 0.5))
    assert not warnings_from({**findings(), "rounding": harmless}, PPOConfig())
    (warning,) = warnings_from({**findings(), "rounding": harmful}, PPOConfig())
    assert "model.dtype=float32" in warning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "quiet"),
    [([], True), (["sft.optimizer=adamw", "sft.learning_rate=3e-4"], False)],
    ids=["sgd", "adamw"],
)
def test_on_the_miniature_the_audit_is_quiet_after_sgd_and_warns_after_adamw(
    overrides, quiet, tmp_path
):
    """Its recipe: gentle SFT leaves a reward worth climbing, AdamW's leaves one that misleads."""
    from pathlib import Path

    from srppo.pipeline import Run

    path = Path(__file__).parents[2] / "recipes" / "miniature.yaml"
    recipe = load_recipe(path, [f"output_dir={tmp_path}/run", *overrides])
    run = Run(recipe, Reporter(quiet=True))
    with pytest.raises(SrppoError, match="srppo sft"):
        run.audit()
    run.sft()
    found = run.audit()
    if quiet:
        assert found["warnings"] == []
    else:
        assert any("lambda" in warning for warning in found["warnings"])


@pytest.mark.parametrize("other", [{"reward": "mean"}, {"token_clip": 1.0, "kl_ref": "base"}])
def test_lambda_is_not_judged_where_kl_coef_alone_does_not_decide_it(other):
    assert warnings_from(findings(nll_recipe=3.5), PPOConfig(kl_coef=0.2, **other)) == []


def test_less_extrapolation_than_the_curve_supports_is_no_reason_to_warn():
    """kl_ref=base with kl_coef=2 aims at lambda=0.5, before the SFT model: NLL is higher there."""
    found = findings(nll_recipe=3.5)
    found["curve"]["lam_recipe"] = 0.5
    assert warnings_from(found, PPOConfig(kl_coef=2.0, kl_ref="base")) == []
