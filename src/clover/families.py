"""The only home of Hugging Face names: one row for each attention class of transformers.

A row says where a block keeps its projections, sizes and dropouts, and how its ``forward`` is called. The algorithm
knows nothing of it. To add a family, add a row (CONTRIBUTING.md has the recipe).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clover.errors import CloverError, UnsupportedModelError
from clover.heads import Heads


@dataclass(frozen=True)
class Family:
    """Names inside one attention class. Dotted names are paths from the attention module (or from ``core``)."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused: str | None = None
    """A projection that holds several of q, k and v; ``q``, ``k``, ``v`` then only name their order in it."""
    interleaved: bool = False
    """The fused rows run head by head (q, k, v of head 0, of head 1, ...) instead of all of q, all of k, all of v."""
    core: str = ""
    """The child that computes attention, where the matched class also holds the output projection beside it."""
    heads: str = "config.num_attention_heads"
    kv_heads: str | None = None
    head_dim: str = "head_dim"
    scale: str = "scaling"
    rotary: bool = False
    norms: tuple[str, ...] = ()
    """Norms of query and key between projection and logit: Q-K then can't be rotated or cut exactly."""
    dropout: str = "attention_dropout"
    output_dropout: str | None = None
    cross: tuple[str, ...] = ()
    """Last name of a block that attends to another sequence."""
    positional: tuple[str, ...] = ("hidden_states",)
    rename: Mapping[str, str] = field(default_factory=dict)
    """This class's argument names -> the ones that we use."""
    up: tuple[str, ...] = ("mlp.up_proj",)
    """First projections of the MLP beside the attention, as paths from their common parent; tuning can take them."""
    gate: tuple[str, ...] = ()


_LLAMA = Family(kv_heads="config.num_key_value_heads", rotary=True, gate=("mlp.gate_proj",))
_BERT = Family(
    q="query", k="key", v="value", o="output.dense", core="self", heads="num_attention_heads",
    head_dim="attention_head_size", dropout="dropout", cross=("crossattention",),
    rename={"encoder_hidden_states": "key_value_states"}, up=("intermediate.dense",),
)  # fmt: skip
_BART = Family(o="out_proj", heads="num_heads", dropout="dropout", up=("fc1",))

FAMILIES: dict[str, Family] = {
    "LlamaAttention": _LLAMA,
    "MistralAttention": _LLAMA,
    "Qwen2Attention": _LLAMA,
    "Qwen3Attention": replace(_LLAMA, norms=("q_norm", "k_norm")),
    "Phi3Attention": replace(_LLAMA, fused="qkv_proj", up=("mlp.gate_up_proj",), gate=()),
    "GPTNeoXAttention": Family(
        fused="query_key_value", interleaved=True, o="dense", head_dim="head_size", rotary=True,
        rename={"layer_past": "past_key_values"}, up=("mlp.dense_h_to_4h",),
    ),
    "GPT2Attention": Family(
        q="q_attn", fused="c_attn", o="c_proj", heads="num_heads", dropout="attn_dropout",
        output_dropout="resid_dropout",
        cross=("crossattention",), rename={"encoder_hidden_states": "key_value_states"}, up=("mlp.c_fc",),
    ),
    "BloomAttention": Family(
        fused="query_key_value", interleaved=True, o="dense", heads="num_heads", scale="inv_norm_factor",
        dropout="attention_dropout", output_dropout="hidden_dropout", positional=("hidden_states", "residual"),
        rename={"layer_past": "past_key_values"}, up=("mlp.dense_h_to_4h",),
    ),
    "OPTAttention": _BART,
    "WhisperAttention": replace(_BART, cross=("encoder_attn",)),
    "CLIPAttention": replace(_BART, scale="scale", up=("mlp.fc1",)),
    "ViTAttention": Family(positional=("hidden_states", "attention_mask"), up=("mlp.fc1",)),
    "BertAttention": _BERT,
    "RobertaAttention": _BERT,
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One attention block found in a model."""

    name: str
    part: str
    family: Family
    module: nn.Module
    config: Any

    @property
    def core(self) -> nn.Module:
        """The module that computes attention, the one that surgery replaces."""
        return self.module.get_submodule(self.family.core)

    @property
    def core_name(self) -> str:
        return f"{self.name}.{self.family.core}" if self.family.core else self.name

    def get(self, path: str) -> Any:
        """An attribute of the core by dotted path; dropout modules give their probability."""
        value: Any = self.core
        for part in path.split("."):
            value = self.config if part == "config" else getattr(value, part)
        return value.p if isinstance(value, nn.Dropout) else value

    @property
    def queries(self) -> int:
        """Query heads per KV head."""
        heads = self.get(self.family.heads)
        kv = self.get(self.family.kv_heads) if self.family.kv_heads else heads
        if kv < 1 or heads % kv:
            raise CloverError(
                f"{self.name}: {heads} query heads can't share {kv} KV heads; correct the head counts in config.json"
            )
        return heads // kv

    @property
    def rotary(self) -> int:
        """Columns of a head that are rotated by position."""
        if not self.family.rotary:
            return 0
        rope = getattr(self.config, "rope_parameters", None) or {}
        return int(self.get(self.family.head_dim) * rope.get("partial_rotary_factor", 1.0))

    @property
    def normed(self) -> bool:
        """Whether a norm stands between the Q-K projections and the logit."""
        return bool(self.family.norms)

    def projection(self, which: str) -> nn.Module:
        """The module that holds ``q``, ``k``, ``v`` or ``o``."""
        owner = self.module if which == "o" else self.core
        path = getattr(self.family, which)
        fused = self.family.fused
        return owner.get_submodule(fused if fused and not _has(owner, path) else path)

    def heads(self) -> Heads:
        """Read the block as heads; views of the model's weights where the layout allows.

        Raises:
            CloverError: a weight's shape contradicts the head counts of the config.
        """
        n, d = self.queries, self.get(self.family.head_dim)
        h = self.get(self.family.heads)
        weights, biases = self._projections(h, h // n, d)
        o, o_bias = _weight(self.projection("o"), self.name)
        if o.shape[1] != h * d:
            raise CloverError(
                f"{self.name}: the output projection reads {o.shape[1]} columns, but the config's {h} heads of {d} "
                f"make {h * d}; "
                "correct the head counts in config.json"
            )
        per_head = o.unflatten(1, (h // n, n, d)).permute(1, 2, 0, 3)
        return Heads(
            q=weights["q"].unflatten(0, (-1, n)), k=weights["k"], v=weights["v"], o=per_head,
            q_bias=None if biases["q"] is None else biases["q"].unflatten(0, (-1, n)),
            k_bias=biases["k"], v_bias=biases["v"], o_bias=o_bias, rotary=self.rotary,
        )  # fmt: skip

    def rows(self, which: str) -> Tensor:
        """Where the rows of ``q``, ``k`` or ``v`` stand in the weight of their projection: ``(heads, d)``, int64."""
        heads, d = self.get(self.family.heads), self.get(self.family.head_dim)
        counts = {"q": heads, "k": heads // self.queries, "v": heads // self.queries}
        holder = self.projection(which)
        members = [m for m in counts if self.projection(m) is holder]
        rows = torch.arange(sum(counts[m] for m in members) * d)
        return next(w for member, w, _ in self._split(members, counts, d, rows, None) if member == which)

    def _projections(self, heads: int, kv: int, d: int) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Weights ``(heads, d, D)`` and biases ``(heads, d)`` of q, k and v."""
        counts = {"q": heads, "k": kv, "v": kv}
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor | None] = {}
        holders: dict[nn.Module, list[str]] = {}
        for which in counts:
            holders.setdefault(self.projection(which), []).append(which)
        for module, members in holders.items():
            weight, bias = _weight(module, self.name)
            rows = sum(counts[m] for m in members) * d
            if weight.shape[0] != rows:
                raise CloverError(
                    f"{self.name}: the projection of {', '.join(members)} has {weight.shape[0]} rows, but "
                    f"{heads} query heads and "
                    f"{kv} KV heads of {d} make {rows}; correct the head counts in config.json"
                )
            for member, w, b in self._split(members, counts, d, weight, bias):
                weights[member], biases[member] = w, b
        return weights, biases

    def _split(
        self, members: list[str], counts: dict[str, int], d: int, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        w = weight.unflatten(0, (-1, d))
        b = None if bias is None else bias.unflatten(0, (-1, d))
        start = 0
        for i, member in enumerate(members):
            stop = start + counts[member]
            pick = slice(i, None, len(members)) if self.family.interleaved else slice(start, stop)
            yield member, w[pick], None if b is None else b[pick]
            start = stop

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """One call of the core's ``forward`` in our argument names, whatever the class calls them."""
        return arguments(self.family, self.part == "cross", args, kwargs)


def arguments(family: Family, cross: bool, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of an attention ``forward`` as this project does."""
    names = dict(zip(family.positional, args, strict=False)) | kwargs
    call = {family.rename.get(name, name): value for name, value in names.items()}
    if not cross:
        call.pop("key_value_states", None)
    if (mask := call.pop("encoder_attention_mask", None)) is not None and cross:
        call["attention_mask"] = mask
    return call


def blocks(model: nn.Module, part: str = "all") -> list[Block]:
    """Find the attention blocks of a model, in the order of its modules.

    Args:
        part: ``encoder`` (bidirectional self-attention), ``decoder`` (causal self-attention), ``cross`` or ``all``.

    Raises:
        UnsupportedModelError: an attention class that no row describes.
        CloverError: the model has no block in that part, or is pruned already.
    """
    found, covered = [], []
    for name, module in model.named_modules():
        kind = type(module)
        if hasattr(module, "clover"):
            raise CloverError(f"{name} was rewritten by clover before; start from the original model")
        if is_attention(module):
            found.append(block_of(model, name, module))
            covered.append(name + ".")
        elif kind.__name__.endswith("Attention") and not name.startswith(tuple(covered)):
            raise _unsupported(f"{type(model).__name__} has attention of class {kind.__name__}")
    if not found:
        raise _unsupported(f"{type(model).__name__} has no attention block of a known class")
    chosen = [b for b in found if part in ("all", b.part)]
    if not chosen:
        parts = sorted({b.part for b in found})
        raise CloverError(
            f"{type(model).__name__} has no attention block in part {part!r}; it has {', '.join(parts)}, or all"
        )
    return chosen


def is_attention(module: nn.Module) -> bool:
    """Whether a row describes the class of this module."""
    return type(module).__name__ in FAMILIES and type(module).__module__.startswith("transformers.")


def block_of(model: nn.Module, name: str, module: nn.Module) -> Block:
    """The block of an attention module, see ``is_attention``; ``name`` is its path in ``model``."""
    family = FAMILIES[type(module).__name__]
    core = module.get_submodule(family.core)
    part = "decoder" if getattr(core, "is_causal", True) else "encoder"
    if name.rpartition(".")[2] in family.cross:
        part = "cross"
    return Block(name, part, family, module, getattr(core, "config", None) or model.config)


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what}, which clover doesn't support; supported are {', '.join(sorted(FAMILIES))}; "
        "CONTRIBUTING.md says how to add a family"
    )


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def _weight(module: nn.Module, block: str) -> tuple[Tensor, Tensor | None]:
    """Weight as ``(out, in)`` and bias of a Linear or of GPT-2's transposed Conv1D."""
    if isinstance(module, Conv1D):
        return module.weight.T, module.bias
    if type(module) is not nn.Linear:
        raise CloverError(
            f"{block}: a projection is a {type(module).__module__}.{type(module).__name__}, not torch's Linear; "
            "prune before quantising, and merge adapters first"
        )
    return module.weight, module.bias
