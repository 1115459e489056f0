"""SPIN against TRL's DPOTrainer, GSIL against plain forwards, and that a round learns."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import tiny
from runs import timeless
from sittings import at_call
from srppo.algo.imitation import pair_losses
from srppo.baselines.pairs import make_pairs, train_pairs
from srppo.config_checkpoint import CheckpointConfig
from srppo.config_controls import PairsConfig
from srppo.data.chat import Example
from srppo.errors import RunDirError
from srppo.models.batching import Sequences
from srppo.models.roles import Role
from srppo.progress import Reporter
from srppo.rollout.hf import HFSampler
from srppo.rollout.sampler import Rollout
from srppo.train.metrics import MetricsLog
from srppo.train.steps import Keeper

WORDS = " ".join(f"w{i}" for i in range(2, tiny.VOCAB))
"""Every id of the tiny models but EOS and unknown is a word."""


def draw(n, seed):
    """Prompts and responses that end with EOS, of ids that are words."""
    generator = torch.Generator().manual_seed(seed)

    def ids():
        length = int(torch.randint(1, 6, (), generator=generator))
        return torch.randint(2, tiny.VOCAB, (length,), generator=generator).tolist()

    return [(ids(), [*ids(), tiny.EOS]) for _ in range(n)]


EXAMPLES = [Example(prompt, response) for prompt, response in draw(6, seed=0)]
OWN = [response for _, response in draw(6, seed=1)]


class Fixed(HFSampler):
    """Always the same responses, the same for each round."""

    def sample(self, prompts, seed, temperature=1.0, progress=lambda n: None):
        y = Sequences.of(prompts, OWN)
        zeros = torch.zeros(y.mask.shape)
        return Rollout(y, zeros, torch.ones(len(y), dtype=torch.bool))


def sampler(model, kind=HFSampler):
    return kind(model, eos_token_id=tiny.EOS, max_new_tokens=6)


def train(tmp_path, model, kind=HFSampler, examples=EXAMPLES, seed=0, **settings):
    """Trains in place; the log's lines."""
    policy = Role(model.requires_grad_(True))
    with MetricsLog(tmp_path, "pairs") as log:
        train_pairs(
            policy,
            sampler(policy, kind),
            examples,
            PairsConfig(**settings),
            seed=seed,
            log=log,
            reporter=Reporter(quiet=True),
        )
    text = (tmp_path / "metrics/pairs.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


ONE_STEP = {
    "epochs": 1, "batch_size": 6, "micro_batch_size": 4, "learning_rate": 1e-3,
    "max_grad_norm": 1e9, "scale": 0.3,
}  # fmt: skip


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_spin_is_trls_dpo_with_the_demonstration_chosen(tmp_path):
    """Two steps on the same pairs. AdamW makes a step of the rounding of gradients near 0, so that
    weights are compared all together."""
    ours, theirs = tiny.model(), tiny.model()
    lines = train(tmp_path, ours, Fixed, **{**ONE_STEP, "epochs": 2})

    tokenizer = tiny.tokenizer(WORDS)
    text = [" ".join(tokenizer.convert_ids_to_tokens(e.prompt_ids)) for e in EXAMPLES]
    chosen = [" " + " ".join(tokenizer.convert_ids_to_tokens(e.response_ids)) for e in EXAMPLES]
    rejected = [" " + " ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in OWN]
    rows = [
        {"prompt": p, "chosen": c, "rejected": r}
        for p, c, r in zip(text, chosen, rejected, strict=True)
    ]
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.3, learning_rate=1e-3, num_train_epochs=2,
        per_device_train_batch_size=6, lr_scheduler_type="constant", max_grad_norm=1e9,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, weight_decay=0.0,
        optim="adamw_torch",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = DPOTrainer(
            model=theirs, ref_model=tiny.model(), args=arguments,
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()

    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in lines] == pytest.approx(logged, abs=2e-4)
    moved, apart = weights(ours) - weights(tiny.model()), weights(ours) - weights(theirs)
    assert apart.norm() < 2e-3 * moved.norm()
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["spin", "logistic", "brier", "hinge", "kliep", "lsif"])
def test_a_step_follows_the_gradient_of_plain_unpadded_forwards(loss, tmp_path):
    trained = tiny.model()
    settings = {**ONE_STEP, "loss": loss, "shift": 0.2, "optimizer": "sgd"}
    (line,) = train(tmp_path, trained, Fixed, **settings)

    model = tiny.model()
    log_ratios = []
    for example, own in zip(EXAMPLES, OWN, strict=True):
        for response in (example.response_ids, own):
            ids = torch.tensor([example.prompt_ids + response])
            logits = model(ids).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(-1)
            logprob = logits.gather(1, torch.tensor(response)[:, None]).sum()
            log_ratios.append(logprob - logprob.detach())
    data, own = torch.stack(log_ratios).view(-1, 2).T
    value = pair_losses(data, own, loss, 0.3, 0.2).mean()
    value.backward()
    assert line["loss"] == pytest.approx(value.item(), abs=1e-5)
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert line["grad_norm"] == pytest.approx(grad.norm().item(), rel=1e-4)
    moved = weights(trained) - weights(tiny.model())
    torch.testing.assert_close(moved, -1e-3 * grad, atol=1e-6, rtol=1e-3)


def test_pairs_are_the_demonstrations_and_what_the_sampler_said():
    model = tiny.model()
    pairs = make_pairs(sampler(model), EXAMPLES, seed=7)
    said = sampler(model).sample([e.prompt_ids for e in EXAMPLES], 7).sequences
    rows = [tiny.row(pairs, i) for i in range(len(pairs))]
    assert rows[:6] == [(e.prompt_ids, e.response_ids) for e in EXAMPLES]
    assert rows[6:] == [tiny.row(said, i) for i in range(6)]


def test_a_round_begins_with_responses_and_a_reference_of_the_model_as_it_is_then(tmp_path):
    """At the first step of each round pi is pi_ref: SPIN's loss is log 2, nothing is told apart."""
    lines = train(tmp_path, tiny.model(), rounds=3, epochs=2, batch_size=6, learning_rate=1e-2)
    assert [line["round"] for line in lines] == [1, 1, 2, 2, 3, 3]
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)
        assert first["data_log_ratio"] == pytest.approx(0, abs=1e-4)
        assert second["loss"] < first["loss"]
        assert second["data_log_ratio"] > second["own_log_ratio"]


def test_rounds_make_the_demonstrations_likely(tmp_path):
    model = tiny.model()
    train(
        tmp_path, model, rounds=8, epochs=5, batch_size=6, learning_rate=1e-2, loss="logistic",
        scale=1.0,
    )  # fmt: skip

    def mean(m):
        return sum(
            tiny.plain_logprobs(m, e.prompt_ids, e.response_ids).sum().item() for e in EXAMPLES
        ) / len(EXAMPLES)

    assert mean(tiny.model()) < -12
    assert mean(model) > -4


def test_microbatches_change_nothing_and_a_seed_decides_everything(tmp_path):
    settings = {"rounds": 2, "batch_size": 4, "learning_rate": 1e-3}
    found = []
    for name, seed, micro in (("a", 1, 4), ("b", 1, 4), ("c", 1, 1), ("d", 2, 4)):
        model = tiny.model()
        (tmp_path / name).mkdir()
        train(tmp_path / name, model, seed=seed, micro_batch_size=micro, **settings)
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], atol=1e-4, rtol=0)
    assert not torch.equal(found[0], found[3])


# --- cut off --------------------------------------------------------------------------------------

IN_FOUR = {"rounds": 2, "epochs": 2, "batch_size": 4, "learning_rate": 1e-2}
"""Four steps a round."""


def sitting(run, model, seed=1, examples=EXAMPLES, **settings):
    """Trains on from the last checkpoint, one after each step."""
    run.mkdir(exist_ok=True)
    keeper = Keeper(run, "pairs", CheckpointConfig(every=1), Reporter(quiet=True))
    policy = Role(model.requires_grad_(True))
    with MetricsLog(run, "pairs", keeper.metrics) as log:
        train_pairs(
            policy, sampler(policy), examples, PairsConfig(**{**IN_FOUR, **settings}), seed=seed,
            log=log, reporter=Reporter(quiet=True), keeper=keeper,
        )  # fmt: skip
    return weights(model), timeless(run / "metrics/pairs.jsonl")


class Killed(BaseException):
    pass


def kill():
    raise Killed


@pytest.mark.parametrize("step", range(1, 9))
def test_cut_off_in_any_step_it_goes_on_to_the_same_end(tmp_path, monkeypatch, step):
    expected = sitting(tmp_path / "whole", tiny.model())
    with monkeypatch.context() as patch:
        at_call(patch, "srppo.train.steps.Steps.begin_update", step, kill)
        with pytest.raises(Killed):
            sitting(tmp_path / "cut", tiny.model())
    sampled = []
    monkeypatch.setattr("srppo.baselines.pairs.make_pairs", counted(sampled))
    found = sitting(tmp_path / "cut", tiny.model())
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    # Responses of a round that had begun are those it began with.
    assert len(sampled) == (2 if step == 1 else 1 if step <= 5 else 0)


def counted(calls):
    def called(*args):
        calls.append(args)
        return make_pairs(*args)

    return called


def test_what_was_trained_on_other_pairs_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, "srppo.train.steps.Steps.begin_update", 3, kill)
        with pytest.raises(Killed):
            sitting(tmp_path / "cut", tiny.model())
    with pytest.raises(RunDirError, match=r"6 pairs, there are 5.*--fresh"):
        sitting(tmp_path / "cut", tiny.model(), examples=EXAMPLES[:5])
