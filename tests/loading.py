"""Sources by name, opened and loaded in one call."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from srppo.data.chat import Example
from srppo.data.demonstrations import load_demonstrations
from srppo.data.mixture import Source
from srppo.data.prompts import Prompt, load_prompts
from srppo.data.reporting import Report
from srppo.data.sources import open_source

OPENING = ("split", "columns")


def opened(source: Any, seed: int, settings: dict[str, Any]) -> Source:
    return open_source(source, seed=seed, **{k: settings.pop(k) for k in OPENING if k in settings})


def demonstrations(
    source: Any, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> tuple[list[Example], Report]:
    found = opened(source, settings["seed"], settings)
    examples, report = load_demonstrations(found, tokenizer, **settings)
    return list(examples), report


def prompts(
    source: Any, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> tuple[list[Prompt], Report]:
    found = opened(source, settings["seed"], settings)
    return load_prompts(found, tokenizer, **settings)
