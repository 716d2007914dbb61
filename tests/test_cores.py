"""The mathematics of a core: what it turns, what it leaves, its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clover.decomposition.decompose import decompose, weight_gram
from clover.tuning.cores import Core, can_be_undone, distance, fingerprint, turn


def core(bases, *, diagonal: bool = False, dropout: float = 0.0, identity: bool = True) -> Core:
    b, d = bases.values.shape
    made = bare(b, d, diagonal=diagonal, dropout=dropout)
    made.start(bases, identity)
    return made


def bare(b: int, d: int, diagonal: bool = False, dropout: float = 0.0) -> Core:
    rows = torch.arange(b * d).view(b, d)
    kind = "diagonal" if diagonal else "full"
    return Core(rows, kind=kind, dropout=dropout, base=None, quantised=False, device=torch.device("cpu"))


def pair(b: int = 3, d: int = 5, n: int = 11):
    """Two sides of a head, ``(b, n, d)`` and ``(b, d, n)``, and the bases of the second."""
    left, right = torch.randn(b, n, d).double(), torch.randn(b, d, n).double()
    return left, right, decompose(weight_gram(right), weight_gram(left.mT))


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12))
def test_the_product_has_the_new_singular_values(b: int, d: int, n: int) -> None:
    left, right, bases = pair(b, d, n + d)
    turned = core(bases, diagonal=True)
    turned.change.data.uniform_(-0.2, 0.5)
    unit = turned.values.square().mean(-1, keepdim=True).sqrt()
    expected = (turned.values + unit * turned.change.data).double().abs().sort(-1, descending=True).values
    product = left @ (torch.eye(d).double() + turned.transform().double()) @ right
    found = torch.linalg.svdvals(product)[..., :d]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_full_core_stays_inside_the_spans() -> None:
    left, right, bases = pair()
    turned = core(bases, identity=False)
    product = left @ (torch.eye(5).double() + turned.transform().double()) @ right
    columns = torch.linalg.qr(left).Q
    rows = torch.linalg.qr(right.mT).Q
    inside = columns @ (columns.mT @ product @ rows) @ rows.mT
    torch.testing.assert_close(inside, product, rtol=1e-10, atol=1e-10)
    assert (product - left @ right).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_rate_moves_blocks_alike_whatever_their_scale(scale: float) -> None:
    left, right, bases = pair()
    one, other = core(bases), core(decompose(weight_gram(scale * right), weight_gram(left.mT)))
    for turned in (one, other):
        turned.change.data.fill_(0.1)
    moved = [(left @ turned.transform().double() @ x) for turned, x in ((one, right), (other, scale * right))]
    share = [torch.linalg.matrix_norm(m) / torch.linalg.matrix_norm(left @ right * f)
             for m, f in zip(moved, (1, scale), strict=True)]  # fmt: skip
    torch.testing.assert_close(share[0], share[1])
    torch.testing.assert_close(share[0], torch.full_like(share[0], 0.1 * 5 / 5**0.5), rtol=1e-5, atol=1e-5)


def test_it_starts_as_the_identity_to_the_bit() -> None:
    turned = core(pair()[2])
    assert turned.transform().abs().max() == 0
    y = torch.randn(4, 7, 15)
    assert torch.equal(turn(y, turned.transform()), y)


@pytest.mark.parametrize("invertible", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_autograd(invertible: bool, bias: bool) -> None:
    y = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    change = (0.2 * torch.randn(2, 4, 4, dtype=torch.float64)).requires_grad_()
    shift = torch.randn(8, dtype=torch.float64, requires_grad=True) if bias else None
    assert torch.autograd.gradcheck(lambda *a: turn(*a, invertible=invertible), (y, change, shift))
    assert torch.autograd.gradgradcheck(lambda *a: turn(*a, invertible=invertible), (y, change, shift))
    plain = y.unflatten(-1, (2, 4))
    moved = plain if shift is None else plain - shift.view(2, 4)
    expected = plain + torch.einsum("...bd,bed->...be", moved, change)
    torch.testing.assert_close(turn(y, change, shift, invertible=invertible), expected.flatten(-2))


@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_half_precision_gradients_are_near_those_of_float32(scale: float) -> None:
    y, change = torch.randn(512, 64), scale * torch.randn(2, 32, 32)
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        for invertible in (False, True):
            leaf = change.clone().requires_grad_()
            turn(y.to(dtype), leaf, invertible=invertible).square().sum().backward()
            grads[dtype, invertible] = leaf.grad
    exact = grads.pop((torch.float32, False))
    for grad in grads.values():
        assert (grad - exact).norm() / exact.norm() < 0.01


def test_what_is_empty_stays_empty_and_finite() -> None:
    left, right, _ = pair()
    right[:, 3:] = 0
    turned = bare(3, 5)
    assert turned.start(decompose(weight_gram(right), weight_gram(left.mT)), identity=False) == 3 * 2
    assert turned.transform().isfinite().all()
    assert ((torch.eye(5) + turned.transform()).double() @ right)[:, 3:].abs().max() < 1e-6


def test_dropout_is_of_training_alone_and_keeps_the_mean() -> None:
    turned = core(pair(1, 8, 20)[2], dropout=0.5, identity=False)
    whole = turned.eval().transform()
    assert torch.equal(whole, turned.transform())
    turned.train()
    mean = torch.stack([turned.transform() for _ in range(2000)]).mean(0)
    assert not torch.equal(turned.transform(), whole)
    assert (mean - whole).norm() / whole.norm() < 0.1


def test_without_bases_it_says_so() -> None:
    turned = bare(1, 2)
    with pytest.raises(RuntimeError, match="no bases yet"):
        turned.transform()


def test_a_fingerprint_tells_weights_apart() -> None:
    weight = torch.randn(4, 16, 64)
    mark = fingerprint(weight)
    assert distance(fingerprint(weight.bfloat16().float()), mark) < 0.005
    assert distance(fingerprint(weight + 0.05 * torch.randn_like(weight)), mark) > 0.01
    assert distance(fingerprint(weight.flip(-1)), mark) > 0.5
    nn.init.zeros_(weight)
    assert distance(fingerprint(weight), fingerprint(weight)) == 0


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_gradients_where_a_singular_value_was_put_out(core: str) -> None:
    """Outputs can't be had back from what lost a direction, so they are kept."""
    torch.manual_seed(0)
    y, bias = torch.randn(7, 8), torch.randn(8)
    turned = torch.linalg.qr(torch.randn(2, 4, 4))[0]
    values = torch.tensor([0.7, 1.3, 1.0, 0.0]) - 1
    change = turned * values @ turned.mT if core == "full" else torch.diag_embed(values.expand(2, -1))
    grads = []
    for invertible, dtype in ((True, torch.float32), (False, torch.float64)):
        leaf = change.to(dtype, copy=True).requires_grad_()
        turn(y.to(dtype), leaf, bias.to(dtype), invertible=invertible).sin().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1].float(), rtol=1e-4, atol=1e-5)


def test_what_can_be_undone() -> None:
    eye = torch.eye(4).expand(2, 4, 4)
    assert can_be_undone(0 * eye) and can_be_undone(3 * eye)
    for bad in (-1.0, -0.999, float("nan")):
        assert not can_be_undone(torch.cat([0 * eye, torch.diag(torch.tensor([0.0, bad, 0.0, 0.0]))[None]]))


@pytest.mark.parametrize("invertible", [False, True])
def test_functional_gradients(invertible: bool) -> None:
    y, change = torch.randn(5, 8, dtype=torch.float64), 0.1 * torch.randn(2, 4, 4, dtype=torch.float64)

    def loss(e: torch.Tensor) -> torch.Tensor:
        return turn(y, e, invertible=invertible).sin().sum()

    leaf = change.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(change), leaf.grad)
