"""A model's sizes from its configuration alone: exact counts, no weights loaded or downloaded."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from srppo.config import ModelConfig
from srppo.models.load import loading, resolve
from srppo.models.lora import Backbone
from srppo.models.precision import Compute
from srppo.plan.known import MODELS
from srppo.train.cost import Shape

TRACED = 64
"""Tokens of a traced pass, and twice as many."""
UNMASKED = "srppo-unmasked"
"""Attention as in a batch without padding. transformers makes a mask for tensors without contents,
which no run has; for a kind of attention that it does not know it makes none."""
AttentionInterface.register(UNMASKED, sdpa_attention_forward)


@dataclass(frozen=True)
class Architecture:
    """What memory and time depend on."""

    weights: int
    """All parameters, embeddings included, adapters not."""
    quantizable: int
    """Those in the matrices of the layers, which `model.quantize` shrinks."""
    trained: int
    """All, or the adapter's."""
    shape: Shape
    layers: int
    layer: int
    """Weights of one, the largest."""
    width: int
    vocabulary: int
    outside: int
    """Weights outside the layers: embeddings, last norm, output head."""
    cached_per_token: int
    """Numbers that the rollout's cache keeps: keys and values of all layers."""
    positions: int | None
    """Longest sequence; None: not stated."""


@dataclass(frozen=True)
class Saved:
    """What a forward pass keeps for its backward pass, in bytes."""

    per_token: float
    constant: float
    """Copies of weights in another number format."""


def local_directory(name: str) -> str | None:
    """Where the model's small files are on this machine: a directory, the package, the hub's cache.

    Raises:
        ModelError: a path that holds no model.
    """
    path = resolve(name)
    if Path(path).is_dir():
        return path
    cached = try_to_load_from_cache(name, "config.json")
    return str(Path(cached).parent) if isinstance(cached, str) else None


class Blueprint:
    """A configuration, and what torch says about the model that it describes."""

    def __init__(self, config: Any, origin: str) -> None:
        """`origin`: where the configuration is from, for the plan to say."""
        self.config = config
        self.origin = origin
        self._sizes: dict[str, Architecture] = {}
        self._saved: dict[tuple[str, Compute], Saved] = {}

    @staticmethod
    def find(name: str) -> Blueprint | None:
        """From the model's config.json or the table of known models; None if neither has it."""
        directory = local_directory(name)
        if directory:
            with loading("configuration", name):
                return Blueprint(AutoConfig.from_pretrained(directory), "its config.json")
        known = MODELS.get(name)
        return Blueprint(AutoConfig.for_model(**known), "srppo's table") if known else None

    def sizes(self, model: ModelConfig) -> Architecture:
        """Of the model under the recipe's adapters."""
        key = _key(model)
        if key not in self._sizes:
            self._sizes[key] = _measure(self.config, model)
        return self._sizes[key]

    def saved(self, model: ModelConfig, compute: Compute) -> Saved:
        """By torch's own autograd, on tensors without contents: what it holds on to, each storage
        once. Two lengths tell what grows with tokens from what does not. Dropout is off. Quantised
        layers count as if they were in `model.dtype`, which is what they multiply in."""
        key = _key(model), compute
        if key not in self._saved:
            one, two = (_saved_by(self.config, model, compute, n * TRACED) for n in (1, 2))
            per_token = (two - one) / TRACED
            self._saved[key] = Saved(per_token, max(0.0, one - per_token * TRACED))
        return self._saved[key]


def _key(model: ModelConfig) -> str:
    """The settings that decide what is built."""
    return model.model_dump_json(include={"dtype", "lora"})


def _measure(config: Any, model: ModelConfig) -> Architecture:
    """Sizes of the bare model; `trained` with the recipe's adapters."""
    text = config.get_text_config()
    made = _empty(config, model)
    head = made.get_output_embeddings()
    matrices = [m for m in made.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    channels = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = [m for m in made.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    weights = made.num_parameters()
    return Architecture(
        weights=weights,
        quantizable=sum(m.weight.numel() for m in matrices),
        shape=Shape.of(made),
        trained=_trained(made, model).num_parameters(only_trainable=True),
        layers=text.num_hidden_layers,
        layer=max(inside, default=weights),  # without layers that can be cut, all of it
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        outside=weights - sum(inside),
        cached_per_token=2 * text.num_hidden_layers * heads * channels,
        positions=getattr(text, "max_position_embeddings", None),
    )


def _empty(config: Any, model: ModelConfig) -> PreTrainedModel:
    """The model without contents, in the format of what is trained or lies under adapters."""
    dtype = model.dtype if model.lora else "float32"
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=UNMASKED
        )
    return made.eval()


def _trained(made: PreTrainedModel, model: ModelConfig) -> PreTrainedModel:
    """The same, changed: as it is trained, with an adapter if the recipe says so."""
    with torch.device("meta"):
        return Backbone(made, model.lora, seed=0).new().model if model.lora else made


def _saved_by(config: Any, model: ModelConfig, compute: Compute, tokens: int) -> int:
    trunk = _trained(_empty(config, model), model).base_model
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with FakeTensorMode():
        state = {
            name: torch.empty(x.shape, dtype=x.dtype, requires_grad=x.requires_grad)
            for name, x in (*trunk.named_parameters(), *trunk.named_buffers())
        }
        own = {x.untyped_storage()._cdata for x in state.values()}
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast("cpu", torch.bfloat16) if compute == "bfloat16" else nullcontext(),
        ):
            # Held until the sum is taken, so that no storage's place is given to another.
            output = functional_call(trunk, state, kwargs={"input_ids": ids, "use_cache": False})
        total = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
        del output
    return total
