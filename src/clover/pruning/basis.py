"""A block in its own latent space: the ordered directions of its heads, what each is worth, and the cut weights.

Weights alone or calibrated, with or without RoPE, grouped queries or not: all differ only in the Grams that go in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clover.attention.ragged import joined
from clover.calibration.calibrate import Moments
from clover.decomposition.decompose import Bases, decompose, ridged, square_root, weight_gram
from clover.decomposition.refit import Kept, fit
from clover.decomposition.rotary import by_energy, chosen, eliminate, fit_gains, gained, white_gram
from clover.model.block import Block
from clover.model.heads import Heads, energies
from clover.planning.budget import Costs
from clover.planning.plan import BlockPlan, Group, Spectrum

PORTION, PORTION_ON_GPU = 2**20, 2**26
"""Numbers of a query projection that are cut at once: a processor's cache holds few, launching little work is slow."""
CALIBRATION_RIDGE = 1e-6
"""Added to calibrated Grams, relative to their mean eigenvalue: keeps the change of basis invertible at full rank."""


@dataclass(frozen=True)
class Basis:
    """Ordered directions of every head of one block. float64; ``s`` unrotated Q-K columns, ``p`` rotary pairs."""

    block: Block
    heads: Heads
    """The block's own weights, not copied, in their dtype; what is made of them is computed in float64."""
    moments: Moments | None
    pair_gram: Float[Tensor, "kv n r r"]
    pair_order: Int[Tensor, "kv p"]
    pair_cost: Float[Tensor, "kv p"]
    plain: Bases
    value: Bases

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def output_bias(self) -> bool:
        """Whether the output of a cut has a bias, be it for that of the values or for the mean of what was cut."""
        return self.heads.o_bias is not None or self.heads.v_bias is not None or self.moments is not None

    def costs(self) -> Costs:
        """What cutting each direction costs, for the planner."""
        heads = self.heads
        half_square = 0.5 * self.block.scale**2 if self.moments else 1.0  # nats, or the published units
        pair_norm, plain_norm, value_norm = self._norms()
        on_cpu = {  # where plans are made, for blocks of any device
            "pair_cost": half_square * self.pair_cost, "pair_norm": pair_norm.gather(1, self.pair_order),
            "plain_cost": half_square * self.plain.values**2, "plain_norm": plain_norm,
            "value_cost": self.value.values**2, "value_norm": value_norm,
        }  # fmt: skip
        return Costs(
            name=self.name, part=self.block.part, queries=self.block.queries,
            **{name: tensor.cpu() for name, tensor in on_cpu.items()},
            output_bias=self.output_bias,
            parameters=heads.parameters() + self.block.parameters_beside, fixed_qk=self.block.normed,
            keeps_heads=self.block.normed and self.block.family.norm_spans_heads,
        )  # fmt: skip

    def _norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Norms of the two sides' weights, multiplied, float64.

        Returns:
            Those of pairs ``(kv, p)``, of plain directions ``(kv, s)`` and of value directions ``(kv, e)``.
        """
        heads, rotary = self.heads, self.heads.rotary
        if self.moments is None and heads.q_bias is None:  # what was decomposed, see ``decompose`` and ``white_gram``
            pair = 2 * self.pair_gram.diagonal(dim1=-2, dim2=-1)[..., : heads.pairs].sum(1)
            return pair.sqrt(), self.plain.values.clone(), self.value.values.clone()
        q, k = _energies(heads)
        pair = (q[..., :rotary].unflatten(-1, (2, -1)).sum((1, -2))) * k[:, :rotary].unflatten(-1, (2, -1)).sum(-2)
        q_plain = _row_energies(self.plain.t_a, weight_gram(_biased(heads.q, heads.q_bias)[:, :, rotary:]).sum(1))
        k_plain = _row_energies(self.plain.t_b, weight_gram(heads.k[:, rotary:]))
        v = _row_energies(self.value.t_a, weight_gram(heads.v))
        o = _row_energies(self.value.t_b, weight_gram(heads.o.mT).sum(1))
        return pair.sqrt(), (q_plain * k_plain).sqrt(), (v * o).sqrt()

    def spectrum(self) -> Spectrum:
        """Singular values beside the norms of the original directions, for people; none of Q-K behind a norm."""
        q, k = _energies(self.heads)
        v, o = energies(self.heads.v), energies(self.heads.o.mT).sum(1)
        return Spectrum(
            self.name, self.block.part,
            qk=() if self.block.normed else _rows(torch.cat([self.pair_cost.sqrt(), self.plain.values], -1)),
            vo=_rows(self.value.values),
            qk_norms=_rows((q.sum(1) * k).sqrt()), vo_norms=_rows((v * o).sqrt()),
        )  # fmt: skip

    def cut(self, plan: BlockPlan) -> dict[str, Tensor]:
        """The weights of the block at the ranks of ``plan``, in its dtype, and biases, see ``CloverAttention.fill``.

        At full rank the block's function is unchanged. With moments, values and output projection are refitted over all
        heads to the uncut block's output, and the output bias takes up the mean of what was cut.

        Returns:
            ``q``, ``k``, ``v`` and ``o``, those of ``q_bias``, ``k_bias``, ``v_bias`` (else in ``o_bias``) and
            ``o_bias`` that there are, and under RoPE the ``frequencies``.
        """
        pieces = self._queries_and_keys(plan) | self._output(plan)
        return pieces | ({"frequencies": self._frequencies(plan)} if self.heads.rotary else {})

    def _queries_and_keys(self, plan: BlockPlan) -> dict[str, Tensor]:
        """Their projections, and the biases that there are: pairs first, then what doesn't turn, head after head."""
        heads, n, kept = self.heads, plan.queries, plan.qk_kept
        made = {
            "q": heads.q.new_empty(n * kept, heads.q.shape[-1]),
            "k": heads.k.new_empty(kept, heads.k.shape[-1]),
        }
        if heads.q_bias is not None:
            made["q_bias"] = heads.q_bias.new_empty(n * kept, dtype=torch.float64)
        if heads.k_bias is not None:
            made["k_bias"] = heads.k_bias.new_empty(kept, dtype=torch.float64)
        for some, group, at in self._portions(plan):
            queries, keys = self._cuts(some, group)
            columns = slice(at, at + len(some) * group.qk)
            rows = slice(n * columns.start, n * columns.stop)
            made["q"][rows], made["k"][columns] = queries(heads.q[some]), keys(heads.k[some])
            if heads.q_bias is not None:
                made["q_bias"][rows] = queries(heads.q_bias[some].unsqueeze(-1)).squeeze(-1)
            if heads.k_bias is not None:
                made["k_bias"][columns] = keys(heads.k_bias[some].unsqueeze(-1)).squeeze(-1)
        return made

    def _portions(self, plan: BlockPlan) -> Iterator[tuple[Tensor, Group, int]]:
        """Heads of one group, as many as are best worked on at once; their group; the Q-K columns before them."""
        portion = PORTION_ON_GPU if self.heads.q.is_cuda else PORTION
        at_once = max(1, portion // self.heads.q[0].numel())
        for group, at, _ in plan.spans():
            for some in torch.tensor(group.heads, device=self.heads.q.device).split(at_once):
                yield some, group, at
                at += len(some) * group.qk

    def _cuts(self, some: Tensor, group: Group) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What takes queries ``(heads, n, d, x)`` and keys ``(heads, d, x)`` of some heads to their kept rows, flat."""
        rotary, kept = self.heads.rotary, self._kept_pairs(some, group)
        gains = fit_gains(self.pair_gram[some], kept)
        plain = [bases[some, : group.plain] for bases in (self.plain.t_a, self.plain.t_b)]
        if self.block.normed:
            plain = [torch.eye(group.plain, dtype=torch.float64, device=some.device)] * 2

        def queries(x: Tensor) -> Tensor:
            rows = [gained(x[:, :, :rotary], gains, kept)] if rotary else []
            if group.plain:
                side = plain[0] if self.block.normed else plain[0].unsqueeze(1)
                rows.append(side @ x[:, :, rotary:].double())
            return joined(rows, 2).flatten(0, 2)

        def keys(x: Tensor) -> Tensor:
            rows = [chosen(x[:, :rotary], kept)] if rotary else []
            if group.plain:
                rows.append(plain[1] @ x[:, rotary:].double())
            return joined(rows, 1).flatten(0, 1)

        return queries, keys

    def _kept_pairs(self, some: Tensor, group: Group) -> Tensor:
        return self.pair_order[some, : group.pairs].sort(-1).values

    def _frequencies(self, plan: BlockPlan) -> Tensor:
        """Number of the frequency of each pair of flat columns; one past the last for columns that do not turn."""
        keys, queries = [], []
        for group in plan.groups:
            kept = self._kept_pairs(torch.tensor(group.heads, device=self.pair_order.device), group)
            pairs = torch.nn.functional.pad(kept, (0, group.plain // 2), value=self.heads.pairs)
            keys.append(pairs.flatten())
            queries.append(pairs.repeat_interleave(plan.queries, 0).flatten())
        return torch.cat(queries + keys)

    def _output(self, plan: BlockPlan) -> dict[str, Tensor]:
        """Value projection ``(columns of the KV heads, C)``, output projection ``(M, columns)`` and their biases.

        ``down`` and ``up`` are ``D`` and ``U`` of docs/mathematics.md: the rows that take each KV head to the
        directions that it keeps, and the output projection behind them.
        """
        heads, moments = self.heads, self.moments
        kept = [(head, group.value) for group in plan.groups for head in group.heads]
        layout = Kept.of(kept, plan.queries, heads.v.shape[1], len(heads.v), heads.v.device)
        fits = moments is not None and plan.vo_kept < plan.kv_heads * plan.vo
        down, up = torch.cat([self.value.t_a[head, :rank] for head, rank in kept]), self._up(plan, kept, fits)
        bias = down.new_zeros(len(up)) if heads.o_bias is None else heads.o_bias.double()
        if moments is not None and fits:
            whole = _flat_output(heads)
            covariance = _definite(moments.output)
            up, down = fit(whole @ covariance, up, down, layout, covariance, moments.gradient)
            bias = bias + whole @ moments.mean - up @ layout.times(down, moments.mean.unsqueeze(1)).squeeze(1)
        each = list(zip([head for head, _ in kept], down.split([rank for _, rank in kept]), strict=True))
        values = heads.v.new_empty(plan.vo_kept, heads.v.shape[-1])
        for rows, (head, basis) in zip(values.split([rank for _, rank in kept]), each, strict=True):
            rows.copy_(basis @ heads.v[head].double())
        found = {"v": values, "o": up.to(heads.o.dtype)}
        if heads.v_bias is not None and self.block.sinks is not None:  # the weights of the values don't sum to 1
            found["v_bias"] = torch.cat([basis @ heads.v_bias[head].double() for head, basis in each])
        elif heads.v_bias is not None:  # a constant: whole, unless the fit has put that of what went among the means
            flat = heads.v_bias.double().unsqueeze(1).expand(-1, plan.queries, -1).reshape(-1, 1)
            constant = up @ layout.times(down, flat) if fits else _flat_output(heads) @ flat
            bias = bias + constant.squeeze(1)
        return found | ({"o_bias": bias} if plan.output_bias else {})

    def _up(self, plan: BlockPlan, kept: list[tuple[int, int]], fits: bool) -> Tensor:
        """The output projection before the fit, ``(M, columns)``; float64 if more is computed with it."""
        heads = self.heads
        dtype = torch.float64 if fits or heads.v_bias is not None else heads.o.dtype
        up = heads.o.new_empty(heads.o.shape[2], plan.queries * plan.vo_kept, dtype=dtype)
        each = [(head, query, rank) for head, rank in kept for query in range(plan.queries)]
        for columns, (head, query, rank) in zip(up.split([rank for *_, rank in each], 1), each, strict=True):
            columns.copy_(heads.o[head, query].double() @ self.value.t_b[head, :rank].mT)
        return up


@torch.no_grad()
def find_basis(block: Block, moments: Moments | None = None) -> Basis:
    """Decompose one block.

    Args:
        block: of finite weights, see ``Heads.check_finite``.
        moments: activation statistics; without them the metric is the paper's, weights only.

    Raises:
        CloverError: shapes that contradict the config.
    """
    heads = block.heads().map(Tensor.detach)
    moments = moments and moments.to(heads.q.device)
    kv, n, _, _ = heads.q.shape
    rotary, e = heads.rotary, heads.v.shape[1]
    if moments is None:
        query, key, pair = _weight_grams(heads)
        value = weight_gram(heads.v)
    else:
        query, key, pair = _definite(moments.query), _definite(moments.key), moments.pair
        per_head = moments.output.unflatten(0, (kv, n, e)).unflatten(-1, (kv, n, e))
        value = _definite(torch.einsum("gnagnb->gab", per_head))
    weight = heads.o.double()
    if moments is not None:
        weight = square_root(_definite(moments.gradient)).mT @ weight
    output = torch.einsum("gnme,gnmf->gef", weight, weight)
    if block.normed:  # nothing may be mixed or reordered in front of a norm; pairs keep their order
        order = torch.arange(heads.pairs, device=heads.q.device).expand(kv, -1)
        cost = torch.ones(kv, heads.pairs, dtype=torch.float64, device=heads.q.device)
        pair = torch.eye(rotary, dtype=torch.float64, device=heads.q.device).expand(kv, n, -1, -1)
    else:
        order, cost = by_energy(pair) if moments is None else eliminate(pair)
    return Basis(block, heads, moments, pair, order, cost, decompose(query, key), decompose(value, output))


def _flat_output(heads: Heads) -> Float[Tensor, "M z"]:
    """The output projection as it stands behind all query heads, float64."""
    return heads.o.permute(2, 0, 1, 3).flatten(1).double()


def _weight_grams(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Q-K Grams under white input: of queries, of keys, of rotary features."""
    rotary, q, k = heads.rotary, _biased(heads.q, heads.q_bias), _biased(heads.k, heads.k_bias)
    still = q[:, :, rotary:].double()
    query = torch.einsum("gnax,gnbx->gab", still, still)
    return query, weight_gram(heads.k[:, rotary:]), white_gram(q[:, :, :rotary], k[:, :rotary])


def _biased(weight: Float[Tensor, "*heads d D"], bias: Float[Tensor, "*heads d"] | None) -> Float[Tensor, "*heads d x"]:
    """Rows with their bias as the weight of an input that is always 1, ``[W | b]``; without one as they lie."""
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(-1)], -1)


def _energies(heads: Heads) -> tuple[Tensor, Tensor]:
    """Squared row norms of the query ``(kv, n, d)`` and key ``(kv, d)`` projections, ``[W | b]`` where ``b`` counts.

    The bias of keys that don't turn shifts all logits alike.
    """
    q, k, rotary = energies(heads.q), energies(heads.k), heads.rotary
    if heads.q_bias is not None:
        q += heads.q_bias.double() ** 2
    if heads.k_bias is not None:
        k[:, :rotary] += heads.k_bias[:, :rotary].double() ** 2
    return q, k


def _row_energies(transform: Float[Tensor, "kv r d"], gram: Float[Tensor, "kv d d"]) -> Float[Tensor, "kv r"]:
    """Squared row norms of ``transform @ weight``, from the weight's Gram."""
    return (transform @ gram * transform).sum(-1).clamp_min(0)


def _definite(gram: Tensor) -> Tensor:
    """A moment of positive definite form; sums in float32 may leave one that is not. If nothing moved, all counts."""
    found = ridged(gram, CALIBRATION_RIDGE)
    failed = torch.linalg.cholesky_ex(found).info > 0
    if failed.any():
        least = torch.where(failed, torch.linalg.eigvalsh(gram)[..., 0].clamp_max(0), 0.0)
        found = found - least[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return found


def _rows(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.sort(-1, descending=True).values.tolist())
