"""Model directories and hub names in, models and tokenizers out; errors that name the cure."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo.errors import ModelError, SrppoError
from srppo.models.untrusted import check_directory


def resolve(name: str) -> str:
    """`srppo:miniature` -> the packaged directory; anything else unchanged.

    Raises:
        ModelError: no such package model, or a local path without a model in it.
    """
    if name.startswith("srppo:"):
        packaged = resources.files("srppo").joinpath(name.removeprefix("srppo:"), "base")
        if not packaged.is_dir():
            raise ModelError(
                f"{name!r} does not come with srppo. The one that does: srppo:miniature."
            )
        return str(packaged)
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if not path.exists():
        if looks_local:
            raise ModelError(
                f"model directory {name!r} does not exist: nothing can be loaded. Give a directory "
                "with config.json and model.safetensors, or a Hugging Face name (owner/model)."
            )
        if path.parent.is_dir() and not _is_cached(name):
            raise ModelError(
                f"model directory {name!r} does not exist, and {str(path.parent)!r} is a directory "
                "here: nothing can be loaded. Give a directory that is there; or, if a model of "
                f"the hub is meant, run: hf download {name}"
            )
        return name
    if not (path / "config.json").is_file() and not is_adapter(path):
        raise ModelError(
            f"{name!r} holds no config.json, so it is not a Hugging Face model directory. "
            "Give the directory that `save_pretrained` wrote."
        )
    return str(path.absolute())  # adapters remember it


def _is_cached(name: str) -> bool:
    """Whether a model of the hub is on this machine."""
    files = ("config.json", "adapter_config.json")
    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except HFValidationError:  # no name that the hub could have
        return False


def is_adapter(name: str | Path) -> bool:
    """Whether a directory holds a LoRA adapter rather than a whole model."""
    return (Path(name).expanduser() / "adapter_config.json").is_file()


def has_tokenizer(name: str) -> bool:
    """False for an adapter that leaves it to its base model."""
    return not is_adapter(name) or (Path(name).expanduser() / "tokenizer_config.json").is_file()


def base_of(adapter: str) -> str:
    """The name of the model that an adapter directory names as the one below it."""
    with loading("adapter", adapter):
        return str(PeftConfig.from_pretrained(adapter).base_model_name_or_path)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; for an adapter without one, that of the model below it.

    Raises:
        ModelError: there is none, or it has no EOS.
    """
    path = resolve(name)
    if not has_tokenizer(path):
        path = resolve(base_of(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as e:  # as in `loading`
        found = [file.name for file in Path(path).glob("*")]  # none of a name on the hub
        if found and not any(file.startswith(("tokenizer", "vocab")) for file in found):
            raise ModelError(
                f"{name!r} holds no tokenizer: texts cannot become tokens. Copy tokenizer.json and "
                "tokenizer_config.json there from where the model is from."
            ) from e
        raise ModelError(cannot_load("tokenizer", name, e)) from e
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name!r} has no EOS token: responses could never end, and the "
            "reward belongs at EOS. Set `eos_token` in its tokenizer_config.json."
        )
    return tokenizer


def check_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """Raises ModelError unless the model has an embedding for each token; it may have more."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if size is not None and last >= size:
        raise ModelError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens, {token!r} with the id {last}, "
            f"and the model's vocab_size is {size}: that token would have no embedding. Give the "
            "tokenizer that belongs to the model, or a model that was resized for it "
            "(resize_token_embeddings)."
        )


def load_model(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    quantize: Literal["4bit", "8bit"] | None = None,
    base: str | None = None,
) -> PreTrainedModel:
    """A causal language model in eval mode (dropout would break PPO's ratio).

    Weights come from safetensors only; a model directory cannot run code. An adapter is merged into
    `base`, or into the model that it names; saved, that is a whole model again.

    Raises:
        ModelError: missing, unreadable or unsuitable files.
    """
    path = resolve(name)
    place = pick_device(device)
    if is_adapter(path):
        return _load_merged(path, dtype, device, base)
    with loading("model", name):
        check_directory(path)
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **(_quantized(quantize, dtype, place) if quantize else {}),
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{name!r} lacks {len(missing)} weight(s), {missing[0]} first: they would be random. "
            "Give a complete causal language model."
        )
    if quantize:
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False  # that 4-bit kernel has no gradients
        return model.eval()
    return model.to(place).eval()


def _load_merged(path: str, dtype: str, device: str, base: str | None) -> PreTrainedModel:
    config, weights = read_adapter(path)
    config.inference_mode = True
    model = load_model(base or base_of(path), dtype, device)
    with fitting(path, model):
        adapted = PeftModel(model, config)
        fill_adapter(adapted, weights, adapted.active_adapter)
    with loading("adapter", path):
        merged = adapted.merge_and_unload().requires_grad_(True)
        if (Path(path) / "generation_config.json").is_file():
            merged.generation_config = GenerationConfig.from_pretrained(path)
        return merged


def read_adapter(directory: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """An adapter's configuration and weights.

    Raises:
        ModelError: they cannot be read.
    """
    with loading("adapter", directory):
        check_directory(directory)
        return PeftConfig.from_pretrained(directory), load_peft_weights(directory, device="cpu")


def fill_adapter(model: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Raises ValueError or RuntimeError unless the weights are all that the adapter `name` has."""
    result = set_peft_model_state_dict(model, weights, adapter_name=name)
    absent = [key for key in result.missing_keys if name in key.split(".")]
    if odd := absent + list(result.unexpected_keys):
        raise ValueError(f"{odd[0]}, one of {len(odd)} such weight(s), is in only one of them")


@contextmanager
def fitting(directory: str | Path, model: PreTrainedModel) -> Iterator[None]:
    """Turns what keeps an adapter from being put over `model` into a ModelError."""
    try:
        yield
    except SrppoError:
        raise
    except Exception as e:  # as in `loading`
        raise ModelError(
            f"the adapter in {str(directory)!r} does not fit {model.name_or_path!r} "
            f"({_reason(e)}): it was trained on another model. Give it that one: model.base of a "
            "recipe, base_model_name_or_path in adapter_config.json."
        ) from e


def _quantized(bits: str, dtype: str, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes for it."""
    require_quantizer(bits)
    # At every product it would say that 8-bit ones are made in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=bits == "4bit",
            load_in_8bit=bits == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        ),
        "device_map": {"": device},
    }


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether its weights are in 4 or 8 bits."""
    return getattr(model.config, "quantization_config", None) is not None


def require_quantizer(bits: str) -> None:
    """Raises ModelError without bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantize={bits} needs bitsandbytes, which is not installed: the weights cannot "
            "be quantised. Run: pip install 'srppo[quantize]'"
        )


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one; a GPU comes with its number, as tensors on it say.

    Raises:
        ModelError: the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:
        first = str(e).splitlines()[0]
        raise ModelError(
            f"model.device={device!r} cannot be used ({first}): nothing can run there. "
            "Set model.device=auto or cpu."
        ) from e


def context_length(name: str) -> int | None:
    """Longest sequence that the model has positions for, in tokens; None: not stated."""
    return getattr(load_config(name).get_text_config(), "max_position_embeddings", None)


def frequency_switch(name: str) -> int | None:
    """The position beyond which a model's rotary frequencies become others, for those already
    cached as well; None: they do not."""
    config = load_config(name).get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return None
    original = rope.get("original_max_position_embeddings")
    return original or getattr(config, "original_max_position_embeddings", None)


def load_config(name: str) -> PreTrainedConfig:
    """A model's config.json. Raises ModelError where it cannot be read."""
    path = resolve(name)
    with loading("configuration", name):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def fingerprint(name: str) -> str:
    """What tells a model from another of the same name: the commit of one on the hub, else a
    sha256 of its files."""
    path = resolve(name)
    if not Path(path).is_dir():
        return str(load_config(name)._commit_hash)
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).iterdir() if p.suffix in (".json", ".safetensors")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def check_same_tokens(
    base: PreTrainedTokenizerBase, sft: PreTrainedTokenizerBase, base_name: str, sft_name: str
) -> None:
    """The log-ratio compares probabilities of the same ids: the vocabularies must agree.

    Raises:
        ModelError: naming the first token that differs.
    """
    ours, theirs = base.get_vocab(), sft.get_vocab()
    different = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    if different:
        token = different[0]
        raise ModelError(
            f"the tokenizers of base {base_name!r} and sft {sft_name!r} differ in "
            f"{len(different)} token(s): {token!r} is {ours.get(token)} in one and "
            f"{theirs.get(token)} in the other, so log pi_sft - log pi_base would compare "
            "different texts. Use an SFT model that was trained from this base."
        )
    if base.eos_token_id != sft.eos_token_id:
        raise ModelError(
            f"EOS is {base.eos_token!r} in base {base_name!r} and {sft.eos_token!r} in sft "
            f"{sft_name!r}: responses would end at different tokens. Give both the same eos_token."
        )


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that takes no gradients."""
    return copy.deepcopy(model).requires_grad_(False)


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Turns whatever missing, damaged or foreign files make a library raise into a ModelError."""
    try:
        yield
    except SrppoError:
        raise
    except Exception as e:  # each architecture raises its own, tokenizers nothing but Exception
        raise ModelError(cannot_load(what, name, e)) from e


def cannot_load(what: str, name: str, error: Exception) -> str:
    """A message for whatever a library raised."""
    return (
        f"the {what} of {name!r} cannot be loaded: {_reason(error)}. "
        "Give a complete Hugging Face model directory, or a hub name that this machine can reach; "
        "of a recipe, in model.base or where it was named."
    )


def _reason(error: Exception) -> str:
    """The first sentence of what a library says, or all that it announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return (" ".join(lines) if lines[0].endswith(":") else lines[0]).rstrip(".")
