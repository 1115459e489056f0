"""What is measured: one workload for every engine. No torch here: the driver stays small."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A random Llama, its prompts, and how its responses end."""

    width: int = 256
    layers: int = 6
    vocab: int = 8192
    prompts: int = 64
    """And responses a step; engines that compare responses take a quarter of them, four times."""
    prompt_tokens: int = 64
    response_tokens: int = 128
    """At most."""
    early: bool = True
    """Responses end at random, each token with a chance of about 1 in 64; else none ends early."""

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""
        return round(self.width * 8 / 3)

    @property
    def heads(self) -> int:
        """Of 32 channels each."""
        return self.width // 32


SIZES = {
    "9m": Case(),
    "28m": Case(width=512),
    "9m-32k": Case(vocab=32768),  # the 9 M model's trunk; 21 M parameters with its embeddings
    "28m-32k": Case(width=512, vocab=32768),
    "tiny": Case(width=64, layers=2, vocab=512, prompts=16, prompt_tokens=16, response_tokens=32),
}
