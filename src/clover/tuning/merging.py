"""Putting an adapter into its model: what ``clover merge`` does."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from clover.errors import CloverError, reason
from clover.jobs.folders import check_writable
from clover.measure.data import found_beside
from clover.pruning.checkpoint import check_there, load, save


def merge(model: str, adapter: str | Path, out: str | Path) -> Path:
    """Merge an adapter into its model and save the result, with its processor: what ``clover merge`` does.

    Raises:
        CloverError: no adapter there, one for another base, or ``out`` exists.
    """
    check_writable(out)
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise CloverError(
            f"{adapter} is no adapter: it has no adapter_config.json; name what clover tune or peft wrote"
        )
    check_there(model)
    beside = found_beside(model)  # first: what is wrong there is told before the work
    base = load(model)
    try:
        adapted: Any = PeftModel.from_pretrained(base, str(adapter), local_files_only=True)
        _check_complete(adapted, adapter, model)
        _check_untied(adapted, adapter)
        merged = adapted.merge_and_unload(safe_merge=True)
    except CloverError:
        raise
    except SafetensorError as error:
        raise CloverError(f"the weights in {adapter} are damaged ({reason(error)}); restore the file") from error
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        why = f"{type(error).__name__}: {shorten(str(error), 400, placeholder=' ...')}"
        raise CloverError(
            f"{adapter} can't be merged into {model} ({why}); name the model that it was tuned on"
        ) from error
    return save(merged, out, beside=beside)


def _check_untied(adapted: Any, adapter: str | Path) -> None:
    """Refuse an adapter of output embeddings that are the input's as well, which a merge would change with them."""
    base = adapted.get_base_model()
    head = base.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) and head.get_base_layer().weight is base.get_input_embeddings().weight:
        raise CloverError(
            f"{adapter} tunes the output embeddings, which are tied to the input's: a merge would change both; tune "
            "without them, or untie them (tie_word_embeddings=False) first"
        )


def _check_complete(adapted: Any, adapter: str | Path, model: str) -> None:
    """Refuse an adapter, whatever its method, of which a part has no place: peft reports it only on a second load."""
    again = adapted.load_adapter(str(adapter), adapted.active_adapter, local_files_only=True)
    if lost := sorted(again.unexpected_keys):
        raise CloverError(
            f"{adapter} can't be merged into {model}, which has no {lost[0].removeprefix('base_model.model.')}; merge "
            "it into the model that it was made for (unpruned if that was, pruned alike if that was)"
        )
