"""Heads of unequal sizes side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_hook

from clover.attention.attention import CloverAttention
from clover.attention.ragged import LONG, Padding, as_heads, padded, weighted_sum
from families import outputs, pruned


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, LONG - 1, LONG, 2 * LONG + 1, 3 * LONG, 5 * LONG + 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_sum_that_threads_share_is_the_whole_sum(
    batch: int, tokens: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    buffer = torch.randn(batch, tokens + 7, 11, dtype=torch.float64)
    values, weights = buffer[:, :tokens, 2:9], torch.rand(batch, 3, tokens, dtype=torch.float64)
    buffer[:, tokens:] = torch.nan  # room for tokens that are not there yet
    found = weighted_sum(weights, values)
    assert found.shape == (batch, 3, 7)
    torch.testing.assert_close(found, weights @ values)


def test_gpus_are_given_heads_that_stand_at_sixteen_bytes() -> None:
    """On the meta device, which copies no numbers but says how they would lie."""
    flat = torch.empty(2, 5, 64, dtype=torch.bfloat16, device="meta")
    good, bad = (as_heads(flat[..., start : start + 32], 2) for start in (8, 3))
    assert padded(good, 16) is good
    copied = padded(bad, 16)
    assert copied is not bad and copied.shape == bad.shape
    assert copied.storage_offset() == 0 and copied.is_contiguous()
    here = torch.empty(2, 5, 64)[..., 3:35]
    assert padded(here, 32) is here  # CPUs read what they like


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), st.sampled_from([1, 2, 4]),
    st.integers(1, 3), st.integers(0, 3), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(), st.sampled_from([(2, 3), (1, 4), (1, 1), (0, 2)]),
)  # fmt: skip
def test_heads_are_padded_and_narrowed_again(
    sizes: list[tuple[int, int]], unit: int, n: int, beside: int, dtype: torch.dtype, learns: bool, shape: tuple
) -> None:
    """Columns are moved several at a time where they allow it, wherever they begin, gradients or not."""
    sizes = [(unit * qk, unit * value) for qk, value in sizes]
    padding = Padding.of(sizes, n, torch.device("cpu"), dtype)
    for moves, which, repeats in ((padding.queries, 0, n), (padding.keys, 0, 1), (padding.values, 1, 1)):
        widths = [size[which] for size in sizes for _ in range(repeats)]
        whole = torch.randn(*shape, sum(widths) + beside, dtype=dtype, requires_grad=learns)
        wide = moves.of(whole[..., beside:]).unflatten(-1, (len(widths), padding.size))
        for head, own in enumerate(whole[..., beside:].split(widths, -1)):
            assert torch.equal(wide[:, :, head, : widths[head]], own)
        if which == 0 and repeats == 1 and padding.present is not None:
            kept = padding.present.view(len(widths), padding.size)
            assert kept.sum(1).tolist() == widths and all(row[:w].all() for row, w in zip(kept, widths, strict=True))
        assert wide.requires_grad == learns
    values = [value for _, value in sizes for _ in range(n)]
    flat = torch.randn(*shape, sum(values), dtype=dtype, requires_grad=learns)
    heads = torch.stack(
        [torch.nn.functional.pad(x, (0, padding.size - x.shape[-1])) for x in flat.split(values, -1)], 2
    )
    assert torch.equal(padding.flat(heads), flat)
    longer = flat.detach().double()  # cached before autocast
    assert torch.equal(padding.flat(heads.detach().double()), longer)
    qk, value = (sum(size[i] for size in sizes) for i in (0, 1))
    row = torch.randn(*shape, (n + 1) * qk + value + beside, dtype=dtype)
    parts = row.split([n * qk, qk, value, beside], -1)[:3]
    assert all(map(torch.equal, padding.heads(*parts, row), padding.heads(*parts, None)))


@contextmanager
def listening(modules: list[Any], way: str, heard: list[Any]) -> Iterator[None]:
    """Write down each module with its input and output."""

    def hear(module: Any, args: Any, out: torch.Tensor) -> None:
        if module in modules:
            heard.append((module, *args, out))

    if way == "forward":
        for module in modules:
            module.forward = partial(said, module, module.forward, hear)
    hooks = [module.register_forward_hook(hear) for module in modules if way == "hook"]
    hooks += [register_module_forward_hook(hear)] if way == "global hook" else []
    yield
    for hook in hooks:
        hook.remove()


def said(module: Any, forward: Any, hear: Any, *args: Any) -> torch.Tensor:
    out = forward(*args)
    hear(module, args, out)
    return out


@pytest.mark.parametrize("way", ["hook", "global hook", "forward"])
def test_who_listens_to_a_projection_hears_what_it_said(way: str) -> None:
    """Queries and keys may be turned where they were computed; but not under the eyes of others."""
    parities: set[int] = set()
    heard: list[Any] = []
    for share in (0.2, 0.3, 0.4):
        model, batch = pruned("llama-gqa", share)
        expected = outputs(model, batch)
        projections = [m.qkv_proj for m in model.modules() if isinstance(m, CloverAttention)]
        parities |= {p.out_features % 2 for p in projections}
        with listening(projections, way, heard):
            torch.testing.assert_close(outputs(model, batch), expected)
        assert len(heard) == len(projections)
        while heard:
            module, x, out = heard.pop()
            assert torch.equal(out, torch.nn.functional.linear(x, module.weight, module.bias))
    assert parities == {0, 1}
