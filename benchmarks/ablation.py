"""What each choice of the method is worth: one thing changed at a time, on the harness of frontier.py.

    python benchmarks/ablation.py MODEL [--rows ROW ...] [--cuts QK/VO ...]

MODEL: as in frontier.py. A row replaces statistics of the calibration, or the rule of the plan; the rest is the
product's own code. Beside the model's score stands the divergence of its output from the dense model's, in nats a
token, on two windows of the test text or on four test utterances, which is smoother than a word error rate. Each result
is a file of its own, and what has one is not run again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import frontier
import speech
from clover import calibrate as calibration
from clover.basis import Basis, find_basis
from clover.budget import Share
from clover.calibrate import Moments
from clover.data import calibration_batches
from clover.export import pad
from clover.families import blocks
from clover.pruning import apply, plan_ranks
from common import RESULTS, SEED, record

Extra = dict[str, Tensor]
"""Further statistics of a block: ``impact`` and, for each other weight of the keys, ``NAME_key`` and ``NAME_pair``."""


@dataclass(frozen=True)
class Observed(Moments):
    """The product's moments and those of other metrics."""

    extra: Extra = field(default_factory=dict)


class Watcher(calibration._Watcher):
    """Gathers besides the product's moments those of other metrics, from the same queries."""

    def attach(self) -> list[Any]:
        self.pending: list[tuple] = []
        return [*super().attach(), self.block.projection("q").register_forward_hook(self._query_gradient)]

    def _attention(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.call, self.at = self.block.arguments(args, kwargs), -1
        super()._attention(module, args, kwargs)

    def _sample(self, valid: Tensor) -> Tensor:
        self.at, self.picked = self.at + 1, super()._sample(valid)
        return self.picked

    def _observe(self, q: Tensor, k: Tensor, bias: Tensor) -> None:
        super()._observe(q, k, bias)
        logits = q @ k.unsqueeze(1).mT * self.block.get(self.block.family.scale) + bias
        visible = (bias > -torch.inf).float()
        weights = {"softmax": logits.softmax(-1).nan_to_num(0.0)}
        weights["uniform"] = (visible / visible.sum(-1, keepdim=True).clamp_min(1)).expand_as(logits)
        for name, w in weights.items():
            self._covariance(name, q, k, w)
        x, source = self.call["hidden_states"], self.call.get("key_value_states")
        source = (x if source is None else source)[self.at]
        v = calibration._apply(self.heads.v, self.heads.v_bias, source)
        self._add("value", torch.einsum("gta,gtb->gab", v, v) / len(source))
        self._add("sequences", torch.ones(()))
        self.pending.append((self.at, self.picked, v, (weights["softmax"] + weights["uniform"]) / 2))

    def _covariance(self, name: str, q: Tensor, k: Tensor, w: Tensor) -> None:
        rotary = self.heads.rotary
        if rotary:
            self._add(f"{name}_pair", calibration._feature_covariance(q[..., :rotary], k[..., :rotary], w))
        if k.shape[-1] > rotary:
            k = k[..., rotary:]
            means = w @ k.unsqueeze(1)
            spread = torch.einsum("gt,gtd,gte->gde", w.sum((1, 2)), k, k)
            self._add(f"{name}_key", (spread - torch.einsum("gnmd,gnme->gde", means, means)) / q.shape[1])

    def _gradient(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        super()._gradient(module, args, output)
        output.register_hook(self._impact)

    def _impact(self, gradient: Tensor) -> None:
        """How much the loss feels where a head looks: variance, under the key weights, of what each value is worth."""
        o = self.heads.o.float()
        for at, rows, v, w in self.pending:
            worth = torch.einsum("tm,gnme,gse->gnts", gradient[at, rows].float(), o, v)
            mean = (w * worth).sum(-1, keepdim=True)
            self._add("impact", (w * (worth - mean).square()).sum((-1, -2)))
        self.pending = []

    def _query_gradient(self, _: nn.Module, __: tuple, output: Tensor) -> None:
        """What the logits' own gradient sees: query times gradient at the query (it is the weighted sum of keys)."""
        if not output.requires_grad:
            output.requires_grad_()
        kv, n, d, _ = self.heads.q.shape
        rows = self.block.rows("q").flatten()
        q = output.detach()[..., rows].flatten(0, 1).float()

        def add(gradient: Tensor) -> None:
            u = gradient[..., rows].flatten(0, 1).float() / self.block.get(self.block.family.scale)
            a, b = (t.view(-1, kv, n, d) for t in (q, u))
            rotary, half = self.heads.rotary, self.heads.rotary // 2
            if rotary:
                q_re, q_im, u_re, u_im = a[..., :half], a[..., half:rotary], b[..., :half], b[..., half:rotary]
                f = torch.cat([q_re * u_re + q_im * u_im, q_im * u_re - q_re * u_im], -1)
                self._add("fisher_pair", torch.einsum("tgna,tgnb->gnab", f, f))
            if d > rotary:
                b = b[..., rotary:]
                self._add("fisher_key", torch.einsum("tgna,tgnb->gab", b, b) / n)

        output.register_hook(add)

    def moments(self) -> Observed:
        found = super().moments()
        extra = {k: v / self.rows for k, v in self.sums.items() if k.startswith(("softmax", "uniform", "impact"))}
        extra |= {k: v / self.tokens for k, v in self.sums.items() if k.startswith("fisher")}
        extra["value"] = self.sums["value"] / self.sums["sequences"]
        return Observed(**vars(found), extra=extra)


@cache
def statistics(name: str) -> list[Observed]:
    found = blocks(frontier.dense(name), frontier.part(name))
    kept = calibration._Watcher
    calibration._Watcher = Watcher  # type: ignore[misc]
    try:
        return calibration.calibrate(frontier.dense(name), found, frontier.calibration(name), seed=SEED)  # type: ignore[return-value]
    finally:
        calibration._Watcher = kept  # type: ignore[misc]


# --- rows: moments in, moments out ---


def _weights(name: str) -> Callable[[Moments, Extra], Moments]:
    return lambda m, x: replace(m, key=x.get(f"{name}_key", m.key), pair=x.get(f"{name}_pair", m.pair))


def _impact(power: float) -> Callable[[Moments, Extra], Moments]:
    def change(m: Moments, x: Extra) -> Moments:
        factor = x["impact"] ** power
        return replace(m, key=m.key * factor.mean(1)[:, None, None], pair=m.pair * factor[..., None, None])

    return change


def _values_before_attention(m: Moments, x: Extra) -> Moments:
    """Second moment of the values themselves, as if every token saw only itself and heads were independent."""
    n = m.output.shape[0] // x["value"].shape[0] // x["value"].shape[1]
    return replace(
        m, output=torch.block_diag(*(g for g in x["value"] for _ in range(n))), mean=torch.zeros_like(m.mean)
    )


ROWS: dict[str, Callable[[Moments, Extra], Moments]] = {
    "product": lambda m, _: m,
    "keys-softmax": _weights("softmax"),
    "keys-uniform": _weights("uniform"),
    "keys-impact": _impact(1.0),
    "keys-impact-root": _impact(0.5),
    "keys-fisher": _weights("fisher"),
    "values-unweighted": lambda m, _: replace(m, gradient=torch.eye(len(m.gradient), dtype=torch.float64)),
    "values-before-attention": _values_before_attention,
    "no-bias-compensation": lambda m, _: replace(m, mean=torch.zeros_like(m.mean)),
    "ranks-by-layer": lambda m, _: m,
    "ranks-equal": lambda m, _: m,
}
GRANULARITY = {"ranks-by-layer": "layer", "ranks-equal": "model"}


@cache
def bases(name: str, row: str) -> list[Basis]:
    found = blocks(frontier.dense(name), frontier.part(name))
    return [find_basis(b, ROWS[row](s, s.extra)) for b, s in zip(found, statistics(name), strict=True)]


# --- the divergence ---


@cache
def probes(name: str) -> list[dict[str, Tensor]]:
    if name == "smollm2":
        return [{"input_ids": piece[None]} for piece in frontier.tokens("test")[:2048].split(1024)]
    if name == "minilm":
        return []
    data = calibration_batches(speech.MANIFEST, frontier.dense(name), processor=speech.processor(), split="test")
    return [{k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()} for b in list(data)[::3]]


@torch.inference_mode()
def outputs(model: Any, name: str) -> list[Tensor]:
    model = model.to(torch.bfloat16)
    return [model(**batch).logits[0].float().log_softmax(-1) for batch in probes(name)]


@cache
def expected(name: str) -> list[Tensor]:
    return outputs(copy.deepcopy(frontier.dense(name)), name)


def divergence(model: Any, name: str) -> float:
    pairs = list(zip(expected(name), outputs(model, name), strict=True))
    return sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / max(1, sum(len(p) for p, _ in pairs))


def run(name: str, row: str, qk: float, vo: float) -> None:
    target = f"ablation-{name}-{row}-{100 * qk:g}-{100 * vo:g}"
    if (RESULTS / f"{target}.json").exists():
        return
    found = bases(name, row)
    plan = plan_ranks(found, Share(qk), Share(vo), granularity=GRANULARITY.get(row, "head"))  # type: ignore[arg-type]
    model = copy.deepcopy(frontier.dense(name))
    apply(model, found, plan)
    model = pad(model)
    about = {"model": name, "row": row, "qk": qk, "vo": vo, "divergence": divergence(model, name)}
    record(target, about | frontier.quality(name, model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["smollm2", "whisper-encoder", "whisper-decoder", "whisper-cross", "minilm"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--cuts", nargs="+", default=["0.5/0.5"], metavar="QK/VO")
    options = parser.parse_args()
    for cut in options.cuts:
        qk, vo = map(float, cut.split("/"))
        for row in options.rows:
            run(options.model, row, qk, vo)


if __name__ == "__main__":
    main()
