"""iw-SFT: the loss of TRL's SFTTrainer, each token of it weighted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from srppo.algo.imitation import importance_weights
from srppo.data.demonstrations import Example
from srppo.models.batching import Sequences
from srppo.models.scoring import score

WEIGHTS_OF: dict[str, Literal["response", "token"]] = {"iw": "response", "iw_step": "token"}
"""`sft.loss`: whose probability ratio weights a token."""
BLOCK = 1024
"""Demonstrations whose scores are padded together."""
MAX_TOKENS = 16384
"""Per forward pass that scores pi_ref, padding included."""


def reference_logprobs(model: PreTrainedModel, examples: Sequence[Example]) -> list[list[float]]:
    """log pi_ref of every token but the first of prompt and response, nats; 0 at the prompt's."""
    found = []
    for start in range(0, len(examples), BLOCK):
        some = examples[start : start + BLOCK]
        y = Sequences.of([e.prompt_ids for e in some], [e.response_ids for e in some])
        rows = zip(y.prompt_ids, score(model, y, MAX_TOKENS), y.mask, strict=True)
        found += [[0.0] * (len(prompt) - 1) + row[mask].tolist() for prompt, row, mask in rows]
    return found


@dataclass
class WithReference(DataCollatorForLanguageModeling):
    """Pads `reference_logprobs`, where rows have it, along with the ids."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch; its reference_logprobs are (B, S - 1), of each token but the first."""
        batch: dict[str, Any] = super().torch_call(examples)
        if "reference_logprobs" in examples[0]:
            rows = [torch.tensor(e["reference_logprobs"]) for e in examples]
            batch["reference_logprobs"] = pad(rows, padding_value=0.0, padding_side="right")
        return batch


class ImportanceWeighted:
    """Goes before SFTTrainer among the bases; needs `reference_logprobs` in the batches."""

    weights_of: Literal["response", "token"] | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, of a model whose log-probabilities are multiplied by the weights."""
        reference, of = inputs.pop("reference_logprobs", None), self.weights_of
        if of is None:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

        def weighted(**named: Any) -> Any:
            outputs = model(**named)
            logprobs, mask = outputs.log_probs, outputs.label_mask.bool()
            outputs.log_probs = logprobs * importance_weights(logprobs, reference, mask, of)
            return outputs

        return super().compute_loss(weighted, inputs, *args, **kwargs)  # type: ignore[misc]
