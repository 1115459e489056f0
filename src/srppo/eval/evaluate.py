"""Measure a model on prompts: score, length, EOS rate and reward of its responses."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo import distributed
from srppo.algo.masking import masked_sum
from srppo.algo.reward import UNBOUNDED, Bounds
from srppo.data.chat import Example
from srppo.data.prompts import Prompt
from srppo.data.reporting import token_texts
from srppo.errors import ConfigError, SrppoError
from srppo.models.batching import Sequences
from srppo.models.roles import Role
from srppo.models.scoring import score
from srppo.rollout.hf import HFSampler, Progress
from srppo.rollout.sampler import Rollout

Row = dict[str, Any]
Scorer = Callable[[list[Row], list[str], list[bool]], dict[str, list[float]]]
"""score(rows, responses, ended) -> {name: one number a response}"""


@dataclass(frozen=True)
class Evaluator:
    """Fixed prompts, a fixed seed and a scorer: measures one model after another, alike."""

    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    max_new_tokens: int
    seed: int
    base: Role | PreTrainedModel
    sft: Role | PreTrainedModel
    max_tokens_per_batch: int
    scorer: Scorer | None = None

    @property
    def groups(self) -> list[str]:
        """Names of the prompts' groups, sorted; `all` if they have none."""
        return sorted({_group(p) for p in self.prompts})

    def sampler(
        self,
        model: Role | PreTrainedModel,
        base: Role | PreTrainedModel | None = None,
        lam: float = 1.0,
        bounds: Bounds = UNBOUNDED,
    ) -> HFSampler:
        """Samples from `model`, or from base·(model/base)^lam."""
        return HFSampler(
            model,
            eos_token_id=self.tokenizer.eos_token_id,
            max_new_tokens=self.max_new_tokens,
            max_tokens_per_batch=self.max_tokens_per_batch,
            base=base,
            lam=lam,
            bounds=bounds,
        )

    def measure(
        self,
        sampler: HFSampler,
        temperature: float,
        samples: int = 1,
        progress: Progress = lambda n: None,
    ) -> list[Row]:
        """One row a group: n prompts, mean scores, response length, EOS rate, reward in nats.

        `n` counts prompts, not samples: several samples of one prompt are not independent.
        """
        if not self.prompts:
            return []
        samples = 1 if temperature == 0 else samples
        prompts = [p for p in self.prompts for _ in range(samples)]
        rollout = sampler.sample([p.ids for p in prompts], self.seed, temperature, progress)
        columns = self.columns(prompts, rollout)
        rows = []
        for group in self.groups:
            members = torch.tensor([_group(p) == group for p in prompts])
            means = {k: float(v[members].mean()) for k, v in columns.items()}
            rows.append(
                {
                    "group": group,
                    "n": int(members.sum()) // samples,
                    "scores": {k[6:]: v for k, v in means.items() if k.startswith("score/")},
                    **{k: v for k, v in means.items() if not k.startswith("score/")},
                }
            )
        return rows

    def columns(self, prompts: list[Prompt], rollout: Rollout) -> dict[str, torch.Tensor]:
        """One (N,) tensor for everything measured on each response."""
        y = rollout.sequences
        texts = decode(self.tokenizer, y)
        reward = masked_sum(self.log_ratios(y), y.mask, dim=1)
        columns = {
            "response_length": y.lengths.float(),
            "eos_rate": rollout.ended.float(),
            "reward": reward,
        }
        if self.scorer:
            rows = [{**p.meta, "prompt": p.text} for p in prompts]
            for name, values in _scores(self.scorer, rows, texts, rollout.ended.tolist()).items():
                if len(values) != len(texts):
                    raise ConfigError(
                        f"eval.scorer returned {len(values)} values of {name!r} for {len(texts)} "
                        "responses: they cannot be matched. Return one number for each response."
                    )
                columns[f"score/{name}"] = torch.tensor(values)
        return columns

    def log_ratios(self, y: Sequences) -> torch.Tensor:
        """(N, T) log pi_sft - log pi_base in nats, zero at padding."""
        budget = self.max_tokens_per_batch
        return score(self.sft, y, budget) - score(self.base, y, budget)

    def side_by_side(self, models: dict[str, HFSampler], n: int) -> list[Row]:
        """The first n prompts, groups in turn, each with every model's response, token by token."""
        by_group = [[p for p in self.prompts if _group(p) == g] for g in self.groups]
        turns = itertools.zip_longest(*by_group)
        prompts = [p for turn in turns for p in turn if p is not None][:n]
        if not prompts:
            return []
        rows: list[Row] = [{"prompt": p.text, "group": _group(p), "responses": {}} for p in prompts]
        for name, sampler in models.items():
            rollout = sampler.sample([p.ids for p in prompts], self.seed)
            y, ratios = rollout.sequences, self.log_ratios(rollout.sequences)
            columns = self.columns(prompts, rollout)
            for i, row in enumerate(rows):
                ids = y.response_ids[i][y.mask[i]].tolist()
                pieces = token_texts(self.tokenizer, ids)
                row["responses"][name] = {
                    "tokens": [
                        {"text": text, "log_ratio": round(value, 4)}
                        for text, value in zip(pieces, ratios[i].tolist(), strict=False)
                    ],
                    "reward": float(columns["reward"][i]),
                    "truncated": not bool(rollout.ended[i]),
                    "scores": {
                        k[6:]: float(v[i]) for k, v in columns.items() if k.startswith("score/")
                    },
                }
        return rows


def held_out_nll(model: Role | PreTrainedModel, examples: list[Example], max_tokens: int) -> float:
    """Mean over demonstrations of -log pi(y|x), nats a response."""
    y = Sequences.of([e.prompt_ids for e in examples], [e.response_ids for e in examples])
    return -float(score(model, y, max_tokens).sum()) / len(examples)


def decode(tokenizer: PreTrainedTokenizerBase, y: Sequences) -> list[str]:
    """N response texts without special tokens."""
    return [
        tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True)
        for ids, mask in zip(y.response_ids, y.mask, strict=True)
    ]


def load_scorer(name: str) -> Scorer:
    """`python:module:function` or `python:file.py:function`.

    Raises:
        ConfigError: not of that form, or not there.
    """
    kind, _, rest = name.partition(":")
    module_name, _, function = rest.rpartition(":")
    if kind != "python" or not module_name or not function:
        raise ConfigError(
            f"eval.scorer={name!r} is not of the form python:module:function: responses cannot be "
            "scored. Write, for example, python:my_scores.py:score."
        )
    try:
        if module_name.endswith(".py"):
            alias = f"srppo_scorer_{Path(module_name).stem}"
            spec = importlib.util.spec_from_file_location(alias, module_name)
            if spec is None or spec.loader is None:
                raise ImportError(f"{module_name} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[alias] = module  # where dataclasses look for it
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
        scorer: Scorer = getattr(module, function)
    except Exception as e:  # importing runs the user's code, which can raise anything
        raise ConfigError(
            f"eval.scorer={name!r} cannot be loaded ({type(e).__name__}: {e}): responses cannot "
            "be scored. Give a module or file that Python can import, and a function in it."
        ) from e
    if not callable(scorer):
        raise ConfigError(
            f"eval.scorer={name!r} is {scorer!r:.40}, not a function: responses cannot be scored. "
            "Name a function score(rows, responses, ended)."
        )
    return scorer


def _scores(
    scorer: Scorer, rows: list[Row], texts: list[str], ended: list[bool]
) -> dict[str, list[float]]:
    try:
        scores = distributed.from_first(lambda: scorer(rows, texts, ended))
        return {name: [float(v) for v in values] for name, values in scores.items()}
    except SrppoError:
        raise
    except Exception as e:  # the user's code can raise anything
        place = traceback.extract_tb(e.__traceback__)[-1]
        raise ConfigError(
            f"eval.scorer failed at {place.filename}:{place.lineno} ({type(e).__name__}: {e}): "
            "responses cannot be scored. It is called as score(rows, responses, ended) and returns "
            "{name: [one number for each response]}."
        ) from e


def _group(prompt: Prompt) -> str:
    return str(prompt.meta.get("group", "all"))
