"""A recipe's models in their roles: full copies, or adapters on one."""

from __future__ import annotations

from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from srppo import distributed
from srppo.config_data import DataConfig
from srppo.config_model import LoRAConfig, ModelConfig
from srppo.errors import ConfigError, ModelError
from srppo.models.load import (
    check_ids,
    check_same_tokens,
    context_length,
    frequency_switch,
    has_tokenizer,
    is_adapter,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
)
from srppo.models.lora import Backbone
from srppo.models.precision import Compute
from srppo.models.roles import Role, ShardedRole
from srppo.models.sharding import load_sharded


def start_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The SFT model's where there is one, checked against the base's and against the models."""
    tokenizer = load_tokenizer(config.base)
    if config.sft and has_tokenizer(config.sft):
        base, tokenizer = tokenizer, load_tokenizer(config.sft)
        check_same_tokens(base, tokenizer, config.base, config.sft)
    for name in (n for n in (config.base, config.sft) if n and not is_adapter(n)):
        check_ids(tokenizer, load_config(name), name)
    return tokenizer


def check_context(config: ModelConfig, data: DataConfig) -> None:
    """Raises ConfigError if the longest sequence is longer than the models have positions for."""
    longest = data.max_prompt_tokens + data.max_response_tokens
    for name in (n for n in (config.base, config.sft) if n and not is_adapter(n)):
        context = context_length(name)
        if context is not None and longest > context:
            raise ConfigError(
                f"data.max_prompt_tokens={data.max_prompt_tokens} + data.max_response_tokens="
                f"{data.max_response_tokens} = {longest} is more than the {context} positions "
                f"of {name!r}: long sequences would be scored wrongly. Try {context // 2} "
                "for each."
            )
        if (switch := frequency_switch(name)) and longest > switch:
            raise ConfigError(
                f"{name!r} counts positions otherwise once one passes {switch} (longrope), and "
                f"data.max_prompt_tokens={data.max_prompt_tokens} + data.max_response_tokens="
                f"{data.max_response_tokens} = {longest}: what is cached while sampling would not "
                f"be what is scored. Try {switch // 2} for each."
            )


def start_sft(config: ModelConfig, seed: int, compute: Compute = "float32") -> Role:
    """pi_base as stage 1 trains it: all of it in float32, or under a fresh adapter.

    `compute` as for `Role.successor`.
    """
    if config.lora:
        return _backbone(config.base, config, config.lora, seed).new()
    if config.shard and distributed.is_joined():
        lean = config.shard_sampling
        model = load_sharded(config.base, "float32", config.device, compute=compute, lean=lean)
        return ShardedRole(model, pick_device(config.device))
    return Role(load_model(config.base, "float32", config.device))


def start_frozen(config: ModelConfig, sft: str | Path, seed: int) -> tuple[Role, Role]:
    """pi_base and pi_sft. With `model.lora` they share one copy of the weights if `sft` is an
    adapter, and so will the policy; a whole `sft` is what the policy's adapter lies on."""
    sft = str(sft)
    if not config.lora:
        return _frozen(config.base, config), _frozen(sft, config)
    if is_adapter(sft):
        backbone = _backbone(config.base, config, config.lora, seed)
        return backbone.bare(), backbone.load(sft)
    return _frozen(config.base, config), _backbone(sft, config, config.lora, seed).bare()


def _backbone(name: str, config: ModelConfig, lora: LoRAConfig, seed: int) -> Backbone:
    if is_adapter(name):
        raise ModelError(
            f"model.base={name!r} is an adapter: another one over it could not be saved on its "
            "own. Merge it into its base model, and give that."
        )
    if config.shard and distributed.is_joined():
        lean = config.shard_sampling
        return Backbone(load_sharded(name, config.dtype, config.device, lean=lean), lora, seed)
    model = load_model(name, config.dtype, config.device, quantize=config.quantize)
    return Backbone(model, lora, seed)


def _frozen(name: str, config: ModelConfig) -> Role:
    """With weights of its own; with `model.offload`, in CPU memory until it is active."""
    device = pick_device(config.device)
    below = config.base if name != config.base else None
    if config.shard and distributed.is_joined():
        pieces = load_sharded(
            name,
            config.dtype,
            config.device,
            base=below,
            offload=config.offload,
            lean=config.shard_sampling,
        )
        return ShardedRole(pieces, device).freeze()
    model = load_model(
        name,
        config.dtype,
        "cpu" if config.offload else config.device,
        quantize=config.quantize,
        base=below,
    )
    return Role(model, device).freeze()
