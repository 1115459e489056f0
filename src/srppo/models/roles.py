"""The four roles of stage 2 and how they come to be."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from srppo.models.load import frozen_copy
from srppo.models.value_head import ValueHead


@dataclass
class Roles:
    """Who is who. `base` and `sft` are frozen; `policy` starts as a copy of `sft`.

    What is trained is float32 whatever the frozen models are: in bfloat16 a step of 1e-6 changes
    almost no weight.
    """

    base: PreTrainedModel
    sft: PreTrainedModel
    policy: PreTrainedModel
    critic: ValueHead | None = None

    @staticmethod
    def begin(base: PreTrainedModel, sft: PreTrainedModel, critic: bool) -> Roles:
        """The roles at the start of stage 2."""
        return Roles(
            base=base.requires_grad_(False),
            sft=sft.requires_grad_(False),
            policy=frozen_copy(sft).float().requires_grad_(True),
            critic=ValueHead(sft) if critic else None,
        )
