"""Several roles on one copy of the weights: base = no adapter, sft and policy = one each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.functional import (
    cast_adapter_dtype,
    get_peft_model_state_dict,
    set_adapter,
    set_peft_model_state_dict,
    set_requires_grad,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from srppo.config import LoRAConfig
from srppo.errors import ModelError
from srppo.models.load import fill_adapter, fitting, read_adapter
from srppo.models.precision import Compute
from srppo.models.roles import Role
from srppo.models.sharding import gathered


class Backbone:
    """One copy of the weights, frozen, and the adapters on it, float32; one or none is in force.

    Whatever is in force, gradients go to the adapter that is trained and to nothing else. Adapters
    stay as long as the backbone.
    """

    def __init__(self, model: PreTrainedModel, config: LoRAConfig, seed: int) -> None:
        """`config` is that of adapters that start from nothing; `seed` decides their first
        factor. The second is zero."""
        self.model = model.requires_grad_(False)
        self.config = config
        self.seed = seed
        self.in_force: str | None = None
        self.trained: str | None = None
        self._count = 0

    def bare(self) -> AdapterRole:
        """The weights without any adapter."""
        return AdapterRole(self, None)

    def new(self) -> AdapterRole:
        """A fresh adapter, in force and trained; the role starts equal to `bare`."""
        config = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            target_modules=self.config.target_modules,
            lora_dropout=self.config.dropout,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            try:
                return self._train(self._add(config))
            except ValueError as e:  # no module has such a name
                raise ModelError(
                    f"model.lora.target_modules={self.config.target_modules!r} does not fit "
                    f"{self.model.name_or_path!r} ({e}): there would be nothing to train. "
                    "Set model.lora.target_modules=all-linear."
                ) from e

    def copy(self, adapter: str) -> AdapterRole:
        """A copy of an adapter, in force and trained."""
        weights = get_peft_model_state_dict(
            self.model, adapter_name=adapter, save_embedding_layers=False
        )
        name = self._add(copy.deepcopy(self.model.peft_config[adapter]))
        set_peft_model_state_dict(self.model, weights, adapter_name=name)
        return self._train(name)

    def load(self, directory: str | Path) -> AdapterRole:
        """A saved adapter, frozen.

        Raises:
            ModelError: not a plain LoRA adapter, or not one of this model.
        """
        config, weights = read_adapter(str(directory))
        _check_plain(config, directory)
        with fitting(directory, self.model):
            name = self._add(config)
            fill_adapter(self.model, weights, name)
        return AdapterRole(self, name)

    @contextmanager
    def using(self, adapter: str | None, *, gather: bool = True) -> Iterator[PreTrainedModel]:
        """The model with that adapter in force, or none; afterwards, the one from before.

        `gather`: of weights in pieces, what `gathered` does.
        """
        before = self.in_force
        self._switch(adapter)
        try:
            with gathered(self.model) if gather else nullcontext():
                yield self.model
        finally:
            self._switch(before)

    def _switch(self, adapter: str | None) -> None:
        if adapter == self.in_force:
            return
        self.in_force = adapter
        self._apply()

    def _apply(self) -> None:
        set_adapter(self.model, [self.in_force] if self.in_force else [], inference_mode=True)
        if self.trained:
            set_requires_grad(self.model, self.trained)

    def _train(self, adapter: str) -> AdapterRole:
        self.in_force = self.trained = adapter
        self._apply()
        return AdapterRole(self, adapter)

    def _add(self, config: PeftConfig) -> str:
        """Its name. What is in force stays in force."""
        self._count += 1
        name = f"adapter{self._count}"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            self.model.add_adapter(config, name)
        if isinstance(self.model.get_output_embeddings(), BaseTunerLayer):
            raise ModelError(
                "the adapter has a part on the output head, whose weights are used without it: "
                "that part would never be trained. Leave the head out of target_modules."
            )
        cast_adapter_dtype(self.model, name)
        self.model.eval()
        self._apply()
        return name


class AdapterRole(Role):
    """A role on a backbone that it shares: an adapter's, or that without any."""

    def __init__(self, backbone: Backbone, adapter: str | None) -> None:
        super().__init__(backbone.model)
        self.backbone = backbone
        self.adapter = adapter

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The transformers model with this role's adapter in force; then, what was before."""
        with self.backbone.using(self.adapter) as model:
            yield model

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's, if it is the one that is trained."""
        return super().parameters() if self.backbone.trained == self.adapter else []

    def freeze(self) -> Role:
        """As it is: nothing but the policy's adapter is ever trained."""
        return self

    def successor(self, compute: Compute = "float32") -> Role:
        """An adapter of its own, equal to this role, trained and in force from now on."""
        return self.backbone.copy(self.adapter) if self.adapter else self.backbone.new()

    def sibling(self, directory: str | Path) -> Role:
        """Another adapter of the same backbone, frozen."""
        return self.backbone.load(directory)

    def save_pretrained(
        self,
        directory: str | Path,
        generation: GenerationConfig | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        """The adapter; one process may do this alone, whatever the weights below are."""
        with self.backbone.using(self.adapter, gather=False) as model:
            model.generation_config = generation or model.generation_config
            model.save_pretrained(directory)


def _check_plain(config: PeftConfig, directory: str | Path) -> None:
    """Only what lies in low-rank factors can be switched off and copied."""
    kind = config.peft_type
    keys = ("modules_to_save", "trainable_token_indices")
    beyond = [key for key in keys if getattr(config, key, None)]
    if getattr(config, "bias", "none") != "none":
        beyond.append("bias")
    if getattr(config, "init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        beyond.append("the weights below it")  # PiSSA and the like start by changing them
    if kind != PeftType.LORA or beyond:
        what = f"it changes {', '.join(beyond)}, too" if beyond else f"its kind is {kind}"
        raise ModelError(
            f"{str(directory)!r} is not a plain LoRA adapter ({what}): it cannot be switched on "
            "and off over one copy of the weights. Merge it into its base model, and give that."
        )
