"""The models to be evaluated: where they are, how they are asked, what they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo import distributed
from srppo.data.chat import prompt_text
from srppo.data.schemas import RowError
from srppo.errors import ConfigError, ModelError
from srppo.eval.benchmarks import Row, sha256
from srppo.models.load import (
    base_of,
    context_length,
    is_adapter,
    load_model,
    load_tokenizer,
    pick_device,
    resolve,
)
from srppo.models.roles import Role, ShardedRole
from srppo.models.sharding import load_sharded
from srppo.train.checkpoint import model_in

PLAIN = "base-plain"
"""What the base model is called where it is asked without its template."""


@dataclass(frozen=True)
class Subject:
    """A model that is asked in one way."""

    name: str
    source: str
    """Run or model directory, or hub name, as it was given."""
    path: str
    """Of the model itself."""
    tokenizer: PreTrainedTokenizerBase
    chat: bool
    """Through the tokenizer's chat template; else as plain text."""
    context: int | None
    """Positions; None: not stated."""

    @staticmethod
    def find(name: str, source: str, template: str) -> list[Subject]:
        """A model as it is to be asked; one called `base` that has a template also without it.

        Args:
            template: `auto`, the tokenizer's if it has one; `none`; or a file.

        Raises:
            ModelError, RunDirError, ConfigError: no model, no tokenizer, no such template.
        """
        path = resolve(model_in(source))
        if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
            raise ModelError(
                f"{source!r} holds no weights (*.safetensors): there is no model to evaluate. Give "
                "the directory that `srppo run` or `save_pretrained` wrote."
            )
        tokenizer = load_tokenizer(path)
        if template not in ("auto", "none"):
            tokenizer.chat_template = _read_template(template)
        chat = template != "none" and tokenizer.chat_template is not None
        if chat:
            _require_works(tokenizer, source)
        below = base_of(path) if is_adapter(path) else path
        context = context_length(below)
        asked = Subject(name, source, path, tokenizer, chat, context)
        if name != "base" or not chat:
            return [asked]
        return [asked, Subject(PLAIN, source, path, tokenizer, False, context)]

    @property
    def template(self) -> str:
        """`chat` or `plain`."""
        return "chat" if self.chat else "plain"

    @property
    def template_sha256(self) -> str | None:
        """Of the template's text."""
        return sha256(str(self.tokenizer.chat_template)) if self.chat else None

    def load(self, dtype: str, device: str, shard: bool = False, lean: bool = False) -> Role:
        """Its weights, frozen; with `shard`, of several processes each holds a share, and never
        more if `lean`."""
        if shard and distributed.is_joined():
            pieces = load_sharded(self.path, dtype, device, lean=lean)
            return ShardedRole(pieces, pick_device(device)).freeze()
        return Role(load_model(self.path, dtype, device)).freeze()

    @cached_property
    def identity(self) -> Row:
        """What results.json says of it; the hash is of the weights, of an adapter alone."""
        model: Row = {"name": self.name, "path": self.source, "sha256": None, "responses": None}
        if Path(self.path).is_dir():
            return model | {"sha256": _weights_sha256(Path(self.path))}
        cached = try_to_load_from_cache(self.path, "config.json")
        return model | {"revision": Path(cached).parent.name if isinstance(cached, str) else None}


def names_of(models: Sequence[str]) -> list[tuple[str, str]]:
    """(name, source) of each `NAME=DIR` or `DIR`.

    Raises:
        ConfigError: a name that is there twice, or no name for a directory.
    """
    named = []
    for model in models:
        name, equals, source = model.partition("=")
        if not equals or "/" in name:
            source = model
            name = Path(model).expanduser().resolve().name.removeprefix("srppo:")
        named.append((name, source))
    names = [name for name, _ in named]
    if {"base", PLAIN} <= set(names):
        raise ConfigError(
            f"{PLAIN!r} is what base is called where it is asked without its template: the two "
            "would overwrite each other. Call that model otherwise."
        )
    for i, (name, source) in enumerate(named):
        if not re.fullmatch(r"\w[\w.@+-]*", name):
            raise ConfigError(
                f"{name!r} is no name for {source!r}: results could not lie in OUT/NAME. Use "
                "letters, digits, and . _ @ + - after the first."
            )
        if name in names[:i]:
            raise ConfigError(
                f"two models are called {name!r}: the second would overwrite the first. Name them: "
                f"first={named[names.index(name)][1]} second={source}."
            )
    return named


def _read_template(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"--chat-template {file} cannot be read ({e}): prompts would be other ones than meant. "
            "Give auto, none or a Jinja file."
        ) from e


def _require_works(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    try:
        prompt_text(tokenizer, [{"role": "user", "content": "question"}])
    except RowError as e:
        raise ModelError(
            f"the chat template of {source!r} refuses a question ({e}): no prompt can be made. "
            "Mend it, or ask without: --chat-template none."
        ) from e


def _weights_sha256(directory: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
