"""The decomposition against what it stands for: the full SVD of the D x D product of the projections."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clover.decomposition.decompose import decompose, square_root, weight_gram


class Case(NamedTuple):
    """Two projections ``(d, D)`` of known ranks."""

    a: Tensor
    b: Tensor


def projection(d: int, width: int, rank: int, spread: float = 0.0) -> Tensor:
    """A random ``(d, width)`` matrix of the given rank, its singular values falling by ``10 ** spread``."""
    left, right = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64)).Q for n in (d, width))
    return (left * torch.logspace(0, -spread, rank, dtype=torch.float64)) @ right.mT


@st.composite
def cases(draw: st.DrawFn, deficient: bool = True) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    d = draw(st.integers(1, 12))
    width = draw(st.integers(d, 30))
    ranks = [draw(st.integers(1, d)) if deficient else d for _ in range(2)]
    scale = 10.0 ** draw(st.integers(-3, 3))
    return Case(*(scale * projection(d, width, r, draw(st.floats(0, 2))) for r in ranks))


@given(cases())
def test_product_is_preserved_inside_the_ranges(case: Case) -> None:
    t_a, t_b, _ = decompose(weight_gram(case.a), weight_gram(case.b))
    exact = case.a.mT @ case.b
    error = (t_a @ case.a).mT @ (t_b @ case.b) - exact
    assert error.norm() <= 1e-10 * case.a.norm() * case.b.norm()


@given(cases(deficient=False))
def test_transforms_are_each_others_inverse_at_full_rank(case: Case) -> None:
    t_a, t_b, _ = decompose(weight_gram(case.a), weight_gram(case.b))
    torch.testing.assert_close(t_a.mT @ t_b, torch.eye(len(case.a), dtype=torch.float64), rtol=0, atol=1e-9)


@given(cases(deficient=False))
def test_values_are_the_singular_values_of_the_product(case: Case) -> None:
    values = decompose(weight_gram(case.a), weight_gram(case.b)).values
    full = torch.linalg.svd(case.a.mT @ case.b).S[: len(values)]
    torch.testing.assert_close(values, full, rtol=1e-8, atol=1e-12 * float(full[0]))


@given(cases())
def test_values_of_deficient_heads_lose_half_the_digits_at_most(case: Case) -> None:
    values = decompose(weight_gram(case.a), weight_gram(case.b)).values
    full = torch.linalg.svd(case.a.mT @ case.b).S[: len(values)]
    # A root of the rounding error of an empty eigenvalue is what a squared matrix can't tell from 0.
    assert (values - full).abs().max() <= 1e-6 * case.a.norm() * case.b.norm()


@given(cases())
def test_values_descend_and_both_second_moments_become_diagonal(case: Case) -> None:
    grams = weight_gram(case.a), weight_gram(case.b)
    t_a, t_b, values = decompose(*grams)
    assert (values[:-1] >= values[1:]).all() and (values >= 0).all()
    for transform, gram in zip((t_a, t_b), grams, strict=True):
        torch.testing.assert_close(
            transform @ gram @ transform.mT, values.diag(), rtol=0, atol=1e-7 * float(case.a.norm() * case.b.norm())
        )


@given(cases(), st.data())
def test_truncation_error_is_eckart_young(case: Case, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(case.a)))
    t_a, t_b, values = decompose(weight_gram(case.a), weight_gram(case.b))
    error = case.a.mT @ case.b - (t_a[:rank] @ case.a).mT @ (t_b[:rank] @ case.b)
    best = torch.linalg.svd(case.a.mT @ case.b).S[rank:].square().sum().sqrt()
    scale = float(case.a.norm() * case.b.norm())
    assert float(error.norm()) == pytest.approx(float(best), rel=1e-6, abs=1e-6 * scale)
    assert float(values[rank:].norm()) == pytest.approx(float(best), rel=1e-6, abs=1e-6 * scale)


@given(cases(deficient=False), st.integers(0, 2**31))
def test_truncation_costs_the_tail_in_the_metric_of_any_grams(case: Case, seed: int) -> None:
    """Calibrated Grams of vectors in general position: the tail is the mean squared error of the inner product."""
    torch.manual_seed(seed)
    d = len(case.a)
    a, b = (m @ torch.randn(m.shape[1], 4 * d, dtype=torch.float64) for m in case)
    t_a, t_b, values = decompose(a @ a.mT, b @ b.mT)
    for rank in range(d + 1):
        error = a.mT @ b - (t_a[:rank] @ a).mT @ (t_b[:rank] @ b)
        assert float(error.norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-5, abs=1e-9 * float(values[0]))


@pytest.mark.parametrize("batch", [(1,), (3,), (2, 3)])
def test_batched_equals_looped(batch: tuple[int, ...]) -> None:
    a, b = (torch.randn(*batch, 5, 9, dtype=torch.float64) for _ in range(2))
    t_a, t_b, values = decompose(weight_gram(a), weight_gram(b))
    for at in torch.cartesian_prod(*(torch.arange(n) for n in batch)).view(-1, len(batch)).tolist():
        one = decompose(weight_gram(a[tuple(at)]), weight_gram(b[tuple(at)]))
        torch.testing.assert_close(values[tuple(at)], one.values)
        # Signs are free, the projector of each direction isn't.
        ours = t_a[tuple(at)].unsqueeze(-1) * t_b[tuple(at)].unsqueeze(-2)
        torch.testing.assert_close(ours, one.t_a.unsqueeze(-1) * one.t_b.unsqueeze(-2))


@pytest.mark.parametrize("empty", ["a", "b", "both"])
def test_zero_heads_have_zero_values_and_finite_transforms(empty: str) -> None:
    grams = {name: weight_gram(torch.randn(4, 8)) for name in "ab"}
    for name in "ab" if empty == "both" else empty:
        grams[name] = torch.zeros(4, 4)
    t_a, t_b, values = decompose(grams["a"], grams["b"])
    assert not values.any() and not t_a.any() and not t_b.any()


def test_a_zero_head_leaves_the_others_of_its_batch_alone() -> None:
    a, b = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    a[0] = 0
    values = decompose(weight_gram(a), weight_gram(b)).values
    assert not values[0].any()
    torch.testing.assert_close(values[1], decompose(weight_gram(a[1]), weight_gram(b[1])).values)


def test_ill_conditioned_heads_keep_their_product() -> None:
    a, b = projection(16, 40, 16, spread=8), projection(16, 40, 16, spread=8)
    t_a, t_b, values = decompose(weight_gram(a), weight_gram(b))
    assert all(t.isfinite().all() for t in (t_a, t_b, values))
    exact = a.mT @ b
    assert ((t_a @ a).mT @ (t_b @ b) - exact).norm() <= 1e-10 * exact.norm()
    full = torch.linalg.svd(exact).S[:16]
    torch.testing.assert_close(values, full, rtol=0, atol=1e-7 * float(full[0]))


def test_heads_of_size_zero_pass_through() -> None:
    t_a, t_b, values = decompose(torch.zeros(3, 0, 0), torch.zeros(3, 0, 0))
    assert t_a.shape == t_b.shape == (3, 0, 0) and values.shape == (3, 0)


def test_results_are_float64_whatever_comes_in() -> None:
    assert {t.dtype for t in decompose(torch.eye(3), torch.eye(3, dtype=torch.bfloat16))} == {torch.float64}


@given(cases())
def test_square_root_squares_back(case: Case) -> None:
    gram = weight_gram(case.a)
    root = square_root(gram)
    torch.testing.assert_close(root @ root.mT, gram, rtol=0, atol=1e-12 * float(gram.norm()))


def test_square_root_takes_rounding_below_zero_as_zero() -> None:
    assert not square_root(torch.diag(torch.tensor([0.0, -1e-18], dtype=torch.float64))).any()
