"""A key-value cache that neither a new token nor a row that leaves makes copy the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

GROWTH = 64
"""Tokens of room added at a time."""


class GrowingLayer(DynamicLayer):
    """transformers' growing layer with spare room at the end, where new tokens are written."""

    rooms: list[Tensor]
    """Of keys and of values, (b, heads, capacity, width) each, the width their own; `keys` and
    `values` are their filled parts."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (b, heads, new, width) states; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = [x[..., :0, :] for x in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.rooms[0].shape[-2]:
            self.rooms = [_larger(room, start, end + GROWTH) for room in self.rooms]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[..., start:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self.rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; only those that change their place are copied."""
        end = self.get_seq_length()
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        for room in self.rooms:
            room[moved] = room[indices[moved]]
        self.rooms = [room[: len(indices)] for room in self.rooms]
        self.keys, self.values = (room[..., :end, :] for room in self.rooms)


def _larger(room: Tensor, filled: int, capacity: int) -> Tensor:
    b, heads, _, width = room.shape
    larger = room.new_empty(b, heads, capacity, width)
    larger[..., :filled, :] = room[..., :filled, :]
    return larger


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """A model's cache; layers of other kinds (sliding windows, states) are transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Only these rows go on, in this order; of recurrent layers (Qwen3.5, LFM2) their states."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.reorder_cache(rows)
        else:
            layer.batch_select_indices(rows)


def without(finished: Tensor) -> Tensor:
    """Rows that go on, (b,) bool -> indices: each hole is filled from the end, the rest stay."""
    left = int((~finished).sum())
    keep = torch.arange(left, device=finished.device)
    keep[finished[:left]] = left + (~finished[left:]).nonzero().squeeze(1)
    return keep
