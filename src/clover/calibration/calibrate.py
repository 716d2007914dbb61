"""Second moments of what flows through the heads, gathered by hooks over a few batches.

What is kept of a block is small, ``O(D^2)``: moments of queries, attention-weighted covariances of keys (under RoPE:
of the pairs' contributions to the logits), the second moment of the head outputs, and that of the gradient of the
model's own log-likelihood at the block's output, which says what an error there costs (the Fisher information; no
labels are needed, they are drawn from the model). The model is left as it was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clover.calibration.visible import bias_of, in_other_texts, weights_of
from clover.decomposition.rotary import features
from clover.errors import CloverError, warn
from clover.model.answers import answer, on, padding, score, several, valid
from clover.model.block import Block, growth_at, head_bias
from clover.model.heads import Heads
from clover.model.precision import exact_products, or_wider, unrounded
from clover.model.rotation import angles, turned
from clover.model.running import forward
from clover.progress import track

QUERIES = 32
"""Queries sampled from each sequence, for the statistics of Q-K."""
IDLE = 1e-9
"""What an error costs in a block that the output does not depend on, relative to the mean of the others."""
FEATURES, LARGEST = 2**25, 2**27
"""Numbers of rotary features that are held at once: of several heads on a GPU, and at most of one anywhere."""


@dataclass(frozen=True)
class Moments:
    """Statistics of one block, float64. ``s`` unrotated columns, ``r`` rotated ones, ``z`` columns of all heads."""

    query: Float[Tensor, "kv s s"]
    """``E[q q^T]``, summed over the query heads of a KV head."""
    key: Float[Tensor, "kv s s"]
    """Mean over queries of the covariance of the keys, weighted as ``weights_of`` says."""
    pair: Float[Tensor, "kv n r r"]
    """Likewise of the rotary features."""
    output: Float[Tensor, "z z"]
    """Covariance of the head outputs in front of the output projection."""
    mean: Float[Tensor, " z"]
    gradient: Float[Tensor, "M M"]
    """``E[g g^T]`` of the gradient ``g`` at the block's output: an error ``e`` there costs ``1/2 E[(g . e)^2]`` nats
    a token."""
    tokens: int

    def to(self, device: torch.device) -> Moments:
        """The same on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def calibrate(
    model: nn.Module, blocks: Sequence[Block], batches: Iterable[Any], *, queries: int = QUERIES, seed: int = 0
) -> list[Moments]:
    """Run ``batches`` through the model and gather the moments of ``blocks``.

    Args:
        batches: what the model's forward takes: mappings of its arguments, or tensors for its first argument. A 2-d
            ``attention_mask`` of 0 and 1 keeps padding out of the statistics.
        queries: queries sampled from each sequence for the Q-K statistics (heads' outputs use all tokens).
        seed: of that sample.

    Raises:
        CloverError: no batches, a block that none of them reached, none that influences the model's output, or
            activations that are not finite.
    """
    if type(model).forward is nn.Module.forward:
        raise CloverError(f"{type(model).__name__} has no forward of its own; give the part of it that reads the data")
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantiser.is_trainable:
        how = type(quantiser).__name__.removesuffix("HfQuantizer")
        raise CloverError(f"no gradient comes back through {how} weights; load the model dequantised to calibrate it")
    device = next(model.parameters()).device
    watchers = [Watcher(block, queries, torch.Generator().manual_seed(seed + i)) for i, block in enumerate(blocks)]
    training, trainable = [m for m in model.modules() if m.training], [p for p in model.parameters() if p.requires_grad]
    draws = torch.Generator().manual_seed(seed)  # of the CPU: a GPU would draw others
    model.eval().requires_grad_(False)
    try:
        seen = answers = 0
        with watching(watchers):
            for batch in track(several(batches), "calibrate"):
                batch = on(batch, device)
                masks = padding(batch, model)
                for watcher in watchers:
                    watcher.masks = masks.of(watcher.block.part)
                with torch.enable_grad():
                    said, words, by_token = answer(forward(model, batch), batch, model)
                real = valid(said, masks.decoder if by_token else ())
                if said.requires_grad:  # else the batch reached no block, which is said below
                    said.backward(score(said, words, real, draws))
                seen, answers = seen + 1, answers + int(real.sum())
                del said  # or it would be there beside the next
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_()
    if not seen:
        raise CloverError("the calibration data is empty; give at least one batch")
    missed = {w.block.part for w in watchers if not w.tokens}
    for watcher in watchers:
        watcher.check_reached({w.block.part for w in watchers} - missed)
    _value_idle(watchers)
    warn_of_few((w.block.name, w.tokens, len(w.sums["mean"])) for w in watchers)
    watchers.reverse()
    return [watchers.pop().moments(answers) for _ in blocks]  # each let go of: the sums are as large as the moments


def warn_of_few(reached: Iterable[tuple[str, int, int]]) -> None:
    """Warn of the first block (name, tokens, columns of its heads) that fewer tokens reached than it has columns."""
    for name, tokens, columns in reached:
        if tokens < columns:
            warn(f"{tokens} tokens reached {name}, fewer than the {columns} columns of its heads; give more data")
            return


@contextmanager
def watching(watchers: Sequence[Watcher]) -> Iterator[None]:
    """While it lasts, watchers see their blocks, and products are not shortened: sums of such are no Grams any more."""
    hooks: list[Any] = []
    try:
        for watcher in watchers:
            hooks += watcher.attach()
        with exact_products():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _value_idle(watchers: Sequence[Watcher]) -> None:
    """Let errors cost next to nothing, alike in all directions, in blocks that were reached to no effect.

    So they go first, and yet have a basis that is whole: a cost of zero would leave nothing to rank directions by.

    Raises:
        CloverError: a whole stack of layers is idle, such as one tower of several that each have an output.
    """
    effect = {w: float(w.sums["gradient"].diagonal().mean()) if "gradient" in w.sums else 0.0 for w in watchers}
    idle, others = [w for w in watchers if effect[w] == 0], [w for w in watchers if effect[w] != 0]
    if not idle or not others:
        return
    stacks = {_stack(w) for w in others}
    if apart := next((w for w in idle if _stack(w) not in stacks), None):
        raise CloverError(
            f"{apart.block.name} and its like do not influence the output that is scored (logits, else the first); "
            "prune another part, calibrate the part of the model that they are in, or go by the weights alone"
        )
    names = ", ".join(w.block.name for w in idle)
    warn(f"the model's output does not depend on {names}; most of that will be cut")
    for watcher in idle:
        output = watcher.sums["output"]
        eye = torch.eye(watcher.heads.o.shape[-2], dtype=output.dtype, device=output.device)
        watcher.sums["gradient"] = eye * (IDLE * sum(effect[w] for w in others) / len(others))


def _stack(watcher: Watcher) -> str:
    """The block's name without numbers: that of all in its stack of layers."""
    return re.sub(r"\d+", "", watcher.block.name)


class Watcher:
    """Sums of one block. Products are made in float32, sums kept in float64."""

    def __init__(self, block: Block, queries: int, generator: torch.Generator) -> None:
        self.block, self.queries, self.generator = block, queries, generator
        self.heads: Heads = block.heads()
        self.masks: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}
        self.rows = self.tokens = 0

    def attach(self) -> list[Any]:
        """Begin to watch; returns the hooks, to be removed.

        Raises:
            CloverError: no gradient can come back.
        """
        if torch.is_inference_mode_enabled():
            raise CloverError("calibration needs gradients, which torch.inference_mode() rules out; call it outside")
        projection = self.block.projection("o")
        hooks = [projection.register_forward_pre_hook(self._output), projection.register_forward_hook(self._gradient)]
        if not self.block.normed:
            hooks.append(self.block.core.register_forward_pre_hook(self._attention, with_kwargs=True))
        return hooks

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _gradient(self, _: nn.Module, __: tuple, output: Tensor) -> None:
        """Watch the gradient that will come back to the block's output; the first block's is where the graph begins."""
        if not torch.is_grad_enabled():
            raise CloverError(
                f"the model runs {self.block.name} without gradients (torch.no_grad), so what an error there costs "
                "can't be told; prune another part, or by the weights"
            )
        if not output.requires_grad:
            output.requires_grad_()
        real = valid(output, self.masks)

        @unrounded
        def add(gradient: Tensor) -> None:
            g = gradient[real].float()
            self._add("gradient", g.T @ g)

        output.register_hook(add)

    @torch.no_grad()
    @unrounded
    def _output(self, _: nn.Module, args: tuple) -> None:
        z = args[0].flatten(2)
        z = z[valid(z, self.masks)].float()
        self._add("output", z.T @ z)
        self._add("mean", z.sum(0))
        self.tokens += len(z)

    @torch.no_grad()
    @unrounded
    def _attention(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        call = self.block.arguments(args, kwargs)
        x = call["hidden_states"]
        reads, source, beside = self.block.reads(call)
        mask = call.get("attention_mask")
        by_head = head_bias(self.block.family, self.block.core, call, x.shape[1], source.shape[1], 0)
        pairs = self.heads.pairs + self.block.pairs_beside
        both = angles(self.block.family, call["position_embeddings"], x.shape[1], pairs) if pairs else ()
        for b, real in enumerate(valid(x, self.masks)):
            rows = self._sample(real)
            if not len(rows):
                continue
            q = _apply(self.heads.q, self.heads.q_bias, reads[b, rows])
            k = _apply(self.heads.k, self.heads.k_bias, source[b])
            turns = [t[min(b, len(t) - 1)].float() for t in both]
            if self.heads.rotary:
                cos, sin = turns
                q, k = _rotate(q, cos[rows], sin[rows]), _rotate(k, cos, sin)
            if beside is not None:
                more = self._beside(reads[b, rows], beside[b].float(), rows, turns)
                q, k = (torch.cat([t, m.expand(*t.shape[:-1], -1)], -1) for t, m in zip((q, k), more, strict=True))
            if self.block.growth:
                grown = growth_at(self.block.growth, call, 0)
                q = q * grown[min(b, len(grown) - 1), rows].unsqueeze(-1)
            hidden = self._hidden(call.get("is_causal"), rows, k.shape[-2])
            if "flash" in str(self.block.config._attn_implementation) and mask is None and self.block.part != "cross":
                hidden = hidden | in_other_texts(call.get("position_ids"), b, rows)
            bias = bias_of(mask, by_head, b, rows, hidden).to(q.device)
            kv, n = self.heads.q.shape[:2]
            self._observe(q, k, bias.expand(kv * n, -1, -1).unflatten(0, (kv, n)))
            self.rows += len(rows)

    def _beside(self, x: Tensor, key: Tensor, rows: Tensor, turns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Columns of queries ``(kv, n, m, r)`` and of keys ``(t, r)`` that stand beside those of the heads, turned."""
        query = _apply(self.block.queries_beside().unflatten(0, self.heads.q.shape[:2]), None, x)
        if not turns:
            return query, key
        cos, sin = turns
        neighbours = self.block.neighbours_beside
        return turned(query, cos[rows], sin[rows], neighbours), turned(key, cos, sin, neighbours)

    def _hidden(self, causal: bool | None, rows: Tensor, keys: int) -> Tensor:
        """Keys that are out of sight without a mask that says so, ``(rows, keys)``."""
        at = torch.arange(keys, device=rows.device)
        window = self.block.family.window(self.block.core) or keys
        if not (self.block.family.causal if causal is None else causal):
            return (at - rows[:, None]).abs() >= window
        return (at > rows[:, None]) | (at <= rows[:, None] - window)

    def _sample(self, real: Tensor) -> Tensor:
        rows = real.nonzero()[:, 0]
        pick = torch.randperm(len(rows), generator=self.generator, device="cpu")[: self.queries].sort().values
        return rows[pick.to(rows.device)]

    def _observe(self, q: Tensor, k: Tensor, bias: Tensor) -> None:
        """Add one sequence: ``q`` (kv, n, m, d + r), ``k`` (kv, t, d + r), ``bias`` (kv, n, m, t)."""
        rotary, cap, sinks, d = self.heads.rotary, self.block.softcap, self.block.sinks, self.heads.q.shape[2]
        logits = q @ k.unsqueeze(1).mT * self.block.scale
        if cap is not None:
            logits = cap * (logits / cap).tanh()
        weights = weights_of(logits + bias, bias, None if sinks is None else sinks.float().view(len(k), -1))
        if rotary:
            self._add("pair", _feature_covariance(q[..., :rotary], k[..., :rotary], weights))
        if d > rotary:
            q, k = q[..., rotary:d], k[..., rotary:d]
            self._add("query", torch.einsum("gnmd,gnme->gde", q, q))
            means = weights @ k.unsqueeze(1)
            spread = torch.einsum("gt,gta,gtb->gab", weights.sum((1, 2)), k, k)
            self._add("key", (spread - torch.einsum("gnmd,gnme->gde", means, means)) / q.shape[1])

    def check_reached(self, parts: Collection[str] = ()) -> None:
        """See that there is something to tell.

        Args:
            parts: of the model, which were reached.

        Raises:
            CloverError: no batch came here.
        """
        if not self.tokens:
            instead = f", or choose part={' or '.join(map(repr, sorted(parts)))}" if parts else ""
            if "output" in self.sums:  # of no token
                raise CloverError(f"all that reached {self.block.name} is padding; check attention_mask of the batches")
            what = f"no calibration batch reached {self.block.name}"
            raise CloverError(f"{what}; give batches that run that part of the model{instead}")

    def moments(self, answers: int | None = None) -> Moments:
        """What was gathered; the sums are gone then.

        Args:
            answers: tokens that the model answered with; left out, as many as this block has read. A block that reads
                more (an encoder) costs more an answer.

        Raises:
            CloverError: nothing, or what is not finite.
        """
        name = self.block.name
        self.check_reached()
        if "gradient" not in self.sums:
            raise CloverError(
                f"{name} does not influence the model's output on the calibration data; prune another part, or by "
                "the weights alone"
            )
        kv, n, d, _ = self.heads.q.shape
        rotary = self.heads.rotary
        shapes = {
            "query": (kv, d - rotary, d - rotary),
            "key": (kv, d - rotary, d - rotary),
            "pair": (kv, n, rotary, rotary),
        }
        answers = answers or self.tokens
        weight = {"query": self.tokens / answers, "pair": self.tokens / answers, "key": 1.0}
        found = {
            k: self.sums.pop(k).mul_(weight[k] / self.rows) if k in self.sums else torch.zeros(s, dtype=torch.float64)
            for k, s in shapes.items()
        }
        mean = self.sums.pop("mean") / self.tokens
        output = self.sums.pop("output").div_(self.tokens).sub_(mean.outer(mean))
        gradient = self.sums.pop("gradient").div_(answers)
        for key, value in {**found, "output": output, "gradient": gradient}.items():
            if not value.isfinite().all():
                wider = or_wider(self.heads.o.dtype)
                raise CloverError(f"{name}: the calibration moment of {key} is not finite; check the data{wider}")
        return Moments(**found, output=output, mean=mean, gradient=gradient, tokens=self.tokens)


def _apply(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Project tokens ``(t, D)`` by heads ``(..., d, D)`` to ``(..., t, d)`` in float32."""
    y = x.float() @ weight.float().mT
    return y if bias is None else y + bias.float().unsqueeze(-2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs, real parts in the first half of the leading columns and imaginary parts in the second."""
    pairs, rest = x.tensor_split([2 * cos.shape[-1]], -1)
    return torch.cat([turned(pairs, cos, sin, neighbours=False), rest], -1)


def _feature_covariance(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """Sum over queries of the covariance of the rotary features, ``(kv, n, r, r)``."""
    # A KV head at a time, to bound memory; on GPUs as many as fit a hundred megabytes: launching work is slow there.
    each = q[0, ..., 0].numel() * k[0].numel()
    if each > LARGEST and q.shape[2] > 1:
        some = max(1, q.shape[2] * LARGEST // each)
        parts = zip(q.split(some, 2), weights.split(some, 2), strict=True)
        return torch.stack([_feature_covariance(part, k, w) for part, w in parts]).sum(0)
    at_once = max(1, FEATURES // each) if q.is_cuda else 1
    found = []
    for some_q, some_k, some_weights in zip(q.split(at_once), k.split(at_once), weights.split(at_once), strict=True):
        f, w = features(some_q, some_k.unsqueeze(1)), some_weights.unsqueeze(-1)
        means, rooted = (w * f).sum(-2), (w.sqrt() * f).flatten(-3, -2)
        found.append(rooted.mT @ rooted - means.mT @ means)
    return torch.cat(found)
