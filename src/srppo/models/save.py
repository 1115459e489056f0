"""What becomes a model directory: weights or adapter, tokenizer with its template, how to generate.

With `as_trained`, plain `AutoModelForCausalLM.from_pretrained(directory).generate(...)` samples as
training did.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.models.roles import Role


def save(
    model: Role | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    generation: GenerationConfig,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a directory that transformers, or peft for an adapter, can load.

    `weights`: the role's `whole_weights`, where it is sharded.
    """
    Role.of(model).save_pretrained(directory, generation, weights)
    tokenizer.save_pretrained(directory)
    generation.save_pretrained(directory)  # an adapter is saved without


def as_trained(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int | None = None
) -> GenerationConfig:
    """As training samples: from the whole distribution at temperature 1, to the EOS that closes
    each demonstration. Other ends, which a base model may name, were not trained.

    `max_new_tokens`, EOS included, is how long rollouts could be; None: not said.
    """
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
    )
