"""Whole tiles of what a block keeps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clover.planning.budget import Limits, Share, Threshold, make_plan
from clover.planning.spend import Curve, spend
from test_budget import SEEDS, costs, kept, model, ranks, size

LARGE = [{"pairs": 0, "plain": 64}, {"pairs": 32, "plain": 0}, {"pairs": 16, "plain": 32}]


@given(SEEDS, st.floats(0.05, 0.9), st.sampled_from(LARGE), st.integers(1, 4))
def test_large_blocks_keep_whole_tiles(seed: int, share: float, shape: dict[str, int], groups: int) -> None:
    """Rows of the projections: three for each Q-K column (two queries read a key), one for each V-O column."""
    entries = model(seed, value=64, **shape)
    plan = make_plan(entries, Share(share), Share(share), limits=Limits(groups=groups))
    for which in ("qk", "vo"):
        due = (1 - share) * size(entries, which)
        assert kept(plan, which) <= due
        if groups == 4:  # a step is one head's
            assert all(getattr(b, f"{which}_kept") % 16 == 0 for b in plan.blocks)
            assert kept(plan, which) > due - 2 * 16


@settings(max_examples=20)
@given(SEEDS, st.floats(0.1, 0.6))
def test_many_heads_in_few_groups_keep_whole_tiles(seed: int, share: float) -> None:
    """A step is then that of many heads, and what fills a tile takes steps of several groups."""
    entries = model(seed, blocks=1, kv=25, pairs=32, plain=0, value=64)
    plan = make_plan(entries, Share(share), Share(share))
    for block in plan.blocks:
        assert block.qk_kept % 16 == block.vo_kept % 16 == 0
    for which in ("qk", "vo"):
        due = (1 - share) * size(entries, which)
        assert due - 0.08 * size(entries, which) < kept(plan, which) <= due


@settings(max_examples=20)
@given(SEEDS, st.sampled_from(LARGE))
def test_whole_tiles_cost_next_to_nothing(seed: int, shape: dict[str, int]) -> None:
    entries = model(seed, value=64, **shape)

    def lost(tile: int) -> float:
        plan = make_plan(entries, Share(0.5), Share(0.5), limits=Limits(tile=tile))
        kept = [(c, h, g.value) for c, b in zip(entries, plan.blocks, strict=True) for h, g in ranks(b).items()]
        return float(
            sum(c.value_cost.sum() for c in entries) - sum(c.value_cost[h, :value].sum() for c, h, value in kept)
        )

    assert lost(16) < 1.2 * lost(1)


def test_steps_too_coarse_for_tiles_are_left_alone() -> None:
    """Five heads that share a rank add five columns at a time: 80 are the first that fill tiles of 16."""
    entries = [costs(kv=5, plain=64, value=64)]
    plan = make_plan(entries, Share(0.3), Share(0.3), granularity="layer")
    assert plan == make_plan(entries, Share(0.3), Share(0.3), granularity="layer", limits=Limits(tile=1))


def test_a_threshold_keeps_what_it_says_whatever_the_tiles() -> None:
    entries = model(0, value=64, plain=64)
    assert make_plan(entries, Threshold(0.5), Threshold(0.5)) == make_plan(
        entries, Threshold(0.5), Threshold(0.5), limits=Limits(tile=1)
    )


@pytest.mark.parametrize("columns", [100, 50])
def test_what_is_whole_is_not_brought_to_tiles(columns: int) -> None:
    """Two heads of 100 columns fill no whole tiles of 16, and with the budget for all of them nothing may go."""
    curves = [Curve(((0, h),), "value", 1, tuple(range(columns + 1)), (1.0,) * columns, 0) for h in range(2)]
    assert spend(curves, 2 * columns, True, {0: 16}) == [columns] * 2
    less = spend(curves, 2 * columns - 1, True, {0: 16})
    assert sum(less) <= 2 * columns - 1 and sum(less) % 16 == 0
