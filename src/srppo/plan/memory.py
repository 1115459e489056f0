"""Bytes that each part of a run holds at once. docs/plan.md has the formula in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from srppo.algo.logprobs import CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS
from srppo.config import Recipe, SFTConfig
from srppo.models.load import is_adapter
from srppo.models.precision import Compute
from srppo.plan.architecture import Architecture, Blueprint, Saved
from srppo.rollout.cache import GROWTH

FLOAT = 4
BYTES = {"float32": 4, "bfloat16": 2}
QUANTIZED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
"""Bytes per weight; NF4 has a float32 scale for each 64."""
LOGIT_COPIES = 4
"""Of a chunk: logits, their softmax, and the gradients of both."""
TILE = (4096, 32768)
"""Tokens and vocabulary entries that TRL's head has in hand in stage 1."""
SAMPLING_BYTES = 32
"""Per vocabulary entry of a running response: logits and log-probabilities in float32; their
exponential, its sum and a copy in float64."""


@dataclass(frozen=True)
class Phase:
    """What is in memory at the peak of one part of a run; bytes."""

    name: str
    frozen: float = 0
    """base and sft, or the weights that they share with the policy, with the sft's adapter."""
    trained: float = 0
    """Weights of the model that is trained, or its adapter."""
    gathered: float = 0
    """Of weights in pieces: what is whole while it is computed, with its gradients."""
    gradients: float = 0
    """With several processes in stage 1 also the copies in which they are summed."""
    optimizer: float = 0
    """Averages that AdamW keeps, or SGD's momentum; in its step also the temporaries."""
    activations: float = 0
    """What the backward pass needs; without one, what one layer does."""
    logits: float = 0
    """Those in hand, and the output head's gradient before it is added to the others."""
    cache: float = 0
    """Keys and values of a rollout."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "name")


def phases(
    recipe: Recipe,
    blueprint: Blueprint,
    longest: tuple[int, int] | None = None,
    gpu: bool = True,
    processes: int = 1,
) -> list[Phase]:
    """The parts of a run in order, each at its peak; of several processes, in one.

    Args:
        longest: tokens of the longest demonstration with its prompt, and of the longest prompt of
            stage 2; None: as long as the recipe allows.
        gpu: there AdamW's step needs another copy of the weights, and chunks of logits are larger.
    """
    data, model = recipe.data, recipe.model
    most = data.max_prompt_tokens + data.max_response_tokens, data.max_prompt_tokens
    sizes = _Sizes(recipe, blueprint.sizes(model), *(longest or most), gpu, processes)
    frozen = blueprint.saved(model, "float32")
    policy = blueprint.saved(model, recipe.ppo.compute)
    trained = blueprint.saved(model, recipe.sft.compute)
    first = [] if model.sft else sizes.stage_1(recipe.sft, trained)
    return [*first, sizes.rollout(policy), sizes.scoring(frozen), *sizes.update(policy)]


@dataclass(frozen=True)
class _Sizes:
    recipe: Recipe
    model: Architecture
    demonstration: int
    """Tokens of the longest, with its prompt."""
    prompt: int
    """Tokens of the longest in stage 2."""
    gpu: bool
    processes: int

    @property
    def cut(self) -> int:
        """Into how many pieces weights are."""
        return self.processes if self.recipe.model.shard else 1

    def share(self, rows: int) -> int:
        """A process's, at most."""
        return math.ceil(rows / self.processes)

    @property
    def longest(self) -> int:
        """Tokens of stage 2's longest sequence."""
        return self.prompt + self.recipe.data.max_response_tokens

    def stage_1(self, config: SFTConfig, one_pass: Saved) -> list[Phase]:
        """base, as it is trained, alone in memory."""
        rows = min(config.micro_batch_size, self.share(config.batch_size))
        tokens = rows * self.demonstration
        state = (2 if config.optimizer == "adamw" else 1) * self.trained
        frozen = self.backbone / self.cut if self.recipe.model.lora else 0.0
        held = Phase("", frozen, self.trained, self._passing(config.compute, True), optimizer=state)
        return self._training(
            "stage 1",
            held,
            self._kept(one_pass, tokens, config.gradient_checkpointing),
            self._tile(tokens),
            temporary=config.optimizer == "adamw",
        )

    def rollout(self, one_pass: Saved) -> Phase:
        """The prompts of one batch, then a token of each at a time, to the longest length."""
        ppo, model = self.recipe.ppo, self.recipe.model
        most = self.share(ppo.rollouts_per_step)
        rows = min(most, max(1, ppo.max_tokens_per_batch // self.longest))
        number = BYTES[model.dtype] if model.lora else FLOAT
        cached = number * self.model.cached_per_token * (self.longest + GROWTH)
        layer = 1 + 1 / self.model.layers  # a layer that grows is copied
        return self._resident(
            "rollout",
            gathered=self._decoding(),
            activations=self._layer(one_pass, rows * self.prompt) + self._copies(one_pass),
            logits=SAMPLING_BYTES * rows * self.model.vocabulary,
            cache=rows * cached * layer,
        )

    def scoring(self, one_pass: Saved) -> Phase:
        """One frozen model at a time; only here do those that wait in CPU memory come."""
        ppo = self.recipe.ppo
        tokens = max(ppo.max_tokens_per_batch, self.longest)
        return self._resident(
            "scoring",
            gathered=self._passing(ppo.compute, False),
            activations=self._layer(one_pass, tokens),
            logits=self.chunk,
            visiting=True,
        )

    def update(self, one_pass: Saved) -> list[Phase]:
        """Passes over one microbatch, then a step of AdamW."""
        ppo = self.recipe.ppo
        rows = self.share(min(ppo.minibatch_size, ppo.rollouts_per_step))
        tokens = min(rows * self.longest, max(ppo.max_tokens_per_batch, self.longest))
        kept = self._kept(one_pass, tokens, ppo.gradient_checkpointing) + self._copies(one_pass)
        logits = self.chunk * (3 if ppo.estimator == "all_action" else 1)  # of both frozen, too
        held = self._resident("", gathered=self._passing(ppo.compute, True))
        return self._training("update", held, kept, logits, temporary=True)

    def _training(
        self, name: str, held: Phase, kept: float, logits: float, temporary: bool
    ) -> list[Phase]:
        """Forward and backward passes; then the optimizer's step, when what they kept is gone."""
        step = self.trained if temporary and self.gpu else 0  # AdamW over all weights at once
        copies = 2 if name == "stage 1" and self.processes > 1 and self.cut == 1 else 1  # DDP's
        common = {"frozen": held.frozen, "trained": held.trained}
        common["gradients"] = copies * self.trained
        return [
            Phase(
                f"{name}: passes",
                **common,
                gathered=held.gathered,
                optimizer=held.optimizer,
                activations=kept,
                logits=logits + (0 if self.recipe.model.lora else FLOAT * self.model.shape.head),
            ),
            Phase(f"{name}: optimizer", **common, optimizer=held.optimizer + step),
        ]

    def _resident(self, name: str, visiting: bool = False, **parts: float) -> Phase:
        """What stage 2 holds all the time, and `parts`."""
        model = self.recipe.model
        frozen = self.backbone / self.cut
        visiting = visiting and self.cut == 1  # pieces come a layer at a time: `gathered`
        if not model.lora:
            frozen *= (1 if visiting else 0) if model.offload else 2
        elif self.whole_sft:
            frozen *= 1 if model.offload and not visiting else 2
        else:
            frozen += self.trained
        return Phase(name, frozen=frozen, trained=self.trained, optimizer=2 * self.trained, **parts)

    def _passing(self, compute: Compute, training: bool) -> float:
        """Of weights in pieces, whole at a pass: those outside the layers, and two layers, one of
        them fetched ahead; with their gradients, which are summed in float32."""
        model, layer, outside = self.recipe.model, self.model.layer, self.model.outside
        if self.cut == 1:
            return 0.0
        frozen = BYTES[model.dtype] * (outside + 2 * layer)
        if model.lora:
            return frozen
        number = BYTES[compute]
        if not training:
            return max(frozen, FLOAT * outside + 2 * number * layer)
        return 2 * FLOAT * outside + (3 * number + FLOAT) * layer

    def _decoding(self) -> float:
        """While responses are sampled each process has all of the policy, in the format of its
        products; or two layers, with `model.shard_sampling`."""
        model, inside = self.recipe.model, self.model.weights - self.model.outside
        if self.cut == 1:
            return 0.0
        number = BYTES[model.dtype if model.lora else self.recipe.ppo.compute]
        outside = (BYTES[model.dtype] if model.lora else FLOAT) * self.model.outside
        return outside + number * (2 * self.model.layer if model.shard_sampling else inside)

    @property
    def trained(self) -> float:
        """What is trained, in float32; adapters are never cut."""
        return FLOAT * self.model.trained / (1 if self.recipe.model.lora else self.cut)

    @property
    def whole_sft(self) -> bool:
        """Whether `model.sft` is no adapter, so that base and sft do not share their weights."""
        return self.recipe.model.sft is not None and not is_adapter(self.recipe.model.sft)

    @property
    def backbone(self) -> float:
        """One frozen copy of the weights, quantised if the recipe says so."""
        model, weights = self.recipe.model, self.model.weights
        if not model.quantize:
            return weights * BYTES[model.dtype]
        rest = (weights - self.model.quantizable) * BYTES[model.dtype]
        return self.model.quantizable * QUANTIZED[model.quantize] + rest

    @property
    def chunk(self) -> float:
        """Logits in hand at a time."""
        elements = GPU_CHUNK_ELEMENTS if self.gpu else CPU_CHUNK_ELEMENTS
        return LOGIT_COPIES * FLOAT * max(elements, self.model.vocabulary)

    def _tile(self, tokens: int) -> float:
        """Of TRL's head: one tile on a GPU, whose kernels need no more; else some more of it."""
        rows, columns = min(TILE[0], tokens), TILE[1]
        if self.gpu:
            return FLOAT * rows * columns
        return LOGIT_COPIES * FLOAT * rows * min(columns, self.model.vocabulary)

    def _kept(self, one_pass: Saved, tokens: int, checkpointing: bool) -> float:
        """By a forward pass for its backward pass, and what that has in hand of one layer."""
        layer = self._layer(one_pass, tokens)
        if not checkpointing:
            return tokens * one_pass.per_token + layer
        return tokens * FLOAT * self.model.width * self.model.layers + 2 * layer

    def _copies(self, one_pass: Saved) -> float:
        """Of weights in the format of products; pieces are gathered in it."""
        return one_pass.constant if self.cut == 1 or self.recipe.model.lora else 0.0

    def _layer(self, one_pass: Saved, tokens: int) -> float:
        return tokens * one_pass.per_token / self.model.layers
