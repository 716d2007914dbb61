"""From costs to ranks: shares, thresholds and energies at every granularity, and the plan as data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clover.errors import CloverError
from clover.planning.budget import Costs, Energy, Granularity, Limits, Share, Threshold, _cluster, _Size, make_plan
from clover.planning.plan import FORMAT, BlockPlan, Group, Plan

GRANULARITIES: tuple[Granularity, ...] = ("head", "layer", "model")
SEEDS = st.integers(0, 2**31)
SHARES = st.floats(0, 0.95)


def costs(kv: int = 4, pairs: int = 0, plain: int = 8, value: int = 8, name: str = "block", **kwargs: Any) -> Costs:
    """Random costs of one block, heads of very different worth; norms unrelated to them."""

    def falling(count: int) -> torch.Tensor:
        rows = torch.rand(kv, count, dtype=torch.float64).cumsum(-1).flip(-1)
        return rows * 10.0 ** torch.randn(kv, 1, dtype=torch.float64)

    def norms(count: int) -> torch.Tensor:
        return torch.rand(kv, count, dtype=torch.float64)

    return Costs(
        name=name, part="decoder", queries=2, output_bias=False, parameters=1000,
        pair_cost=falling(pairs), plain_cost=falling(plain), value_cost=falling(value),
        pair_norm=norms(pairs), plain_norm=norms(plain), value_norm=norms(value), **kwargs,
    )  # fmt: skip


def model(seed: int, blocks: int = 2, **kwargs: Any) -> list[Costs]:
    torch.manual_seed(seed)
    return [costs(name=f"layers.{i}", **kwargs) for i in range(blocks)]


def size(entries: Sequence[Costs], which: str) -> int:
    return sum(c.kv_heads * (c.qk if which == "qk" else c.count("value")) for c in entries)


def kept(plan: Plan, which: str) -> int:
    return sum(getattr(b, f"{which}_kept") for b in plan.blocks)


def ranks(block: BlockPlan) -> dict[int, Group]:
    """The group of each head that is left."""
    return {h: g for g in block.groups for h in g.heads}


SHAPES = [{"pairs": 0, "plain": 8}, {"pairs": 4, "plain": 0}, {"pairs": 3, "plain": 6}]


# --- shares ---


@given(SEEDS, st.sampled_from(GRANULARITIES), st.sampled_from(SHAPES), st.integers(1, 4))
def test_a_share_of_zero_keeps_everything(
    seed: int, granularity: Granularity, shape: dict[str, int], groups: int
) -> None:
    plan = make_plan(model(seed, **shape), Share(0), Share(0), granularity=granularity, limits=Limits(groups=groups))
    assert plan.qk_removed == plan.vo_removed == 0
    assert all(len(b.groups) == 1 and b.groups[0].heads == (0, 1, 2, 3) for b in plan.blocks)


@given(SEEDS, SHARES, SHARES, st.sampled_from(GRANULARITIES), st.sampled_from(SHAPES), st.integers(1, 4))
def test_never_less_is_removed_than_asked(
    seed: int, qk: float, vo: float, granularity: Granularity, shape: dict[str, int], groups: int
) -> None:
    """What is charged is what is stored: groups, not single heads, and within one step of the budget."""
    entries = model(seed, kv=4, **shape)
    plan = make_plan(entries, Share(qk), Share(vo), granularity=granularity, limits=Limits(groups=groups))
    largest = {"head": 4, "layer": 4, "model": 4 * len(entries)}[granularity]  # heads that share a step
    for which, share in (("qk", qk), ("vo", vo)):
        width = largest * (2 if which == "qk" and shape["pairs"] else 1)
        whole = size(entries, which)
        floor = width * len(entries)  # every block keeps a step, whatever was asked
        assert kept(plan, which) <= max((1 - share) * whole + 1e-6, floor)
        if which == "vo":
            assert kept(plan, which) > (1 - share) * whole - width


@given(SEEDS, SHARES, st.sampled_from(SHAPES))
def test_the_qk_budget_is_spent_to_the_last_step(seed: int, share: float, shape: dict[str, int]) -> None:
    entries = model(seed, **shape)
    plan = make_plan(entries, Share(share), Share(0), limits=Limits(groups=4))
    assert kept(plan, "qk") > (1 - share) * size(entries, "qk") - 8


@given(SEEDS, SHARES, SHARES, st.sampled_from(GRANULARITIES), st.sampled_from(SHAPES))
def test_a_larger_share_never_keeps_more(
    seed: int, one: float, other: float, granularity: Granularity, shape: dict[str, int]
) -> None:
    entries = model(seed, **shape)
    less, more = sorted((one, other))
    limits = Limits(groups=4)  # as many as heads: groups that differ between the two would blur the order by a step
    small = make_plan(entries, Share(more), Share(0), granularity=granularity, limits=limits)
    large = make_plan(entries, Share(less), Share(0), granularity=granularity, limits=limits)
    assert kept(small, "qk") <= kept(large, "qk")
    small = make_plan(entries, Share(0), Share(more), granularity=granularity, limits=limits)
    large = make_plan(entries, Share(0), Share(less), granularity=granularity, limits=limits)
    assert kept(small, "vo") <= kept(large, "vo")


def test_a_shared_budget_goes_to_the_layer_that_needs_it() -> None:
    entries = model(0, blocks=2)
    entries[1] = replace(entries[1], value_cost=1e9 * entries[1].value_cost, plain_cost=1e9 * entries[1].plain_cost)
    plan = make_plan(entries, Share(0.4), Share(0.4))
    assert plan.blocks[0].vo_kept < plan.blocks[1].vo_kept == 32
    assert plan.blocks[0].qk_kept < plan.blocks[1].qk_kept == 32


@pytest.mark.parametrize("share", [0.9, 0.999])
def test_every_block_keeps_a_head(share: float) -> None:
    entries = model(3)
    entries[0] = replace(entries[0], value_cost=0 * entries[0].value_cost)
    plan = make_plan(entries, Share(share), Share(share))
    assert all(b.qk_kept > 0 and b.vo_kept > 0 for b in plan.blocks)


def test_equal_costs_are_settled_and_settled_the_same_way() -> None:
    entries = [replace(c, value_cost=torch.ones(4, 8), plain_cost=torch.ones(4, 8)) for c in model(0)]
    first, second = (make_plan(entries, Share(0.5), Share(0.5)) for _ in range(2))
    assert first == second and first.vo_removed >= 0.5


# --- granularity and groups ---


@given(SEEDS, SHARES, SHARES, st.sampled_from(SHAPES), st.integers(1, 5))
def test_groups_cover_each_head_once_and_are_few(
    seed: int, qk: float, vo: float, shape: dict[str, int], groups: int
) -> None:
    plan = make_plan(model(seed, kv=6, **shape), Share(qk), Share(vo), limits=Limits(groups=groups))
    for block in plan.blocks:
        heads = [h for g in block.groups for h in g.heads]
        assert len(heads) == len(set(heads)) and set(heads) <= set(range(6))
        assert 1 <= len(block.groups) <= groups
        assert len({(g.pairs, g.plain, g.value) for g in block.groups}) == len(block.groups)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4))
def test_heads_of_near_sizes_are_gathered(ranks: list[int], count: int) -> None:
    """As by looking at every pair of sets anew, which takes minutes where heads are many."""
    sizes = {(0, i): _Size(0, 0, rank) for i, rank in enumerate(ranks)}

    def distance(a: tuple[Any, ...], b: tuple[Any, ...]) -> float:
        centres = [sum(sizes[h].value for h in party) / len(party) for party in (a, b)]
        return len(a) * len(b) / (len(a) + len(b)) * math.dist([0, 0, centres[0]], [0, 0, centres[1]]) ** 2

    sets: list[tuple[Any, ...]] = [(head,) for head in sizes]
    while len(sets) > 1:
        near, a, b = min((distance(a, b), a, b) for i, a in enumerate(sets) for b in sets[i + 1 :])
        if len(sets) <= count and near > 0:
            break
        sets = [s for s in sets if s not in (a, b)] + [a + b]
    assert _cluster(sizes, count) == sets


def test_more_groups_follow_the_costs_closer() -> None:
    entries = model(1, blocks=2, kv=6)
    lost = []
    for groups in (1, 3, 6):
        plan = make_plan(entries, Share(0), Share(0.5), limits=Limits(groups=groups))
        lost.append(sum(
            float(entry.value_cost[h, ranks(block)[h].value if h in ranks(block) else 0 :].sum())
            for entry, block in zip(entries, plan.blocks, strict=True) for h in range(6)
        ))  # fmt: skip
    assert lost[0] > lost[1] > lost[2]


@given(SEEDS, SHARES, st.sampled_from(SHAPES))
def test_layer_gives_all_heads_of_a_block_the_same(seed: int, share: float, shape: dict[str, int]) -> None:
    plan = make_plan(model(seed, **shape), Share(share), Share(share), granularity="layer")
    assert all(len(b.groups) == 1 and b.groups[0].heads == (0, 1, 2, 3) for b in plan.blocks)


@given(SEEDS, SHARES, st.sampled_from(SHAPES))
def test_model_gives_all_heads_the_same(seed: int, share: float, shape: dict[str, int]) -> None:
    plan = make_plan(model(seed, **shape), Share(share), Share(share), granularity="model")
    assert len({b.groups for b in plan.blocks}) == 1 and plan.blocks[0].groups[0].heads == (0, 1, 2, 3)


def test_model_takes_blocks_of_different_head_counts() -> None:
    plan = make_plan([costs(kv=2), costs(kv=5)], Share(0.5), Share(0.25), granularity="model")
    assert {(g.qk, g.value) for b in plan.blocks for g in b.groups} == {(4, 6)}


# --- rotary pairs and plain directions ---


@given(SEEDS, SHARES, SHARES, st.sampled_from(GRANULARITIES), st.integers(1, 5))
def test_plain_columns_come_in_twos_beside_pairs(
    seed: int, qk: float, vo: float, granularity: Granularity, multiple: int
) -> None:
    entries = model(seed, pairs=4, plain=10)
    plan = make_plan(entries, Share(qk), Share(vo), granularity=granularity, limits=Limits(multiple=multiple))
    assert all(g.plain % 2 == 0 and g.pairs >= 1 for b in plan.blocks for g in b.groups)


def test_pairs_and_plain_directions_share_one_budget() -> None:
    entries = [replace(c, plain_cost=1e9 * c.plain_cost) for c in model(0, pairs=4, plain=8)]
    plan = make_plan(entries, Share(0.3), Share(0))
    assert all(g.plain == 8 for b in plan.blocks for g in b.groups) and plan.qk_removed >= 0.3
    entries = [replace(c, pair_cost=1e9 * c.pair_cost) for c in model(0, pairs=4, plain=8)]
    plan = make_plan(entries, Share(0.3), Share(0))
    assert all(g.pairs == 4 for b in plan.blocks for g in b.groups) and plan.qk_removed >= 0.3


def test_a_pair_is_charged_two_columns() -> None:
    plan = make_plan(model(0, pairs=8, plain=0, blocks=1, kv=1), Share(0.5), Share(0))
    assert plan.blocks[0].groups == (Group((0,), 4, 0, 8),) and plan.qk_removed == 0.5


@pytest.mark.parametrize("rule", [Share(0.5), Threshold(0.7), Energy(0.3)])
def test_blocks_whose_qk_is_fixed_stay_whole_and_are_not_charged(rule: Share | Threshold | Energy) -> None:
    entries = [costs(pairs=4, plain=0), costs(pairs=4, plain=0, fixed_qk=True)]
    plan = make_plan(entries, rule, Share(0.25))
    assert plan.blocks[1].qk_kept == 8 * sum(len(g.heads) for g in plan.blocks[1].groups)
    assert 0 < plan.blocks[0].qk_kept <= (16 if isinstance(rule, Share) else 31)


# --- threshold: the paper's rule ---


@given(SEEDS, st.floats(0, 0.7), st.floats(0, 0.7), st.sampled_from(SHAPES))
def test_threshold_keeps_what_exceeds_it_head_by_head(seed: int, qk: float, vo: float, shape: dict[str, int]) -> None:
    entries = model(seed, **shape)
    plan = make_plan(entries, Threshold(qk), Threshold(vo), limits=Limits(groups=4))
    for entry, block in zip(entries, plan.blocks, strict=True):
        groups = ranks(block)
        for head in range(4):
            value = int((entry.value_norm[head] > vo).sum())
            assert (head in groups) == (value > 0)
            if head not in groups:
                continue
            group = groups[head]
            pairs, plain = (int((getattr(entry, f"{kind}_norm")[head] > qk).sum()) for kind in ("pair", "plain"))
            assert group.value == value
            if shape["pairs"]:
                assert (group.pairs, group.plain) == (max(pairs, 1), plain + plain % 2)
            else:
                assert group.plain == max(plain, 1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_threshold_of_a_party_is_that_of_its_neediest_head(granularity: Granularity) -> None:
    entries = model(0)
    plan = make_plan(entries, Threshold(0.5), Threshold(0.5), granularity=granularity, limits=Limits(groups=1))
    for entry, block in zip(entries, plan.blocks, strict=True):
        least = int((entry.value_norm > 0.5).sum(-1).max())
        assert all(g.value >= least for g in block.groups)


def test_a_direction_just_at_the_threshold_goes() -> None:
    entry = replace(costs(kv=1, value=2), value_norm=torch.tensor([[0.5, 0.25]], dtype=torch.float64))
    assert make_plan([entry], Share(0), Threshold(0.25)).blocks[0].vo_kept == 1


# --- energy ---


@given(SEEDS, st.floats(0.05, 1), st.floats(0.05, 1))
def test_energy_keeps_the_fewest_directions_that_hold_it(seed: int, qk: float, vo: float) -> None:
    entries = model(seed, kv=3)
    plan = make_plan(entries, Energy(qk), Energy(vo), limits=Limits(groups=3))
    for entry, block in zip(entries, plan.blocks, strict=True):
        for head, group in ranks(block).items():
            for cost, rank, share in ((entry.plain_cost, group.plain, qk), (entry.value_cost, group.value, vo)):
                whole = float(cost[head].sum())
                assert float(cost[head, :rank].sum()) >= share * whole * (1 - 1e-12)
                assert rank == 1 or float(cost[head, : rank - 1].sum()) < share * whole * (1 + 1e-12)


def test_all_energy_is_everything() -> None:
    plan = make_plan(model(0, pairs=2, plain=4), Energy(1), Energy(1))
    assert plan.qk_removed == plan.vo_removed == 0


# --- limits ---


@given(SEEDS, SHARES, SHARES, st.sampled_from([2, 3, 4]), st.integers(1, 8), st.sampled_from(GRANULARITIES))
def test_ranks_are_multiples_above_the_minimum(
    seed: int, qk: float, vo: float, multiple: int, minimum: int, granularity: Granularity
) -> None:
    entries = model(seed, plain=12, value=12)
    limits = Limits(multiple=multiple, minimum=minimum)
    plan = make_plan(entries, Share(qk), Share(vo), granularity=granularity, limits=limits)
    for group in (g for b in plan.blocks for g in b.groups):
        assert group.plain % multiple == 0 and group.value % multiple == 0
        assert group.plain >= minimum and group.value >= minimum


def test_a_head_smaller_than_the_limits_is_kept_whole() -> None:
    plan = make_plan([costs(plain=3, value=3)], Share(0.5), Share(0.5), granularity="layer", limits=Limits(multiple=8))
    assert plan.blocks[0].groups == (Group((0, 1, 2, 3), 0, 3, 3),)


@given(SEEDS, SHARES)
def test_multiples_count_columns_so_pairs_need_half(seed: int, share: float) -> None:
    plan = make_plan(model(seed, pairs=8, plain=0), Share(share), Share(0), limits=Limits(multiple=4, minimum=6))
    assert all(g.qk % 4 == 0 and g.qk >= 6 for b in plan.blocks for g in b.groups)


@pytest.mark.parametrize("rule", [Share(0.8), Threshold(0.99)])
def test_heads_stay_where_they_may_not_go(rule: Share | Threshold) -> None:
    entries = model(2)
    plan = make_plan(entries, Share(0), rule, limits=Limits(drop_heads=False))
    assert all(sorted(ranks(b)) == [0, 1, 2, 3] for b in plan.blocks)


def test_a_worthless_head_goes_whole_with_its_queries() -> None:
    entry = costs()
    entry.value_cost[2] = 0
    plan = make_plan([entry], Share(0), Share(0.25))
    assert 2 not in ranks(plan.blocks[0])
    assert plan.qk_removed == 0.25 == plan.vo_removed


@pytest.mark.parametrize("name", ["groups", "multiple", "minimum", "tile"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(CloverError, match=f"limit {name} is 0; it must be a whole number of at least 1"):
        Limits(**{name: 0})


# --- mistakes ---


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_shares_outside_the_range_are_refused(share: float) -> None:
    with pytest.raises(CloverError, match=f"share to remove is {share}; it must be at least 0 and less than 1"):
        Share(share)


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_impossible_thresholds_are_refused(value: float) -> None:
    with pytest.raises(CloverError, match=f"threshold is {value}; it must be a finite number that is not negative"):
        Threshold(value)


@pytest.mark.parametrize("share", [0, -1, 1.01, math.nan])
def test_impossible_energies_are_refused(share: float) -> None:
    with pytest.raises(CloverError, match=f"energy to keep is {share}; it must be more than 0 and at most 1"):
        Energy(share)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_threshold_that_removes_everything_is_refused(granularity: Granularity) -> None:
    entries = [costs(name="layers.0"), replace(costs(name="layers.1"), value_norm=torch.zeros(4, 8))]
    threshold = Threshold(2.0 if granularity == "model" else 0.01)
    name = "layers.0" if granularity == "model" else "layers.1"
    with pytest.raises(CloverError, match=f"{name} would lose every direction; lower the ratio or the threshold"):
        make_plan(entries, Share(0), threshold, granularity=granularity)


def test_model_granularity_needs_equal_heads() -> None:
    with pytest.raises(CloverError, match="needs the same head size in all blocks; use 'layer' or 'head'"):
        make_plan([costs(value=8), costs(value=4)], Share(0), Share(0.5), granularity="model")


# --- the plan as data ---


@given(SEEDS, SHARES, st.sampled_from(SHAPES))
def test_plans_survive_json(seed: int, share: float, shape: dict[str, int]) -> None:
    plan = make_plan(model(seed, **shape), Share(share), Share(share))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_plan_counts_what_it_keeps() -> None:
    block = BlockPlan("b", "decoder", 3, 4, 10, 6, (Group((0, 2), 2, 2, 3), Group((3,), 1, 0, 6)), False, 0)
    assert block.groups[0].qk == 6 and block.qk_kept == 14 and block.vo_kept == 12
    plan = Plan((block,))
    assert plan.qk_removed == pytest.approx(26 / 40) and plan.vo_removed == pytest.approx(0.5)


DAMAGES: dict[str, dict[str, Any]] = {
    "unknown field": {"surprise": 1},
    "no name": {"name": ...},
    "groups no list": {"groups": 3},
    "group without heads": {"groups": [{"pairs": 0, "plain": 4, "value": 4}]},
    "group with an unknown field": {"groups": [{"heads": [0], "pairs": 0, "plain": 4, "value": 4, "x": 1}]},
    "rank above the head size": {"groups": [{"heads": [0], "pairs": 0, "plain": 9, "value": 4}]},
    "pairs above the head size": {"groups": [{"heads": [0], "pairs": 5, "plain": 0, "value": 4}]},
    "value above the head size": {"groups": [{"heads": [0], "pairs": 0, "plain": 4, "value": 9}]},
    "value of zero": {"groups": [{"heads": [0], "pairs": 0, "plain": 4, "value": 0}]},
    "nothing of Q-K": {"groups": [{"heads": [0], "pairs": 0, "plain": 0, "value": 4}]},
    "negative rank": {"groups": [{"heads": [0], "pairs": -1, "plain": 4, "value": 4}]},
    "a head twice": {"groups": [{"heads": [1, 1], "pairs": 0, "plain": 4, "value": 4}]},
    "a head that is not there": {"groups": [{"heads": [4], "pairs": 0, "plain": 4, "value": 4}]},
    "a head that is not there, of very many": {
        "kv_heads": 10**12,
        "groups": [{"heads": [10**12], "pairs": 0, "plain": 4, "value": 4}],
    },
    "a rank that is text": {"groups": [{"heads": [0], "pairs": 0, "plain": "4", "value": 4}]},
    "no groups": {"groups": []},
    "a group of no heads": {"groups": [{"heads": [], "pairs": 0, "plain": 4, "value": 4}]},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_plans_are_refused(damage: str) -> None:
    data = make_plan(model(0), Share(0.5), Share(0.5)).to_dict()
    broken = {k: v for k, v in (data["blocks"][1] | DAMAGES[damage]).items() if v is not ...}
    with pytest.raises(CloverError, match=r"(?s)clover plan .*restore"):
        Plan.from_dict(data | {"blocks": [data["blocks"][0], broken]})


@pytest.mark.parametrize("format", [None, 0, FORMAT + 1, "x"])
def test_a_plan_of_another_format_is_refused(format: Any) -> None:
    """The columns of a model that was saved with it may lie otherwise."""
    data = make_plan(model(0), Share(0.5), Share(0.5)).to_dict()
    with pytest.raises(CloverError, match=f"has format {format!r}, and this version reads {FORMAT}; install"):
        Plan.from_dict(data | {"format": format})
    with pytest.raises(CloverError, match="has format"):  # whatever it holds
        Plan.from_dict({"format": format, "blocks": [{"new": 1}]})


@pytest.mark.parametrize("data", [{}, {"blocks": None}, {"blocks": [1]}])
def test_what_is_no_plan_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(CloverError, match=r"(?s)the clover plan in config.json is damaged .*; restore the file"):
        Plan.from_dict(data)
