"""The cache layer that grows in place holds what transformers' own would hold, whatever is done to it."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from clover.attention.cache import LEAST, STEP, GrowingLayer, append, grow
from families import pruned

Step = tuple[str, int]


def states(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 1, tokens, 5), torch.randn(batch, 1, tokens, 3)


def same(a: Any, b: Any) -> bool:
    return torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 90)),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.sampled_from(["reorder", "repeat", "select", "copy", "reset"]), st.just(0)),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(STEPS, st.booleans())
def test_it_holds_what_a_dynamic_layer_holds(steps: list[Step], rounded: bool) -> None:
    with patch("clover.attention.cache.ANY_LENGTH", () if rounded else ("cpu",)):
        follow(steps, rounded)


def follow(steps: list[Step], rounded: bool) -> None:
    """Do the same to both kinds of layers; with ``rounded``, what lies behind the last token is finite, too."""
    ours, theirs, batch = GrowingLayer(), DynamicLayer(), 2
    for kind, count in [("update", 2), *steps]:
        roomy = ours.stepped() is not None
        if kind == "update":
            fresh = states(batch, count)
            for got, want in zip(ours.update(*fresh), theirs.update(*fresh), strict=True):
                assert torch.equal(got, want)
        elif kind == "copy":
            ours = copy.deepcopy(ours)
        elif kind == "reset":
            ours.reset()
            theirs.reset()
            assert ours.get_seq_length() == 0
            continue
        elif theirs.get_seq_length() <= count:
            continue
        elif kind == "crop":
            for layer in (ours, theirs):
                layer.crop(-count)
        elif kind == "reorder":
            for layer in (ours, theirs):
                layer.reorder_cache(torch.arange(batch).flip(0))
        elif kind == "repeat" and batch < 5:
            for layer in (ours, theirs):
                layer.batch_repeat_interleave(2)
            batch *= 2
        elif kind == "select":
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([batch - 1]))
            batch = 1
        assert theirs.get_seq_length() == 0 or same(ours, theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()
        longer = ours.stepped()
        assert longer or not (kind == "update" or (roomy and kind in ("crop", "copy")))
        for held, more in zip((ours.keys, ours.values), longer or (), strict=bool(longer)):
            assert torch.equal(more[:, : held.shape[2]], held[:, 0]) and (not rounded or more.isfinite().all())
            assert more.shape[1] % STEP == 0


def test_a_token_is_written_without_moving_the_others() -> None:
    layer = GrowingLayer()
    layer.update(*states(1, 10))
    place = layer.keys.data_ptr(), layer.values.data_ptr()
    room = layer.rooms["keys"].buffer.shape[1]
    assert room >= 10 + LEAST
    for _ in range(room - 10):
        layer.update(*states(1, 1))
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == place
    layer.update(*states(1, 1))
    assert layer.keys.data_ptr() != place[0], "full, so it has moved"
    assert layer.keys.shape == (1, 1, room + 1, 5)
    assert layer.keys.nbytes == 4 * 5 * (room + 1), "room is not counted as held"


def test_cropping_moves_nothing() -> None:
    layer, fresh = GrowingLayer(), states(1, 1)
    keys, _ = layer.append(*(x[:, 0] for x in states(1, 10)))
    layer.crop(-3)
    longer, _ = layer.append(*(x[:, 0] for x in fresh))
    assert longer.data_ptr() == keys.data_ptr() and longer.shape[1] == 8
    assert torch.equal(longer[:, 7:], fresh[0][:, 0])


def test_a_copy_goes_on_outside_of_the_inference_mode_it_was_made_in() -> None:
    layer = GrowingLayer()
    layer.update(*states(1, 3))
    with torch.inference_mode():
        other = copy.deepcopy(layer)
    assert torch.equal(other.update(*states(1, 1))[0][:, :, :3], layer.keys)


def test_keys_of_several_heads_are_held_as_they_are() -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    for tokens in (3, 1):
        fresh = torch.randn(2, 4, tokens, 5), torch.randn(2, 4, tokens, 5)
        for layer in (ours, theirs):
            layer.update(*fresh)
        assert same(ours, theirs)


def test_copies_do_not_share_room() -> None:
    layer = GrowingLayer()
    layer.update(*states(1, 4))
    other = copy.deepcopy(layer)
    fresh = states(1, 1), states(1, 1)
    layer.update(*fresh[0])
    other.update(*fresh[1])
    assert torch.equal(layer.keys[:, :, 4:], fresh[0][0]) and torch.equal(other.keys[:, :, 4:], fresh[1][0])


def test_gradients_go_through_the_cache() -> None:
    layer = GrowingLayer()
    keys, values = (x.requires_grad_() for x in states(1, 3))
    layer.update(keys, values)
    held, _ = layer.update(*states(1, 2))
    held.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


@pytest.mark.parametrize("offloading", [False, True])
def test_only_empty_dynamic_layers_are_replaced(offloading: bool) -> None:
    cache = DynamicCache()
    cache.update(*states(1, 2), 0)
    cache.offloading = offloading
    cache.layers += [DynamicLayer(), StaticLayer(max_cache_len=4), DynamicLayer()]
    grow(cache, 0)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, DynamicLayer, StaticLayer, DynamicLayer]
    grow(cache, 1)
    new = DynamicLayer if offloading else GrowingLayer
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, new, StaticLayer, new]
    grow(cache, 4)
    assert type(cache.layers[4]) is new


def test_what_memory_held_before_is_not_saved() -> None:
    layer = GrowingLayer()
    layer.update(*states(2, 3))
    layer.rooms["keys"].buffer[:, 3:] = 7
    again = pickle.loads(pickle.dumps(layer))
    assert same(again, layer) and not again.rooms["keys"].buffer[:, 3:].any()


def test_a_cache_that_updates_in_its_own_way_is_asked() -> None:
    class Counting(DynamicCache):
        asked = 0

        def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            self.asked += 1
            return super().update(*args, **kwargs)

    cache, fresh = Counting(), [x[:, 0] for x in states(2, 3)]
    for _ in range(2):
        keys, values = append(cache, 0, *fresh)
    assert cache.asked == 2
    assert torch.equal(keys, fresh[0].repeat(1, 2, 1)) and torch.equal(values, fresh[1].repeat(1, 2, 1))


def test_a_pruned_model_fills_it() -> None:
    model, batch = pruned("llama-gqa")
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    assert all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def test_copies_of_a_layer_go_on_apart() -> None:
    layer = GrowingLayer()
    layer.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    other = copy.copy(layer)
    keys, _ = layer.update(torch.full((1, 1, 1, 2), 2.0), torch.zeros(1, 1, 1, 2))
    twin, _ = other.update(torch.full((1, 1, 1, 2), 3.0), torch.zeros(1, 1, 1, 2))
    assert keys[0, 0, -1, 0] == 2 and twin[0, 0, -1, 0] == 3
    other = copy.copy(layer)
    layer.crop(-2)
    layer.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert other.keys[0, 0, :, 0].tolist() == [1, 1, 1, 2]
