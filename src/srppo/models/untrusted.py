"""A model directory may come from anybody: what of it could do harm is refused before it is used.

Pickles and code beside the weights are never touched: safetensors only, `trust_remote_code=False`.
What is left are sizes that would fill the memory, names that lead out of the directory, kernels
that would be fetched from the hub, and adapters that import a module of their choice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from srppo.errors import ModelError

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTHS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "n_embd",
    "n_head",
    "n_inner",
    "n_positions",
    "d_model",
    "d_ff",
)
"""Of config.json, with LAYERS: each is a number of rows or columns of some weight."""
PACKED = 16
"""Numbers of a model that one stored number may stand for, at most: eight of 4 bits in 32 are
usual; the rest is for tables that are made anew, not stored."""

KERNELS = ("attn_implementation", "_attn_implementation")
"""Of config.json: the code that attention runs."""


def check_directory(path: str) -> None:
    """Does nothing for a name on the hub.

    Raises:
        ModelError: the directory holds something that no honest model does.
        OSError, ValueError, SafetensorError: it cannot be read.
    """
    directory = Path(path)
    if not directory.is_dir():
        return
    for index in directory.glob("*.index.json"):
        _check_index(index)
    weights = [file for file in directory.glob("*.safetensors") if file.is_file()]
    elements, tensors = _sizes(weights)
    if (config := directory / "adapter_config.json").is_file():
        _check_adapter(config, elements)
    elif weights:
        stated = _read(directory / "config.json")
        _check_kernels(directory / "config.json", stated)
        for key, most in [*((k, tensors) for k in LAYERS), *((k, elements) for k in WIDTHS)]:
            for value in _values(stated, key):
                _require_size(directory / "config.json", key, value, most)
        _check_whole(directory, elements)


def _check_whole(directory: Path, elements: int) -> None:
    """Whatever its settings are called: the model is built without contents, and counted."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        numbers = sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    except RuntimeError as e:  # more than 64 bits can count
        raise ModelError(_too_large(directory, f"that cannot be built ({e})", elements)) from e
    if numbers > PACKED * elements:
        raise ModelError(_too_large(directory, f"of {numbers} numbers", elements))


def _too_large(directory: Path, what: str, elements: int) -> str:
    return (
        f"{directory / 'config.json'} describes a model {what}, and its weights hold {elements}: "
        "to make room for it could fill the memory. Give a directory whose weights fit its "
        "configuration."
    )


def _check_index(index: Path) -> None:
    for name in set(dict(_read(index)["weight_map"]).values()):
        if not isinstance(name, str) or Path(name).name != name or name == "..":
            raise ModelError(
                f"{index} says that weights lie in {name!r}, which is no file name: a model "
                "directory may not reach beyond itself. Do not use it."
            )


def _check_kernels(config: Path, stated: dict[str, Any]) -> None:
    for key in KERNELS:
        for value in _values(stated, key):
            if "/" in json.dumps(value):  # one for all parts of a model, or one for each
                raise ModelError(
                    f"{config} states {key}={value!r}, the name of a kernel on the hub: its code "
                    f"would be fetched and run. Remove {key} from it."
                )


def _check_adapter(config: Path, elements: int) -> None:
    if not (config.parent / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{config.parent} holds no adapter_model.safetensors: weights of another kind would "
            "have to be unpickled, which runs any code in them. Convert them to safetensors."
        )
    stated = _read(config)
    if stated.get("megatron_config"):
        raise ModelError(
            f"{config} sets megatron_config: peft would import the module "
            f"{stated.get('megatron_core')!r} that it names. Remove it, or do not use the adapter."
        )
    for rank in [*_values(stated, "r"), *(stated.get("rank_pattern") or {}).values()]:
        _require_size(config, "r", rank, elements)


def _require_size(file: Path, key: str, value: Any, most: int) -> None:
    if isinstance(value, int) and value > most:
        raise ModelError(
            f"{file} states {key}={value}, more than its weights can hold: to make room for it "
            "would fill the memory. Give a directory whose weights fit its configuration."
        )


def _sizes(weights: list[Path]) -> tuple[int, int]:
    """Numbers, and tensors, in all files, from their headers."""
    elements = tensors = 0
    for file in weights:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (no mapping)
                size = 1
                for n in content.get_slice(name).get_shape():
                    size *= n
                elements, tensors = elements + size, tensors + 1
    return elements, tensors


def _values(tree: Any, key: str) -> list[Any]:
    """What stands under that key anywhere in a nested dictionary."""
    if not isinstance(tree, dict):
        return []
    below = [value for inner in tree.values() for value in _values(inner, key)]
    return ([tree[key]] if key in tree else []) + below


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file.name} is not a valid JSON file: {e}.") from e
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no JSON object.")
    return content
