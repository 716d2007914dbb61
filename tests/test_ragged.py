"""Heads of unequal sizes side by side."""

from __future__ import annotations

import pytest
import torch

from clover.attention.ragged import LONG, as_heads, padded, weighted_sum


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
