"""A key-value cache that neither a new token nor a row that leaves makes copy the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

GROWTH = 64
"""Tokens of room added at a time."""


class GrowingLayer(DynamicLayer):
    """transformers' growing layer with spare room at the end, where new tokens are written."""

    room: Tensor
    """(2, b, heads, capacity, width): keys and values; `keys` and `values` are its filled part."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (b, heads, new, width) states; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = key_states.new_empty(2, *key_states.shape[:2], 0, key_states.shape[-1])
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.room.shape[-2]:
            b, heads, _, width = key_states.shape
            larger = key_states.new_empty(2, b, heads, end + GROWTH, width)
            larger[..., :start, :] = self.room[..., :start, :]
            self.room = larger
        self.room[0, ..., start:end, :] = key_states
        self.room[1, ..., start:end, :] = value_states
        self.keys, self.values = self.room[..., :end, :].unbind(0)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; only those that change their place are copied."""
        end = self.get_seq_length()
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        self.room[:, moved] = self.room[:, indices[moved]]
        self.room = self.room[:, : len(indices)]
        self.keys, self.values = self.room[..., :end, :].unbind(0)


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """A model's cache; layers of other kinds (sliding windows, states) are transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def without(finished: Tensor) -> Tensor:
    """Rows that go on, (b,) bool -> indices: each hole is filled from the end, the rest stay."""
    left = int((~finished).sum())
    keep = torch.arange(left, device=finished.device)
    keep[finished[:left]] = left + (~finished[left:]).nonzero().squeeze(1)
    return keep
