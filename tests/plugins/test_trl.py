"""The coherent reward inside TRL's own trainers, which really train."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from enumerable import EOS, LENGTH, PROMPTS, VOCAB, exact, fine_tuned, tiny_llama
from serving import columns, serving
from srppo.errors import ConfigError
from srppo.plugins.client import RewardClient
from srppo.plugins.trl import CoherentReward
from srppo.serve.scorer import CoherentScorer

TRAINERS = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """The words "1" to "7" for the ids 1 to 7 of the enumerable problem; 0 is EOS."""
    vocabulary = {"<eos>": EOS} | {str(i): i for i in range(1, VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = template
    return made


@pytest.fixture
def problem():
    base = tiny_llama(seed=0)
    return base, fine_tuned(base, seed=0)


def trainer(
    folder: Path, model, reward, kind: str = "rloo", prompts=None, callbacks=None,
    template: str | None = None, **settings,
):  # fmt: skip
    """TRL's, on the CPU, saying and saving nothing."""
    made, config = TRAINERS[kind]
    model.save_pretrained(folder / "sft")  # TRL loads the reference from where the policy is from
    prompts = prompts or [" ".join(map(str, prompt)) for prompt in PROMPTS]
    usual = {
        "output_dir": str(folder),
        "beta": 0.5,
        "max_completion_length": LENGTH,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    if kind == "grpo":
        usual["scale_rewards"] = "none"
    return made(
        model=str(folder / "sft"),
        reward_funcs=reward,
        callbacks=[reward] if callbacks is None else callbacks,
        args=config(**usual | settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(template),
    )


class Remembering:
    """A scorer that keeps what it was asked and what it said."""

    def __init__(self, scorer) -> None:
        self.scorer = scorer
        self.asked: list[tuple[list[int], list[int]]] = []
        self.said: list[list[float]] = []

    def score(self, prompts, responses):
        self.asked += zip(prompts, responses, strict=True)
        self.said += self.scorer.score(prompts, responses)
        return self.said[-len(prompts) :]


@torch.no_grad()
def log_ratio(sft, base, prompt: list[int], response: list[int]) -> float:
    """By plain forwards."""
    ids = torch.tensor([prompt + response])
    both = [
        model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        .gather(1, torch.tensor(response)[:, None]).sum()
        for model in (sft, base)
    ]  # fmt: skip
    return float(both[0] - both[1])


@pytest.mark.parametrize("kind", TRAINERS)
def test_trl_scores_what_it_sampled_eos_included(kind, problem, tmp_path):
    base, sft = problem
    scorer = Remembering(CoherentScorer(base, sft, tokenizer()))
    seen = []

    class Reward(CoherentReward):
        def __call__(self, prompts, completion_ids, **columns):
            rewards = super().__call__(prompts, completion_ids, **columns)
            seen.extend(zip(prompts, completion_ids, rewards, strict=True))
            return rewards

    made = trainer(tmp_path, sft, Reward(scorer), kind)
    made.train()
    assert len(seen) == 16
    for prompt, completion, reward in seen:
        assert reward == pytest.approx(log_ratio(sft, base, [int(prompt)], completion), abs=1e-5)
        assert completion[-1] == EOS or len(completion) == LENGTH
        assert EOS not in completion[:-1]
    assert any(completion[-1] == EOS for _, completion, _ in seen)
    logged = made.state.log_history[0]["rewards/coherent/mean"]
    assert logged == pytest.approx(sum(r for *_, r in seen) / 16, abs=1e-5)


def test_a_server_is_as_good_as_models_in_the_process(problem, tmp_path):
    base, sft = problem
    scorer = CoherentScorer(base, sft, tokenizer())
    with serving(scorer, token="secret") as client:
        remote = Remembering(RewardClient(str(client.base_url).rstrip("/"), "secret"))
        trainer(tmp_path, sft, CoherentReward(remote)).train()
    assert len(remote.asked) == 16
    here = CoherentScorer(base, sft, tokenizer()).score(*columns(remote.asked))
    for there, local in zip(remote.said, here, strict=True):
        assert there == pytest.approx(local, abs=1e-5)


# --- what is refused before anything is trained --------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("rloo", {"beta": 0.0}, "beta=0.0: without a KL penalty"),
        ("rloo", {"beta": 0.05}, "the engine's default"),
        ("grpo", {"beta": 0.0}, "beta=0.0: without a KL penalty"),
        ("rloo", {"reward_clip_range": (-10.0, 10.0)}, "reward_clip_range=.* Leave it at None"),
        ("rloo", {"temperature": 0.7}, "temperature=0.7.* Set temperature=1.0"),
        ("rloo", {"top_p": 0.9}, "top_p=0.9"),
        ("rloo", {"top_k": 50}, "top_k=50"),
        ("rloo", {"min_p": 0.1}, "min_p=0.1"),
        ("rloo", {"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ("rloo", {"generation_kwargs": {"temperature": 0.5}}, "temperature=0.5"),
        ("rloo", {"sync_ref_model": True}, "sync_ref_model=True"),
        ("grpo", {"scale_rewards": "group"}, "scale_rewards=group"),
    ],
)
def test_settings_that_lead_elsewhere_are_refused(kind, settings, told, problem, tmp_path):
    base, sft = problem
    reward = CoherentReward(CoherentScorer(base, sft, tokenizer()))
    with pytest.raises(ConfigError, match=told):
        trainer(tmp_path, sft, reward, kind, **settings)


def test_a_reward_that_is_no_callback_is_refused(problem, tmp_path):
    base, sft = problem
    reward = CoherentReward(CoherentScorer(base, sft, tokenizer()))
    made = trainer(tmp_path, sft, reward, callbacks=[])
    with pytest.raises(ConfigError, match=r"callbacks=\[reward\]"):
        made.train()


CHAT = "{% for m in messages %}{{ m['content'] }} {% if shout %}7 {% endif %}{% endfor %}"


@pytest.mark.parametrize("shout", [False, True])
def test_conversations_are_rendered_as_trl_does(shout, problem, tmp_path):
    base, sft = problem
    scorer = Remembering(CoherentScorer(base, sft, tokenizer()))
    prompts = [[{"role": "user", "content": f"{i} 3"}] for i in range(1, 5)]
    made = trainer(
        tmp_path, sft, CoherentReward(scorer), prompts=prompts,
        chat_template_kwargs={"shout": shout}, template=CHAT,
    )  # fmt: skip
    made.train()
    assert {tuple(prompt) for prompt, _ in scorer.asked} == {
        (i, 3, 7) if shout else (i, 3) for i in range(1, 5)
    }


def test_prompts_that_are_not_what_the_policy_read_are_refused(problem, tmp_path, monkeypatch):
    """As tools and documents in a template would make it."""
    base, sft = problem
    made = trainer(tmp_path, sft, CoherentReward(CoherentScorer(base, sft, tokenizer())))
    own = made._tokenize_prompts

    def longer(prompts):
        ids, *rest = own(prompts)
        return [[5, *row] for row in ids], *rest

    monkeypatch.setattr(made, "_tokenize_prompts", longer)
    with pytest.raises(ConfigError, match="not what the policy read"):
        made.train()


def test_completions_without_their_end_are_refused(problem, tmp_path, monkeypatch):
    base, sft = problem
    made = trainer(tmp_path, sft, CoherentReward(CoherentScorer(base, sft, tokenizer())))
    own = made._generate_single_turn
    monkeypatch.setattr(
        made,
        "_generate_single_turn",
        lambda *a: [[i for i in ids if i != EOS] or [1] for ids in own(*a)],
    )
    with pytest.raises(ConfigError, match="lack the decision to end"):
        made.train()


# --- and it learns -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kl_coef", [0.5, pytest.param(0.2, marks=pytest.mark.full)])
def test_trl_reaches_the_enumerated_optimum(kl_coef, problem, tmp_path, capsys):
    """As `test_learns.py` asks of our own RLOO: 100 steps of 512 rollouts, four passes each."""
    base, sft = problem
    reward = CoherentReward(CoherentScorer(base, sft, tokenizer()))
    made = trainer(
        tmp_path, sft, reward,
        prompts=[str(p) for (p,) in PROMPTS] * 16,
        beta=kl_coef,
        per_device_train_batch_size=256,
        steps_per_generation=2,
        num_generations=8,
        num_iterations=4,
        max_steps=800,
        learning_rate=1.5e-3,
        lr_scheduler_type="cosine",
        normalize_advantages=True,
        logging_steps=100,
    )  # fmt: skip
    made.train()
    found = exact(made.model.eval(), sft, base, kl_coef)
    with capsys.disabled():
        print(
            f"\nTRL RLOO kl_coef={kl_coef}: gap closed {found.gap_closed:.4f}, KL(policy||optimum) "
            f"{found.kl_to_optimum:.4f} nats, J {found.j_sft:.3f} -> {found.j_policy:.3f} of "
            f"{found.j_star:.3f}"
        )
    assert found.j_policy <= found.j_star + 1e-4
    assert found.gap_closed >= 0.99
    assert found.kl_to_optimum <= 0.03


def test_the_code_of_the_document(tmp_path, problem, monkeypatch):
    """docs/plugins.md, with models and prompts of this file."""
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name, model in zip(("my-base", "my-sft"), problem, strict=True):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {"prompts": Dataset.from_dict({"prompt": ["1 2", "3"] * 8})}
    exec(code.replace("RLOOConfig(", "RLOOConfig(use_cpu=True, bf16=False, "), names)
    assert names["trainer"].reward_funcs == [names["reward"]]
