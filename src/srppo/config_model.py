"""The settings of the models that a run starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from srppo.validation import Fraction, Positive, PositiveFloat, Section


class LoRAConfig(Section):
    """What is trained are low-rank adapters on one frozen copy of the weights (arXiv:2106.09685).

    They usually want higher learning rates than full fine-tuning. An adapter given as `model.sft`
    brings its own rank, alpha and modules, for the policy starts as its copy.
    """

    rank: Positive = 16
    """Of the two factors of each weight's change (ours)."""
    alpha: PositiveFloat = 32.0
    """The change is alpha/rank times the factors' product (ours)."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Ends of the names of the layers that get one; `all-linear`: all but the output head."""
    dropout: Fraction = 0.0
    """In front of the adapters in stage 1; stage 2 has none, it would break PPO's ratio."""


class ModelConfig(Section):
    """The models that a run starts from."""

    base: str
    """pi_base: a Hugging Face name, a model directory, or `srppo:miniature`."""
    sft: str | None = None
    """An SFT checkpoint made elsewhere, or a LoRA adapter for `base`; stage 1 is then skipped."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of frozen models; what is trained, and log-probabilities, are float32."""
    device: str = "auto"
    """`auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`."""
    lora: LoRAConfig | None = None
    """Train adapters; base, sft and policy share one copy of the weights. null: train all."""
    quantize: Literal["4bit", "8bit"] | None = None
    """The frozen weights in 4 (NF4) or 8 bits, by bitsandbytes; needs lora. null: in dtype."""
    offload: bool = False
    """Frozen models wait in CPU memory and visit the GPU while they score. Weights that the policy
    shares stay there."""
    shard: bool = False
    """Of several processes each holds a share of every layer instead of all of it: of the model
    that is trained, its optimizer, and the frozen models. false: each holds whole models."""
    shard_sampling: bool = False
    """With shard: layers stay in pieces while responses are sampled, too, so that every token
    gathers all of them. For models that no GPU holds whole; far slower."""

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.quantize and self.shard:
            raise ValueError(
                f"quantize={self.quantize} with shard=true: quantised weights cannot be cut into "
                "pieces. Leave one of them out."
            )
        if self.shard_sampling and not self.shard:
            raise ValueError(
                "shard_sampling=true without shard: weights are not in pieces. Set "
                "model.shard=true, or leave shard_sampling out."
            )
        if self.quantize and not self.lora:
            raise ValueError(
                f"quantize={self.quantize} without lora: quantised weights cannot be trained. "
                "Set model.lora.rank=16."
            )
        return self
