"""Tensors in pieces, on disk: each process writes its own, and any number of processes reads them.

Safetensors by torch's distributed checkpoints (DCP); nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty

from srppo import distributed


def save_pieces(tensors: dict[str, DTensor], folder: Path) -> None:
    """Called by all processes; the folder is there."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(dict(tensors), storage_writer=writer)


def load_pieces(folder: Path) -> dict[str, Tensor]:
    """By all processes, who get new pieces; alone, whole tensors."""
    reader = HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    mesh = None
    if distributed.is_joined():
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(kind, (distributed.size(),))
    for name, facts in known.items():
        assert isinstance(facts, TensorStorageMetadata)
        dtype = facts.properties.dtype
        tensors[name] = (
            empty(*facts.size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
            if mesh
            else torch.empty(facts.size, dtype=dtype)
        )
    load(dict(tensors), storage_reader=reader)
    return tensors


def as_held(saved: Tensor, held: Tensor) -> Tensor:
    """A tensor in pieces or whole, as `held` is."""
    if isinstance(held, DTensor):
        if isinstance(saved, DTensor) and saved.device_mesh == held.device_mesh:
            return saved
        if isinstance(saved, DTensor):  # read on a GPU, held on the CPU
            saved = saved.full_tensor()
        return distribute_tensor(saved.to(held.device), held.device_mesh, held.placements)
    return saved.full_tensor() if isinstance(saved, DTensor) else saved
