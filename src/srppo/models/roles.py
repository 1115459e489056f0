"""The roles of stage 2 and how they come to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from srppo.models.load import frozen_copy, load_model
from srppo.models.precision import Compute
from srppo.models.sharding import (
    gathered,
    in_float32,
    load_sharded,
    needs_all,
    whole,
    whole_weights,
)
from srppo.models.value_head import ValueHead


class Role:
    """One model: base, sft, policy or another checkpoint. Its weights are its own;
    `srppo.models.lora.AdapterRole` shares them.

    Call it as the transformers model. Whoever needs more of it, or calls it many times over, does
    so while it is `active`.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None) -> None:
        """`device`, where it differs from the model's own: the model goes there while active."""
        self.model = model
        self.device: torch.device = device or model.device
        """Where inputs have to be."""
        self._here = self.device == model.device

    @staticmethod
    def of(model: Role | PreTrainedModel) -> Role:
        """A model in a role of its own; a role as it is."""
        return model if isinstance(model, Role) else Role(model)

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The transformers model, on `device` and with this role's weights in force."""
        if self._here:
            yield self.model
            return
        self.model.to(self.device)
        self._here = True
        try:
            yield self.model
        finally:
            self.model.to("cpu")
            self._here = False

    @contextmanager
    def decoding(self) -> Iterator[PreTrainedModel]:
        """`active`, and each process may call it as often as it likes: all weights are here, or
        `needs_all`."""
        with self.active() as model, whole(model):
            yield model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's forward returns."""
        with self.active() as model:
            return model(*args, **kwargs)

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained: all of the policy's, none of a frozen role's."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def freeze(self) -> Role:
        """Nothing is trained from here on."""
        self.model.requires_grad_(False)
        return self

    def successor(self, compute: Compute = "float32") -> Role:
        """What training starts from: equal to this role, float32, with weights of its own.

        `compute`: the format in which sharded layers are gathered; others ignore it.
        """
        model = frozen_copy(self.model).float().to(self.device)
        return Role(model.requires_grad_(True))

    def sibling(self, directory: str | Path) -> Role:
        """Another checkpoint of the same run, frozen."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return Role(load_model(str(directory), dtype, str(self.device))).freeze()

    def whole_weights(self) -> dict[str, Tensor] | None:
        """What `save_pretrained` takes; all processes ask for it, one saves. None: its own."""
        return None

    def save_pretrained(
        self,
        directory: str | Path,
        generation: GenerationConfig | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a directory that transformers can load; `generation`: how it is to generate."""
        with self.active() as model:
            if generation:
                # The base's own may contradict itself (a temperature, no sampling): not saved.
                model.generation_config = generation
            model.save_pretrained(directory)


class ShardedRole(Role):
    """Its weights are its own, in pieces over all processes, which call every method together."""

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The transformers model, `gathered`."""
        with gathered(self.model):
            yield self.model

    def parameters(self) -> list[nn.Parameter]:
        """The pieces, which are what is trained: never what was gathered of them."""
        self.model.reshard()
        return super().parameters()

    def successor(self, compute: Compute = "float32") -> Role:
        """Sharded as well."""
        model = in_float32(self.model, self.device, compute)
        return ShardedRole(model.requires_grad_(True), self.device)

    def sibling(self, directory: str | Path) -> Role:
        """Sharded as well."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        lean = needs_all(self.model)
        model = load_sharded(str(directory), dtype, str(self.device), lean=lean)
        return ShardedRole(model, self.device).freeze()

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Of the model; empty in all processes but the first."""
        return whole_weights(self.model)

    def save_pretrained(
        self,
        directory: str | Path,
        generation: GenerationConfig | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """One process does this alone, with what all have gathered."""
        self.model.generation_config = generation or self.model.generation_config
        self.model.save_pretrained(directory, state_dict=weights)


@dataclass
class Roles:
    """Who is who. `base` and `sft` are frozen; `policy` starts equal to `sft`.

    What is trained is float32 whatever the frozen models are: in bfloat16 a step of 1e-6 changes
    almost no weight.
    """

    base: Role
    sft: Role
    policy: Role
    critic: ValueHead | None = None

    @staticmethod
    def begin(
        base: Role | PreTrainedModel,
        sft: Role | PreTrainedModel,
        critic: bool,
        compute: Compute = "float32",
    ) -> Roles:
        """The roles at the start of stage 2; `compute` as for `Role.successor`."""
        base, sft = Role.of(base).freeze(), Role.of(sft).freeze()
        with sft.active() as model:
            value = ValueHead(model) if critic else None
        return Roles(base=base, sft=sft, policy=sft.successor(compute), critic=value)
