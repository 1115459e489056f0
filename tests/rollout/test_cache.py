"""The growing cache: what transformers' own would hold, without its copies."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import tiny
from srppo.rollout.cache import GROWTH, GrowingLayer, growing_cache, without


def states(b, new):
    return torch.randn(2, b, 2, new, 4).unbind(0)


def test_it_holds_what_transformers_own_cache_holds():
    """Through growth beyond its room, and rows that leave and change places."""
    torch.manual_seed(0)
    config = tiny.model().config
    ours, theirs = growing_cache(config), DynamicCache(config=config)
    assert all(isinstance(layer, GrowingLayer) for layer in ours.layers)
    b = 6
    for new, keep in [(5, None), (1, [0, 5, 2, 4]), (GROWTH, None), (3, [3, 1]), (1, [0])]:
        for layer in range(len(ours.layers)):
            keys, values = states(b, new)
            found = ours.update(keys, values, layer)
            expected = theirs.update(keys, values, layer)
            assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
        if keep:
            for cache in (ours, theirs):
                cache.batch_select_indices(torch.tensor(keep))
            b = len(keep)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_new_token_copies_no_old_one():
    layer = GrowingLayer()
    layer.update(*states(3, 4))
    before = layer.rooms[0].data_ptr()
    for _ in range(GROWTH):
        keys, _ = layer.update(*states(3, 1))
        assert keys.data_ptr() == before
    layer.update(*states(3, 1))
    assert layer.rooms[0].data_ptr() != before


def test_keys_and_values_may_differ_in_width():
    """As in DeepSeek's latent attention."""
    ours, theirs = GrowingLayer(), DynamicLayer()
    for new in (3, 1, GROWTH):
        keys, values = torch.randn(2, 2, new, 6), torch.randn(2, 2, new, 4)
        found, expected = ours.update(keys, values), theirs.update(keys, values)
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def test_sliding_windows_keep_transformers_own_layers():
    model = tiny.model("mistral")
    model.config.sliding_window = 4
    assert not any(isinstance(x, GrowingLayer) for x in growing_cache(model.config).layers)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_holes_are_filled_from_the_end_and_the_rest_stay(finished):
    keep = without(torch.tensor(finished)).tolist()
    assert sorted(keep) == [i for i, done in enumerate(finished) if not done]
    assert all(i == place or finished[place] for place, i in enumerate(keep))
