"""The recipe's settings of its controls: other ways to use the same parts, docs/baselines.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from srppo.validation import Positive, PositiveFloat, Section


class PairsConfig(Section):
    """SPIN and GSIL: pi_sft learns to tell each demonstration from a response of its own.

    A round samples one response to each demonstration's prompt and trains on the pairs; pi_ref is
    the model that the round began with. All defaults are ours where no source is named.
    """

    loss: Literal["spin", "logistic", "brier", "hinge", "kliep", "lsif"] = "spin"
    """`spin` compares the two (arXiv:2401.01335); the others, of GSIL (arXiv:2410.10093), classify
    each by f = scale (log pi/pi_ref) + shift."""
    rounds: Positive = 1
    """Each with responses of the model as it is then."""
    epochs: Positive = 2
    """Passes over the pairs of a round."""
    batch_size: Positive = 64
    """Pairs per optimizer step."""
    micro_batch_size: Positive = 8
    """Pairs per forward pass; memory only."""
    learning_rate: PositiveFloat = 5e-7
    """Constant."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` has momentum 0.9. docs/baselines.md has what the optimizer does."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    scale: PositiveFloat = 0.1
    """SPIN's lambda, GSIL's alpha."""
    shift: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """GSIL's beta. It cancels in `spin`."""


class ControlConfig(Section):
    """Another way to use the same parts, for comparison: give exactly one of the first five."""

    sft: dict[str, Any] | None = None
    """Stage 1 again with these settings changed, evaluated as it is."""
    ppo: dict[str, Any] | None = None
    """Stage 2 again with these settings changed."""
    pairs: PairsConfig | None = None
    """pi_sft trained on demonstrations against its own responses."""
    extrapolate: PositiveFloat | None = None
    """No training: base·(sft/base)^lambda per token at decoding time, with this lambda and the
    bounds that ppo has on tokens."""
    extrapolate_weights: PositiveFloat | None = None
    """No training: the weights theta_sft + alpha (theta_sft - theta_base), with this alpha
    (arXiv:2404.16792)."""
    against: Literal["base", "halfway"] = "base"
    """With ppo, whom the reward divides by: pi_base, or stage 1 trained on half of the
    demonstrations (arXiv:2510.02493)."""

    @model_validator(mode="after")
    def _one_thing(self) -> ControlConfig:
        things = ("sft", "ppo", "pairs", "extrapolate", "extrapolate_weights")
        given = [k for k in things if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"gives {' and '.join(given) or 'nothing'}, so what to do is not clear. "
                f"Give exactly one of {', '.join(things)}."
            )
        if self.against == "halfway" and self.ppo is None:
            raise ValueError(
                f"against=halfway changes the reward of stage 2, and {given[0]} has none. Write "
                "ppo: {}, or leave it out."
            )
        return self

    @property
    def is_trained(self) -> bool:
        """Whether anything is."""
        return self.extrapolate is None and self.extrapolate_weights is None

    @property
    def on_demonstrations(self) -> str | None:
        """The setting by which it trains on demonstrations."""
        trains = {"sft": self.sft, "pairs": self.pairs}
        named = next((key for key, value in trains.items() if value is not None), None)
        return "against" if self.against == "halfway" else named
