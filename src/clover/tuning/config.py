"""``CloverConfig``: what of a model to tune, and how; the counterpart of peft's ``LoraConfig``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from clover.errors import CloverError
from clover.tuning.targets import PARTS

NAME = "CLOVER"


def extend_enum() -> PeftType:
    """The method's member of peft's enum: methods outside it are refused, so it is added where peft lacks it."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        setattr(PeftType, NAME, member)  # since Python 3.12 members are found as attributes alone
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
    return PeftType.__members__[NAME]


@dataclass
class CloverConfig(PeftConfig):
    """What to tune, and how.

    Without ``target_modules`` the projections of every supported attention block and of the MLP beside it are taken,
    as far as ``parts`` asks for them.

    Raises:
        CloverError: a value that can't be used, named with its remedy.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or a regular expression of modules, or 'all-linear'. Default: all that `parts` asks "
                  "for. Projections that are no part of a known attention block are tuned in blocks of rows."},
    )  # fmt: skip
    parts: Sequence[str] = field(
        default=("qk", "vo", "up"),
        metadata={"help": "What to tune: 'vo' (value and output projections, across the layer), 'qk' (across the "
                  "layer, or the keys alone where positions or a norm stand between), 'q' (queries alone), 'up' and "
                  "'gate' (the first projections of the MLP)."},
    )  # fmt: skip
    core: str = field(
        default="full",
        metadata={"help": "'full' trains a d x d matrix a head, 'diagonal' its singular values alone. 'folded' is what "
                  "`fold` leaves of either: the change of the weight, without its bases."},
    )  # fmt: skip
    block_size: int = field(default=64, metadata={"help": "Rows in a block outside attention."})
    clover_dropout: float = field(
        default=0.0, metadata={"help": "Share of the entries of the trained change that a training step leaves out."}
    )
    bias: str = field(
        default="none", metadata={"help": "Biases to train: 'none', 'all' or 'clover_only' (of the modules wrapped)."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layers."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, if `layers_to_transform` can't find it."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save whole beside the cores, such as a classifier."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding to train beside the cores, such as those of new tokens."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start as the identity. False starts at random, which only tests want."}
    )
    bases_stored: bool = field(
        default=False, metadata={"help": "Set in saved configs: the bases come from the adapter's file."}
    )
    quantised: bool = field(
        default=False, metadata={"help": "Set by itself where the base weights were quantised when tuning began."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_enum()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if self.task_type in ("TOKEN_CLS", "QUESTION_ANS") and self.modules_to_save is None:
            self.modules_to_save = []  # where peft puts the head, after copies were made: they share it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self.parts = tuple([self.parts] if isinstance(self.parts, str) else self.parts)
        if not self.parts or set(self.parts) - set(PARTS):
            raise CloverError(f"parts is {self.parts!r}; choose among {', '.join(map(repr, PARTS))}")
        for name, allowed in (("core", ("full", "diagonal", "folded")), ("bias", ("none", "all", "clover_only"))):
            if getattr(self, name) not in allowed:
                raise CloverError(f"{name} is {getattr(self, name)!r}; choose among {', '.join(map(repr, allowed))}")
        if self.block_size < 1:
            raise CloverError(f"block_size is {self.block_size}; a block needs at least 1 row")
        if not 0 <= self.clover_dropout < 1:
            raise CloverError(f"clover_dropout is {self.clover_dropout}; choose at least 0 and less than 1")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise CloverError(
                f"target_modules is the pattern {self.target_modules!r}, which says itself what is tuned; leave out "
                "layers_to_transform and layers_pattern, or give a list of names"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise CloverError("layers_pattern says where layers_to_transform counts; give layers_to_transform as well")

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As in peft; the copy on disk says that the bases lie beside it."""
        stored = copy.copy(self)
        stored.bases_stored = True
        PeftConfig.save_pretrained(stored, str(save_directory), **kwargs)
