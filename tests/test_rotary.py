"""Pairs and gains under RoPE against explicit features, brute force and plain least squares."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from clover.decomposition.rotary import RIDGE, by_energy, chosen, eliminate, features, fit_gains, gained, white_gram

SEEDS = st.integers(0, 2**31)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """RoPE by complex numbers: ``x`` (..., tokens, columns), real parts in the first half, one position a token."""
    z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(1, dtype=x.dtype), positions[:, None] * frequencies)
    return torch.cat([z.real, z.imag], -1)


def random_features(n: int, pairs: int, rows: int = 60) -> Tensor:
    """Correlated features ``(1, n, rows, 2 * pairs)``, the kind that refitted gains can make use of."""
    base = torch.randn(1, n, rows, 2 * pairs, dtype=torch.float64)
    mix = torch.randn(2 * pairs, 2 * pairs, dtype=torch.float64) * torch.rand(2 * pairs, dtype=torch.float64)
    return base @ mix


def gram_of(f: Tensor) -> Tensor:
    return f.mT @ f


def ridge_of(gram: Tensor) -> Tensor:
    return RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)


def least_squares(f: Tensor, kept: list[int]) -> tuple[Tensor, float]:
    """Gains ``(pairs, 2)`` of one query head's kept pairs by ``lstsq`` on ``f`` (rows, 2 * pairs), and their cost."""
    pairs = f.shape[1] // 2
    columns = kept + [p + pairs for p in kept]
    ridge = float(ridge_of(gram_of(f))) ** 0.5
    start = torch.cat([torch.ones(pairs), torch.zeros(pairs)]).to(f)
    # Rows below the features pull every gain, those of the removed pairs too, towards its start.
    tall = torch.cat([f, ridge * torch.eye(2 * pairs, dtype=f.dtype)])
    target = tall @ start
    solution = torch.linalg.lstsq(tall[:, columns], target.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    cost = float((target - tall[:, columns] @ solution).square().sum())
    return torch.stack(solution.chunk(2), -1), cost


# --- features ---


@given(SEEDS, st.integers(1, 6), st.integers(0, 5000))
def test_real_parts_sum_to_the_logit_of_transformers_rope(seed: int, pairs: int, offset: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(2, 4, 2 * pairs, dtype=torch.float64), torch.randn(2, 7, 2 * pairs, dtype=torch.float64)
    angles = torch.outer(offset + torch.arange(7).double(), 10000.0 ** -torch.rand(pairs).double()).repeat(1, 2)
    q_turned, _ = apply_rotary_pos_emb(q, q, angles[3:].cos(), angles[3:].sin(), unsqueeze_dim=0)
    k_turned, _ = apply_rotary_pos_emb(k, k, angles.cos(), angles.sin(), unsqueeze_dim=0)
    real = features(q_turned, k_turned)[..., :pairs]
    torch.testing.assert_close(real.sum(-1), q_turned @ k_turned.mT)


@given(SEEDS)
def test_features_are_the_parts_of_one_complex_number_a_pair(seed: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(4, 6), torch.randn(5, 6)
    z = torch.complex(*q.chunk(2, -1))[:, None] * torch.complex(*k.chunk(2, -1)).conj()
    torch.testing.assert_close(features(q, k), torch.cat([z.real, z.imag], -1))


def test_white_gram_is_the_expected_gram_of_the_features() -> None:
    q, k = torch.randn(1, 2, 6, 5), torch.randn(1, 6, 5)
    x, y = torch.randn(100_000, 5), torch.randn(100_000, 5)
    angles = torch.rand(100_000, 3) * 2 * torch.pi  # any distance
    for head in range(2):
        turned = torch.complex(*(x @ q[0, head].mT).chunk(2, -1)) * torch.polar(torch.ones(1), angles)
        z = turned * torch.complex(*(y @ k[0].mT).chunk(2, -1)).conj()
        f = torch.cat([z.real, z.imag], -1).double()
        exact = white_gram(q, k)[0, head]
        torch.testing.assert_close(f.mT @ f / len(f), exact, rtol=0, atol=0.05 * float(exact.max()))


# --- gains fold into the query ---


@given(SEEDS, st.data())
def test_kept_rows_reproduce_gain_weighted_features_at_any_position(seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    pairs, plain, n, tokens = 5, 3, 2, 4
    kept = torch.tensor(data.draw(st.lists(st.integers(0, pairs - 1), min_size=1, max_size=pairs, unique=True)))
    offset = data.draw(st.integers(0, 100_000))
    gains = torch.randn(n, len(kept), 2, dtype=torch.float64)
    frequencies = torch.rand(pairs, dtype=torch.float64)
    positions = offset + torch.randint(0, 1000, (tokens,)).double()
    q = torch.randn(n, tokens, 2 * pairs + plain, dtype=torch.float64)
    k = torch.randn(tokens, 2 * pairs + plain, dtype=torch.float64)

    small_q = gained(q.mT[None, :, : 2 * pairs], gains[None], kept[None])[0].mT
    small_k = chosen(k.mT[None, : 2 * pairs], kept[None])[0].mT

    def turn(x: Tensor) -> Tensor:
        """Rotate the kept pairs, (real, imaginary) side by side, each by its own frequency."""
        return rotate(torch.cat(x.unflatten(-1, (-1, 2)).unbind(-1), -1), positions, frequencies[kept])

    logit = turn(small_q) @ turn(small_k).mT
    rotated = [rotate(x[..., : 2 * pairs], positions, frequencies) for x in (q, k)]
    real, imaginary = features(rotated[0], rotated[1].expand(n, -1, -1)).chunk(2, -1)
    weighted = real[..., kept] * gains[:, None, None, :, 0] + imaginary[..., kept] * gains[:, None, None, :, 1]
    torch.testing.assert_close(logit, weighted.sum(-1))


def test_unit_gains_are_a_permutation() -> None:
    gains, kept, rows = torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2), torch.arange(3)[None], torch.eye(6)[None]
    queries, keys = gained(rows[None], gains, kept)[0, 0], chosen(rows, kept)[0]
    assert torch.equal(queries, keys) and torch.equal(keys @ keys.mT, torch.eye(6).double())


def test_heads_keep_pairs_of_their_own() -> None:
    kept, q = torch.tensor([[0, 2], [1, 2]]), torch.randn(2, 3, 6, 4, dtype=torch.float64)
    gains = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    both, keys = gained(q, gains, kept), chosen(q[:, 0], kept)
    for h in range(2):
        assert torch.equal(both[h], gained(q[h : h + 1], gains[h : h + 1], kept[h : h + 1])[0])
        assert torch.equal(keys[h], chosen(q[h : h + 1, 0], kept[h : h + 1])[0])


# --- elimination ---


@given(SEEDS, st.integers(1, 3), st.integers(2, 5))
def test_elimination_equals_brute_force_with_refitted_gains(seed: int, n: int, pairs: int) -> None:
    torch.manual_seed(seed)
    f = random_features(n, pairs)
    order, cost = eliminate(gram_of(f))
    left, spent, dearest = list(range(pairs)), 0.0, 0.0
    for step in range(1, pairs):
        price = {p: sum(least_squares(f[0, i], [x for x in left if x != p])[1] for i in range(n)) for p in left}
        worst = min(price, key=price.__getitem__)
        assert int(order[0, -step]) == worst
        dearest = max(dearest, price[worst] - spent)  # what makes the costs never increase
        assert float(cost[0, -step]) == pytest.approx(dearest, rel=1e-6)
        spent = price[worst]
        left.remove(worst)
    assert order[0, 0] == left[0]


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6))
def test_costs_never_increase_and_orders_are_permutations(seed: int, kv: int, n: int, pairs: int) -> None:
    torch.manual_seed(seed)
    order, cost = eliminate(torch.cat([gram_of(random_features(n, pairs)) for _ in range(kv)]))
    assert (cost[:, :-1] >= cost[:, 1:]).all() and (cost >= 0).all()
    assert torch.equal(order.sort(-1).values, torch.arange(pairs).expand(kv, -1))


def test_kv_heads_are_judged_apart() -> None:
    grams = [gram_of(random_features(2, 4)) for _ in range(3)]
    order, cost = eliminate(torch.cat(grams))
    for head, gram in enumerate(grams):
        alone = eliminate(gram)
        assert torch.equal(order[head], alone[0][0])
        torch.testing.assert_close(cost[head], alone[1][0])


def test_uncorrelated_pairs_go_by_their_energy() -> None:
    energy = torch.tensor([3.0, 1.0, 4.0, 2.0])
    order, cost = eliminate(torch.diag_embed(energy.repeat(2)).expand(1, 1, -1, -1))
    assert order.tolist() == [[2, 0, 3, 1]]
    torch.testing.assert_close(cost[0], torch.tensor([4.0, 3.0, 2.0, 1.0]).double() + RIDGE * 2.5)


def test_a_pair_that_others_can_stand_in_for_goes_first() -> None:
    f = random_features(1, 4)
    f[..., [2, 6]] = 10 * f[..., [0, 4]]  # strong, but a multiple of pair 0
    order, _ = eliminate(gram_of(f))
    assert order[0, -1] in (0, 2)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (3, 1, 8, 8)])
def test_empty_heads_cost_nothing(shape: tuple[int, ...]) -> None:
    order, cost = eliminate(torch.zeros(shape))
    assert not cost.isnan().any() and float(cost.max()) < 0.01
    assert torch.equal(order.sort(-1).values, torch.arange(4).expand(shape[0], -1))


def test_one_empty_query_head_does_not_spoil_its_neighbour() -> None:
    f = random_features(1, 4)
    alone = eliminate(gram_of(f))
    beside = eliminate(torch.cat([gram_of(f), torch.zeros(1, 1, 8, 8)], 1))
    assert torch.equal(beside[0], alone[0])
    assert beside[1].isfinite().all()


def test_no_pairs_no_order() -> None:
    order, cost = eliminate(torch.zeros(2, 3, 0, 0))
    assert order.shape == cost.shape == (2, 0)


# --- gains ---


@given(SEEDS, st.integers(2, 5), st.data())
def test_fitted_gains_are_least_squares(seed: int, pairs: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    kept = sorted(data.draw(st.lists(st.integers(0, pairs - 1), min_size=1, max_size=pairs - 1, unique=True)))
    f = random_features(3, pairs)[0]
    gains = fit_gains(gram_of(f)[None], torch.tensor(kept)[None])[0]
    for head in range(3):
        expected, _ = least_squares(f[head], kept)
        torch.testing.assert_close(gains[head], expected, rtol=1e-6, atol=1e-6)


def test_keeping_every_pair_keeps_gains_of_one() -> None:
    gains = fit_gains(gram_of(random_features(2, 4)), torch.arange(4)[None])
    assert torch.equal(gains, torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 2, 4, 2))


def test_uncorrelated_pairs_keep_gains_of_one() -> None:
    gains = fit_gains(torch.eye(8).expand(1, 2, -1, -1), torch.tensor([[0, 3]]))[0]
    torch.testing.assert_close(gains, torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, 2, 2))


def test_gains_make_up_for_a_multiple_of_a_kept_pair() -> None:
    f = random_features(1, 3, rows=200)[0]
    f[..., [2, 5]] = 0.5 * f[..., [0, 3]]
    gains = fit_gains(gram_of(f)[None], torch.tensor([[0, 1]]))[0]
    expected = torch.tensor([[[1.5, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(gains, expected, rtol=0, atol=0.02)


def test_gains_of_an_empty_head_are_one() -> None:
    gains = fit_gains(torch.zeros(1, 2, 8, 8), torch.tensor([[1, 2]]))[0]
    assert torch.equal(gains, torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, 2, 2))


def test_refitting_never_does_worse_than_dropping() -> None:
    f = random_features(1, 5)[0]
    for kept in combinations(range(5), 3):
        gains = fit_gains(gram_of(f)[None], torch.tensor(kept)[None])[0, 0]
        target, parts = f[0, :, :5].sum(-1), f[0].unflatten(-1, (2, 5))[..., list(kept)]
        refitted = (target - torch.einsum("mcp,pc->m", parts, gains)).square().sum()
        dropped = (target - parts[:, 0].sum(-1)).square().sum()
        assert refitted <= dropped * (1 + 10 * RIDGE)


def test_of_a_diagonal_gram_pairs_go_by_their_energy() -> None:
    """Without data none can make up for another, so the elimination is a sort."""
    energy = torch.rand(3, 2, 5, dtype=torch.float64)
    energy[0, :, 1] = energy[0, :, 3]  # a tie
    gram = torch.diag_embed(energy.repeat(1, 1, 2))
    (order, cost), (whole_order, whole_cost) = by_energy(gram), eliminate(gram)
    assert torch.equal(order, whole_order)
    torch.testing.assert_close(cost, whole_cost)
