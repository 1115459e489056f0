"""Weights in pieces: of every layer each process holds a share, and a layer is whole only while it
is computed (torch's `fully_shard`, FSDP2).

Gathering a layer and summing its gradients involves all processes, so all of them do the same
number of passes; `microbatches` sees to it. What lies outside the layers (embeddings, last norm,
output head) is whole as long as the model is `gathered`, for the output head is used on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from srppo import distributed
from srppo.errors import ModelError
from srppo.models.load import load_model, pick_device
from srppo.models.precision import Compute


def load_sharded(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    base: str | None = None,
    offload: bool = False,
    compute: Compute = "float32",
    lean: bool = False,
) -> PreTrainedModel:
    """As `load_model`, in pieces. Only the first process reads the weights.

    Args:
        offload: the pieces wait in CPU memory.
        compute: as for `in_float32`.
        lean: no process ever has all layers whole, not even to decode.
    """
    whole = load_model(name, dtype, "cpu", base=base) if distributed.is_first() else None
    config = distributed.from_first(lambda: whole.config if whole else None)
    place = pick_device(device)
    model = _skeleton(config, getattr(torch, dtype), place, compute, offload=offload)
    model.lean = lean
    set_model_state_dict(
        model,
        whole.state_dict() if whole else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    return model


def in_float32(
    model: PreTrainedModel, device: torch.device, compute: Compute = "float32"
) -> PreTrainedModel:
    """Another sharded model with the same weights, in float32, on `device`, which is not the
    model's own where that waits in CPU memory; its layers are gathered and computed in the format
    `compute`, their gradients added up in float32."""
    other = _skeleton(model.config, torch.float32, device, compute)
    other.lean = model.lean
    other.load_state_dict({k: v.detach().float() for k, v in model.state_dict().items()})
    return other


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """All of a sharded model in the CPU memory of the first process, nothing in the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[None]:
    """Inside, what lies outside the layers is whole. Nothing happens to a model that is so already,
    among them those that are not sharded."""
    head = model.get_output_embeddings()
    if not isinstance(model, FSDPModule) or not isinstance(head.weight, DTensor):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@contextmanager
def whole(model: PreTrainedModel) -> Iterator[None]:
    """Inside, all of a `gathered` model is whole, unless it is lean: decoding, which takes every
    process another number of passes, involves nobody else."""
    cut = [] if needs_all(model) else model.modules()
    layers = [m for m in cut if isinstance(m, FSDPModule) and m is not model]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True, recurse=False)


def needs_all(model: PreTrainedModel) -> bool:
    """Whether each pass that decodes involves all processes."""
    return bool(getattr(model, "lean", False))


def _skeleton(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    compute: Compute = "float32",
    *,
    offload: bool = False,
) -> PreTrainedModel:
    """A model in pieces, in eval mode; the weights hold anything."""
    with init_empty_weights(include_buffers=False):  # buffers are computed, not loaded
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers that srppo knows how to shard: every process "
            "would hold all of it. Set model.shard=false."
        )
    policy = MixedPrecisionPolicy()
    if compute == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    pinned = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (distributed.size(),)),
        "offload_policy": pinned if offload else OffloadPolicy(),
    }
    for layer in layers:
        fully_shard(layer, mp_policy=policy, **settings)
    # Outside the layers weights stay in their own format: chunks of the output head add up in it.
    fully_shard(model, **settings)
    place = torch.device("cpu") if offload else device
    model._apply(lambda x: torch.empty_like(x, device=place) if x.is_meta else x)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are sums over the whole minibatch
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.read = MethodType(_read, model)
    register_fsdp_forward_method(model, "read")
    return model.eval()


def _read(model: PreTrainedModel, **inputs: Any) -> Tensor:
    hidden: Tensor = model.base_model(**inputs).last_hidden_state
    return hidden.clone()  # no view: FSDP's hook on the way back would be lost with it
