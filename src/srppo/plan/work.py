"""How much a run does: rows, tokens and steps, and the hours that they take on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from statistics import mean

from srppo.config import PPOConfig, Recipe, SFTConfig
from srppo.config_controls import PairsConfig
from srppo.config_data import SourceConfig
from srppo.data.chat import apply_template
from srppo.data.load import Data, read_data
from srppo.data.presets import PRESETS
from srppo.models.load import load_tokenizer
from srppo.models.precision import Compute
from srppo.plan.architecture import Architecture, local_directory
from srppo.plan.exchange import Exchange, Group
from srppo.plan.known import ROWS, Device
from srppo.plan.memory import BYTES
from srppo.train.cost import step_flops

SHARE = 0.4
"""Of the rate of matrix products that training and scoring reach: assumed."""
FILES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
CALL = 0.5e-3
"""Seconds that a layer takes for one more token of each response, however few: assumed."""


@dataclass(frozen=True)
class Work:
    """What a run does; None: not known here."""

    demonstrations: int | None
    prompts: int | None
    evaluated: int | None
    prompt_tokens: float
    """In the mean."""
    response_tokens: float
    longest: tuple[int, int] | None
    """Tokens of the longest demonstration with its prompt, and of stage 2's longest prompt."""
    origin: str
    """Where the numbers are from."""

    def sft_steps(self, config: SFTConfig) -> int | None:
        """Optimizer steps of stage 1."""
        n = self.demonstrations
        return None if n is None else config.epochs * math.ceil(n / config.batch_size)

    def ppo_steps(self, config: PPOConfig) -> int | None:
        """Steps of stage 2, those of the critic alone included."""
        per_step = config.rollouts_per_step // config.responses_per_prompt
        steps = config.steps or (self.prompts and math.ceil(self.prompts / per_step))
        extra = config.value_warmup_steps if config.estimator == "ppo" else 0
        return steps + extra if steps else None

    def pair_steps(self, config: PairsConfig) -> int | None:
        """Optimizer steps of a control on pairs."""
        n = self.demonstrations
        each = None if n is None else math.ceil(n / config.batch_size)
        return each and config.rounds * config.epochs * each


def work(recipe: Recipe) -> Work:
    """Counted where data and tokenizer are on this machine; else from what is known of the sets.

    Raises:
        SrppoError: data that is here and that the run could not use.
    """
    data, measured = recipe.data, recipe.eval.prompts
    sources = [*(data.demonstrations or []), *(data.prompts or [])]
    names = [s.source for s in sources] + ([measured] if measured else [])
    directory = local_directory(recipe.model.base)
    readable = directory and (Path(directory) / "tokenizer_config.json").is_file()
    if directory and readable and all(map(_is_here, names)):
        tokenizer = load_tokenizer(directory)
        apply_template(tokenizer)
        return _counted(read_data(recipe, tokenizer), recipe)
    rows, asked = _rows(data.demonstrations), _rows(data.prompts)
    trained = None if rows is None else max(0, rows - data.held_out)
    trained = _at_most(trained, data.demonstrations_limit)
    if data.stage_2_prompts == "same":
        asked = trained
    elif data.stage_2_prompts == "disjoint" and rows is not None and trained is not None:
        asked = rows - data.held_out - trained
    held_out = _at_most(rows, data.held_out)
    return Work(
        demonstrations=trained,
        prompts=_at_most(asked, data.prompts_limit),
        evaluated=_at_most(_known(measured) if measured else held_out, recipe.eval.limit),
        prompt_tokens=data.max_prompt_tokens / 2,
        response_tokens=data.max_response_tokens / 2,
        longest=None,
        origin="rows as the data sets' cards say, each with one response, none dropped. Lengths "
        "are not known here: half of data.max_prompt_tokens and data.max_response_tokens assumed",
    )


def _counted(data: Data, recipe: Recipe) -> Work:
    train = [(len(e.prompt_ids), len(e.response_ids)) for e in data.train]
    asked = [len(p.ids) for p in data.prompts]
    return Work(
        demonstrations=len(train),
        prompts=len(asked),
        evaluated=len(data.eval_prompts),
        prompt_tokens=mean([p for p, _ in train] + asked),
        response_tokens=mean(r for _, r in train) if train else recipe.data.max_response_tokens / 2,
        longest=(max((p + r for p, r in train), default=0), max(asked)),
        origin="counted on this machine; responses taken to be as long as the demonstrations'"
        if train
        else "counted on this machine; responses half of data.max_response_tokens, assumed",
    )


def _is_here(source: str) -> bool:
    """Or should be: what can only be a file is read, so that its absence is told."""
    place = source.split("=", 1)[-1]
    local = place.startswith(("python:", ".", "/", "~")) or Path(place).suffix in FILES
    return local or bool(glob(str(Path(place).expanduser())))


def _rows(sources: list[SourceConfig] | None) -> int | None:
    """Of all sources together; None if one is not known, or shares of them are asked for."""
    rows = [_at_most(_known(s.source), s.limit) for s in sources or []]
    known = [n for n in rows if n is not None]
    shares = any(s.weight for s in sources or [])
    return None if not rows or shares or len(known) < len(rows) else sum(known)


def _known(source: str) -> int | None:
    name = source.split("@")[0]
    return ROWS.get(PRESETS[name].source if name in PRESETS else name)


def _at_most(n: int | None, limit: int | None) -> int | None:
    return n if n is None or limit is None else min(n, limit)


@dataclass(frozen=True)
class Hours:
    """What a part takes; None: its amount of work is not known."""

    rollout: float = 0
    scoring: float = 0
    training: float = 0
    exchange: float = 0
    """Between processes, as if nothing of it happened during the rest."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.rollout + self.scoring + self.training + self.exchange


class Clock:
    """Hours of a recipe's parts on a device, or one for each of several processes. docs/plan.md has
    the formula in words."""

    def __init__(
        self,
        recipe: Recipe,
        sizes: Architecture,
        amount: Work,
        device: Device,
        group: Group | None = None,
    ) -> None:
        self.recipe, self.sizes, self.amount, self.device = recipe, sizes, amount, device
        self.group = group or Group()
        tokens = amount.prompt_tokens + amount.response_tokens
        self.exchange = Exchange(recipe, sizes, self.group.size, tokens)
        self.whole = recipe.model.lora is None
        self.lengths = [round(amount.prompt_tokens)], [max(1, round(amount.response_tokens))]

    def sft(self, config: SFTConfig) -> Hours | None:
        """Stage 1."""
        n = self.amount.demonstrations
        if n is None:
            return None
        once = step_flops(self.sizes.shape, *self.lengths, train_weights=self.whole)
        again = once.rollout if config.gradient_checkpointing else 0
        products = self._products(self.recipe.sft.compute)
        sent = self.exchange.sft(config, self.amount.sft_steps(config) or 0)
        return Hours(
            training=n * config.epochs * self._hours(once.update + again, products),
            exchange=self._sending(sent),
        )

    def ppo(self, config: PPOConfig, steps: int | None = None) -> Hours | None:
        """Stage 2, or so many steps of it."""
        steps = steps or self.amount.ppo_steps(config)
        if steps is None:
            return None
        once = step_flops(self.sizes.shape, *self.lengths, config.epochs, self.whole)
        again = config.epochs * once.rollout if config.gradient_checkpointing else 0
        n = steps * config.rollouts_per_step
        return Hours(
            rollout=steps * self._decoding(config, config.rollouts_per_step)
            + n * self._hours(once.rollout, self._products(config.compute)),
            scoring=n * self._hours(once.scoring, self.recipe.model.dtype),
            training=n * self._hours(once.update + again, self._products(config.compute)),
            exchange=steps * self._sending(self.sent(config)),
        )

    def sent(self, config: PPOConfig) -> float:
        """Bytes of a step of stage 2, by each process."""
        parts, n = self.exchange, config.rollouts_per_step
        return parts.rollout(config, n) + parts.scoring(config, n) + parts.update(config)

    def pairs(self, config: PairsConfig) -> Hours | None:
        """A control on pairs: each is two responses to learn from, one of them sampled."""
        n = self.amount.demonstrations
        if n is None:
            return None
        once = step_flops(self.sizes.shape, *self.lengths, 2 * config.epochs, self.whole)
        compute, products = self.recipe.ppo.compute, self._products("float32")
        return Hours(
            rollout=config.rounds
            * (
                self._decoding(self.recipe.ppo, n)
                + n * self._hours(once.rollout, self._products(compute))
            ),
            scoring=config.rounds * n * self._hours(once.scoring, products),
            training=config.rounds * n * self._hours(once.update, products),
            exchange=self._sending(self.exchange.pairs(config, n)),
        )

    def evaluation(self, models: int) -> Hours | None:
        """Responses of so many models at every temperature."""
        settings, n = self.recipe.eval, self.amount.evaluated
        if n is None:
            return None
        draws = [1 if t == 0 else settings.samples_per_prompt for t in settings.temperatures]
        once = step_flops(self.sizes.shape, *self.lengths)
        dtype = self.recipe.model.dtype
        each = sum(
            self._decoding(self.recipe.ppo.model_copy(update={"compute": dtype}), n * d)
            + n * d * self._hours(once.rollout + once.scoring, dtype)
            for d in draws
        )
        sent = [
            self.exchange.rollout(self.recipe.ppo, n * d)
            + self.exchange.scoring(self.recipe.ppo, n * d)
            for d in draws
        ]
        return Hours(rollout=models * each, exchange=models * self._sending(sum(sent)))

    def _decoding(self, config: PPOConfig, responses: int) -> float:
        """A token of each of a batch's responses meets all weights once, until the longest ends."""
        data = self.recipe.data
        longest = self.amount.longest[1] if self.amount.longest else data.max_prompt_tokens
        rows = max(1, config.max_tokens_per_batch // (longest + data.max_response_tokens))
        mine = math.ceil(responses / self.group.size)
        calls = math.ceil(mine / rows) * data.max_response_tokens
        weights = BYTES[self._products(config.compute)] * self.sizes.weights
        return calls * max(weights / self.device.bandwidth, CALL * self.sizes.layers) / 3600

    def _products(self, compute: Compute) -> Compute:
        """What a model in training multiplies in."""
        return compute if compute == "bfloat16" or self.whole else self.recipe.model.dtype

    def _hours(self, operations: int, products: Compute) -> float:
        rate = SHARE * float(getattr(self.device, products)) * self.group.size
        return operations / rate / 3600

    def _sending(self, size: float) -> float:
        return size / self.group.bandwidth(self.device) / 3600
