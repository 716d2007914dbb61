"""A tunable core: the change of the singular values of a stack of blocks, between two frozen orthonormal bases.

A block's weight ``W`` (or its product with a partner across the layer) is ``U S V^T``. CLOVER trains ``S``, a full
``d x d`` matrix that starts at ``diag(values)``, and keeps ``U`` and ``V`` (arXiv 2411.17426). With ``V^T = right @ W``
and ``U`` likewise on the other side, replacing ``diag(values)`` by ``S`` is replacing ``W`` by ``(I + E) W`` where
``E = left @ (S - diag(values)) @ right``. So the base weight is never touched, quantised or not, and merging is one
small product.

What is stored is ``(S - diag(values)) / unit``, ``unit`` the root mean square of a block's singular values: one
learning rate then moves all blocks alike. Their scales differ by more than a rate forgives (in SmolLM2 4.5 for keys, 30
for V-O, whose values belong to a product of two weights; in Whisper 0.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clover.decomposition.decompose import Bases

SAME_BASE = 0.01
"""Relative difference of fingerprints up to which two weights are the same: bfloat16 rounding makes 0.002."""
SAME_QUANTISED = 0.25
"""The same for a quantised base: four bits make about 0.1."""
SMALL, LARGEST = 0.5, 100.0
"""Norms (Frobenius) of a change that needs no look to be undone, and of the inverse of any that can be."""


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Without dropout, while it lasts."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


class Core(nn.Module):
    """The trained change of ``b`` blocks of ``d`` rows and the bases that it lives in.

    Attributes:
        change: parameter, ``(S - diag(values)) / unit``; ``(b, d, d)``, or ``(b, d)`` if only the diagonal is trained.
            In a folded core ``E`` itself, and there are no bases.
        left, right: buffers ``(b, d, d)``, float32, the unit in ``left``; None in a folded core.
        values: buffer ``(b, d)``, the singular values at the start; None in a folded core.
        fingerprint: buffer ``(b, 8)``, of the base weight.
        rows: buffer ``(b, d)``, not saved: where the blocks stand in the weight.
        key: the same for cores of the same rows.
        first, dense: the first of the rows; whether all of them follow one another.
        invertible: see ``turn``.
    """

    left: Tensor | None
    right: Tensor | None
    values: Tensor | None
    fingerprint: Tensor
    rows: Tensor

    def __init__(
        self,
        rows: Int[Tensor, "b d"],
        *,
        kind: str,
        dropout: float,
        base: Float[Tensor, "b 8"] | None,
        quantised: bool,
        device: torch.device,
        invertible: bool = False,
    ) -> None:
        """Make a core without bases: ``start`` computes them, or a saved state brings them.

        Args:
            kind: ``full``, ``diagonal`` or ``folded``, see ``CloverConfig``.
            base: the fingerprint of the weight that the core is for; None if it is not at hand.
            quantised: that weight is rounded to a few bits, or was when tuning began: fingerprints agree less well.
            dropout: share of the entries of the change left out in each training step.
        """
        super().__init__()
        self.dropout, self.quantised, self.base, self.ready = dropout, quantised, base, False
        blocks, size = rows.shape
        self.first, self.invertible = int(rows[0, 0]), invertible
        self.key = (blocks, size, self.first)
        self.dense = torch.equal(rows.flatten().cpu(), self.first + torch.arange(rows.numel()))
        self.register_buffer("rows", rows.to(device), persistent=False)
        vector, matrix = (blocks, size), (blocks, size, size)
        self.change = nn.Parameter(
            torch.zeros(vector if kind == "diagonal" else matrix, dtype=torch.float32, device=device)
        )
        for name, shape in (("left", matrix), ("right", matrix), ("values", vector)):
            self.register_buffer(
                name, None if kind == "folded" else torch.zeros(shape, dtype=torch.float32, device=device)
            )
        self.register_buffer("fingerprint", torch.zeros(blocks, 8, dtype=torch.float32, device=device))

    @torch.no_grad()
    def start(self, bases: Bases | None, identity: bool = True) -> int:
        """Take up the bases (None for a folded core); the change starts at zero, or at random when not ``identity``.

        Returns:
            How many directions have no singular value. They can't be tuned: what is not in the weight can't be
            turned into something.
        """
        self.ready = True
        if self.base is not None:
            self.fingerprint.copy_(self.base)
        if bases is None:
            return 0
        assert self.left is not None and self.right is not None and self.values is not None
        empty = bases.values <= bases.values[..., :1] * bases.values.shape[-1] * torch.finfo(torch.float32).eps
        shrink = torch.where(empty, 0, bases.values.clamp_min(torch.finfo(torch.float64).tiny).rsqrt())
        unit = bases.values.square().mean(-1).sqrt()[:, None, None]
        self.right.copy_(shrink.unsqueeze(-1) * bases.t_a)
        self.left.copy_(unit * bases.t_b.mT * shrink.unsqueeze(-2))
        self.values.copy_(bases.values)
        if not identity:
            size = self.change.shape[-1]
            self.change.normal_(std=0.3 if self.change.dim() == 2 else 0.3 / size**0.5)
        return int(empty.sum())

    @torch.no_grad()
    def share(self, other: Core) -> None:
        """Take up the bases of another core of the same rows; the change stays as it is."""
        if (self.left is None) != (other.left is None):
            return
        for name in ("left", "right", "values", "fingerprint"):
            if (mine := getattr(self, name)) is not None:
                mine.copy_(getattr(other, name))
        self.ready = True

    @torch.no_grad()
    def fold(self) -> None:
        """Keep ``E`` alone, for inference: a third of the numbers."""
        with still(self):
            self.change = nn.Parameter(self.transform().to(self.change.dtype), self.change.requires_grad)
        self.left = self.right = self.values = None

    def extra_repr(self) -> str:
        kind = "folded" if self.left is None else "diagonal" if self.change.dim() == 2 else "full"
        return f"blocks={self.rows.shape[0]}, size={self.rows.shape[1]}, {kind}"

    def transform(self) -> Float[Tensor, "b d d"]:
        """``E``: the block's new weight is ``(I + E) W``. At least float32, whatever autocast says.

        Raises:
            RuntimeError: the bases have not been loaded.
        """
        if not self.ready:
            self._look()
        with torch.autocast(self.change.device.type, enabled=False):
            change = _wide(self.change)
            if self.training and self.dropout:
                change = nn.functional.dropout(change, self.dropout)
            if self.left is None or self.right is None:
                return change
            wide = torch.promote_types(change.dtype, self.left.dtype)  # a model's own dtype may be float64
            change, left, right = change.to(wide), self.left.to(wide), self.right.to(wide)
            return left @ (change @ right if change.dim() == 3 else change.unsqueeze(-1) * right)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, meta: Any, strict: Any, missing: Any,
                              unexpected: Any, errors: list[str]) -> None:  # fmt: skip
        stored = state.get(prefix + "fingerprint")
        if stored is not None and (problem := self._other_base(stored)):
            errors.append(f"{prefix.rstrip('.')} {problem}")
            return
        super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)
        if prefix + ("change" if self.right is None else "right") in state:
            self.ready = True

    def _other_base(self, stored: Tensor) -> str | None:
        """What is wrong if a fingerprint is not that of the base weight."""
        if self.base is None or stored.shape != self.base.shape:
            return None
        difference = distance(stored, self.base)
        if difference <= (SAME_QUANTISED if self.quantised else SAME_BASE):
            return None
        return (
            f"was tuned on another base model: the fingerprint of its weight differs by {difference:.1%}; load it on "
            "the model that it was made for (unmerged, unpruned if that was)"
        )

    def _look(self) -> None:
        """Once, for bases that did not come through ``load_state_dict``: transformers puts tensors in by itself."""
        if not (self.fingerprint if self.right is None else self.right).any():
            raise RuntimeError(
                "this core has no bases yet: its config was read from a saved adapter, whose weights were not loaded; "
                "load it with PeftModel.from_pretrained, or make a new CloverConfig"
            )
        if problem := self._other_base(self.fingerprint):
            raise RuntimeError(f"this core {problem}")
        self.ready = True


def fingerprint(weight: Float[Tensor, "b d n"]) -> Float[Tensor, "b 8"]:
    """Eight numbers for each block that another weight, even of another training run, would not give.

    Projections on fixed pseudo-random directions: rounding moves them little, other weights by their distance.
    """

    def waves(n: int, count: int) -> Tensor:
        squares = torch.arange(1, n + 1, dtype=torch.float64, device=weight.device) ** 2
        return torch.cos(squares[:, None] * (torch.arange(count, device=weight.device) + 0.7390851332151607))

    return (waves(weight.shape[-2], 1).T @ (weight.double() @ waves(weight.shape[-1], 8))).squeeze(-2).float()


def distance(a: Tensor, b: Tensor) -> float:
    """Relative distance of two fingerprints."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float32).tiny))


def turn(
    y: Float[Tensor, "*batch n"],
    transform: Float[Tensor, "b d d"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    invertible: bool = False,
) -> Float[Tensor, "*batch n"]:
    """Outputs of a projection whose weight is ``(I + E) W``, from its outputs ``y = W x + bias``.

    Args:
        y: outputs, ``n = b * d``.
        transform: ``E`` for each block of ``d`` outputs.
        bias: added to ``y`` and not transformed.
        invertible: keep the result for the backward pass in place of ``y`` and solve for ``y``. The result is mostly
            kept by what comes next as well, so nothing is stored twice. Not in half precision, nor where ``I + E`` is
            near to singular, nor in what is compiled, which has no moment to find that out.
    """
    learns = transform.requires_grad and torch.is_grad_enabled()
    if invertible and learns:
        # Large changes magnify what half precision rounds away.
        wide = y.dtype.itemsize >= 4 and not torch.compiler.is_compiling()
        invertible = wide and can_be_undone(transform)
    return _Turn.apply(y, transform, bias, invertible)


@torch.no_grad()
def can_be_undone(transform: Float[Tensor, "b d d"]) -> bool:
    """Whether ``I + E`` of every block has an inverse that magnifies roundings no more than ``LARGEST`` times."""
    if (transform.square().sum((-2, -1)) < SMALL**2).all():
        return True
    whole = torch.eye(transform.shape[-1], dtype=transform.dtype, device=transform.device) + transform
    inverse, failed = torch.linalg.inv_ex(whole)
    return bool((failed == 0).all() and (torch.linalg.matrix_norm(inverse) < LARGEST).all())


def _wide(x: Tensor) -> Tensor:
    """At least float32: the small matrices are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _turned(x: Tensor, matrix: Tensor, shift: Tensor | None) -> Tensor:
    """``x (I + matrix)`` for each block, plus a shift ``(b, 1, d)``.

    Where products are exact to the dtype, the identity goes into the matrix and the result to its place at once, with
    no further pass over the activations. In half precision, or where a GPU shortens float32 (TF32), the identity would
    drown what ``matrix`` says; and a compiler has no place to write to, but fuses the sum.
    """
    b, d, _ = matrix.shape
    blocks = x.reshape(-1, b, d).transpose(0, 1)
    exact = x.dtype == matrix.dtype and x.device.type == "cpu"
    # Neither compilers nor gradients of gradients know of a place that is written to.
    if not exact or torch.is_grad_enabled() or torch.compiler.is_compiling():
        matrix = matrix.to(x.dtype)
        change = torch.bmm(blocks, matrix) if shift is None else torch.baddbmm(shift, blocks, matrix)
        return (blocks + change).transpose(0, 1).reshape(x.shape)
    whole = matrix + torch.eye(d, dtype=matrix.dtype)
    result = torch.empty(x.shape, dtype=x.dtype)
    place = result.view(-1, b, d).transpose(0, 1)
    if shift is None:
        torch.bmm(blocks, whole, out=place)
    else:
        torch.baddbmm(shift, blocks, whole, out=place)
    return result


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, transform: Tensor, bias: Tensor | None, invertible: bool) -> Tensor:
        shift = None if bias is None else -(bias.to(y.dtype).view(-1, 1, transform.shape[1]) @ transform.mT.to(y.dtype))
        return _turned(y, transform.mT, shift)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, transform, bias, invertible = inputs
        kept = (output if invertible else y) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, transform, bias)
        ctx.invertible = invertible

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        kept, transform, bias = ctx.saved_tensors
        b, d, _ = transform.shape
        rows = grad.reshape(-1, b, d)
        blocks = rows.transpose(0, 1)
        needs_y, needs_transform, needs_bias, _ = ctx.needs_input_grad
        total = _wide(rows.sum(0)).unsqueeze(-1) if bias is not None else None
        grad_y = grad_transform = grad_bias = None
        if needs_transform:
            grad_transform = _wide(torch.bmm(blocks.mT, kept.reshape(-1, b, d).transpose(0, 1)))
            if total is not None:
                grad_transform = grad_transform - total * _wide(bias).view(b, 1, d)
            if ctx.invertible:
                whole = torch.eye(d, dtype=transform.dtype, device=transform.device) + transform
                grad_transform, _ = torch.linalg.solve_ex(whole.mT.to(grad_transform), grad_transform, left=False)
            grad_transform = grad_transform.to(transform.dtype)
        if needs_y:
            grad_y = _turned(grad, transform, None)
        if needs_bias and total is not None:
            grad_bias = -(transform.mT @ total).flatten().to(bias.dtype)
        return grad_y, grad_transform, grad_bias, None
