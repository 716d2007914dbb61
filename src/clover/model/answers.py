"""What goes into a model and what comes out: batches, what of them is padding, and the score of what is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clover.errors import CloverError

IGNORED = -100
"""The label that transformers' losses leave out, of padding above all."""
INPUTS = ("input_ids", "input_features", "input_values", "pixel_values")
"""What models read, by the names of the arguments."""
ROWS = 256
"""Tokens whose distributions are held at once."""


class Answer(NamedTuple):
    """What a model says of a batch, ``(batch, ...)``."""

    said: Tensor
    words: bool
    """Whether it is logits of words or classes, else numbers."""
    by_token: bool = True
    """Whether a second of three axes is that of tokens, some of which may be padding."""


def answer(output: Any, batch: Any, model: nn.Module) -> Answer:
    """What a model says: its logits, else its first output (not a loss).

    Logits of a token that are as many as neither words nor labels (the pixels of a patch) are numbers, as are those of
    a regression. Of several labels that may be true together each is yes or no, ``(batch, labels, 2)``. Of several maps
    of features it is the last; where an answer begins and where it ends become one output, ``(batch, tokens, 2)``. One
    logit a token, ``(batch, tokens)``, is a number and no class: ``(batch, tokens, 1)``.

    Raises:
        CloverError: the output has no names.
    """
    if not isinstance(output, Mapping):
        raise CloverError(
            f"the model returned a {type(output).__name__}; leave return_dict out of the batch, and config.return_dict "
            "at True"
        )
    logits = output.get("logits", output.get("prediction_logits"))
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if logits is not None and ids is not None and logits.shape == ids.shape:
        return Answer(logits.unsqueeze(-1), False)
    if logits is not None and logits.dim() in (2, 3) and logits.shape[-1] > 1:
        config = getattr(model, "config", None)
        problem = getattr(config, "problem_type", None) if logits.dim() == 2 else None
        if problem == "multi_label_classification":
            return Answer(torch.stack([logits, torch.zeros_like(logits)], -1), True, by_token=False)
        if problem == "regression":
            return Answer(logits, False)
        return Answer(logits, logits.dim() == 2 or logits.shape[-1] in _classes(model, logits.shape[-1]))
    if "start_logits" in output and "end_logits" in output:
        return Answer(torch.stack([output["start_logits"], output["end_logits"]], -1), False)
    outputs = (v[-1] if isinstance(v, tuple | list) and v else v for n, v in output.items() if n != "loss")
    said = (v for v in outputs if isinstance(v, Tensor) and v.is_floating_point() and v.dim())
    return Answer(next(said, torch.zeros(0)), False)


def _classes(model: Any, default: int) -> set[int]:
    """How many words or labels a model may choose among; ``default`` where nothing says so."""
    config = getattr(model, "config", None)
    if config is None:
        return {default}
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    found = {getattr(part, name, 0) for part in parts for name in ("vocab_size", "num_labels")}
    with suppress(NotImplementedError, AttributeError):
        found.add(getattr(model.get_output_embeddings(), "out_features", 0))
    return found | {getattr(config, "num_labels", 0) + 1}  # detectors have one for nothing


@torch.no_grad()
def score(said: Tensor, words: bool, real: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient by what was said of the log-likelihood of a sample from it: words or a class, else Gaussian noise.

    Args:
        words: whether it is logits, ``(batch, tokens, words)`` or ``(batch, classes)``.
        real: what of it is not padding.
    """
    if words and said.dim() == 2:
        return score(said[:, None], words, real[:, None], generator)[:, 0]
    found = torch.zeros_like(said)
    if said.dim() != 3:
        return found.copy_(torch.randn(said.shape, generator=generator, device="cpu"))
    rows = real.nonzero()
    if not words:
        found[real] = torch.randn(len(rows), said.shape[-1], generator=generator, device="cpu").to(found)
        return found
    points = torch.rand(len(rows), 1, generator=generator, device="cpu").to(said.device)
    for where, point in zip(rows.split(ROWS), points.split(ROWS), strict=True):  # they dwarf all else
        b, t = where.T
        chance = said[b, t].float().softmax(-1)
        mass = chance.cumsum(-1)
        drawn = torch.searchsorted(mass, point * mass[:, -1:]).clamp_max(mass.shape[-1] - 1)
        found[b, t] = (-chance).scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=chance.dtype)).to(found)
    return found


def valid(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Which tokens of ``x`` are not padding, ``(batch, tokens)``; of what has no tokens, all items."""
    if x.dim() != 3:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    for mask in masks:
        if mask.shape == x.shape[:2]:
            return mask.to(x.device)
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


class Masks(NamedTuple):
    """What of a batch is not padding, ``(batch, tokens)`` each: what an encoder reads, and what a decoder does."""

    encoder: list[Tensor]
    decoder: list[Tensor]

    def of(self, part: str) -> list[Tensor]:
        """Of the blocks of a part."""
        return self.encoder if part == "encoder" else self.decoder


def padding(batch: Any, model: nn.Module) -> Masks:
    """The masks of a batch that keep padding out of the statistics.

    Of an encoder-decoder that is given both texts, each side has its own: their lengths may happen to be equal. Labels
    without a mask of their own tell what the decoder reads, which is made of them.
    """
    named = dict(batch) if isinstance(batch, Mapping) else {}
    ids = named.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 3:  # several choices an item, which models read as items
        named |= {n: m.flatten(0, 1) for n, m in named.items() if isinstance(m, Tensor) and m.shape == ids.shape}
    flat = {n: m for n, m in named.items() if isinstance(m, Tensor) and m.dim() == 2}
    found = {n: m.bool() for n, m in flat.items() if n.endswith("attention_mask")}
    read = [m for n, m in found.items() if not n.startswith("decoder_")]
    if named.keys() & {"input_values", "input_features"}:
        read += [frames for m in read if (frames := _frames(m, model)) is not None]
    config: Any = getattr(model, "config", None)
    if not (getattr(config, "is_encoder_decoder", False) and any(n.startswith(("decoder_", "labels")) for n in named)):
        return Masks(read, read)
    if "labels" in flat:
        found.setdefault("decoder_attention_mask", flat["labels"] != IGNORED)
    return Masks(read, [m for n, m in found.items() if n.startswith("decoder_")])


def _frames(mask: Tensor, model: nn.Module) -> Tensor | None:
    """A mask of samples of sound as one of the frames that a model makes of them, where it does."""
    hearing: Any = next((m for m in model.modules() if hasattr(m, "_get_feature_vector_attention_mask")), None)
    if hearing is None:
        return None
    frames = int(hearing._get_feat_extract_output_lengths(mask.shape[1]))
    return hearing._get_feature_vector_attention_mask(frames, mask.long()).bool()


def check_words(ids: torch.Tensor, model: Any) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        CloverError: it names the largest.
    """
    words, last = None, int(ids.max())
    with suppress(NotImplementedError):  # of models that keep them in a place of their own
        words = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if words is not None and last >= words:
        raise CloverError(
            f"the tokenizer gives token {last}, but the model knows {words}; take the model's own, not another's"
        )


def several(batches: Iterable[Any]) -> Iterable[Any]:
    """Batches as they are, unless they are a single one.

    Raises:
        CloverError: one batch in the place of several.
    """
    if isinstance(batches, (Mapping, Tensor)):
        raise CloverError(f"the calibration data is one {type(batches).__name__}; give a list of batches: [batch]")
    return batches


def on(batch: Any, device: torch.device) -> Any:
    """A batch on a device: arguments of the model's forward by name, those that are None left out, or its first alone.

    Raises:
        CloverError: it is neither, or what is read is a row of a dataset instead of a batch.
    """
    if isinstance(batch, (list, tuple)) and len(batch) == 1:  # as a loader hands over a dataset of tensors
        batch = batch[0]
    if isinstance(batch, Mapping):
        for name in (n for n in INPUTS if n in batch):
            if not isinstance(batch[name], Tensor) or batch[name].dim() < 2:
                raise CloverError(
                    f"{name} of a calibration batch is a {type(batch[name]).__name__} of one row; give batches of "
                    "tensors (batch, ...), as a DataLoader makes them of a dataset"
                )
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if v is not None}
    if isinstance(batch, Tensor) and batch.dim() > 1:
        return batch.to(device)
    shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""
    raise CloverError(
        f"a calibration batch is a {type(batch).__name__}{shape}; give a list of batches, each of them a mapping of "
        "what the model's forward takes, or a tensor (batch, ...) for its first argument"
    )
