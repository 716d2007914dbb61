"""CLOVER fine-tuning as a method of peft.

The base weights stay as they are, quantised or not; each targeted projection is wrapped, and its outputs are turned by
the cores (see ``cores``). The adapter file holds the cores and their bases, so loading computes no decomposition.
``import clover`` makes the method known to peft.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clover.config import NAME, CloverConfig, extend_enum
from clover.cores import Core, fingerprint, still, turn
from clover.errors import CloverError, UnsupportedModelError, warn
from clover.families import FAMILIES
from clover.heads import finite
from clover.targets import Slot, find_slots, in_features, out_features, rows_in_blocks


class CloverLayer(nn.Module, BaseTunerLayer):
    """A projection (Linear, Conv1D or a quantised linear) whose outputs are turned by the cores of its adapters.

    Active adapters add up: the weight is ``(I + E_1 + E_2 + ...) W``.
    """

    adapter_layer_names = ("clover_cores",)
    other_param_names = ()

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, slots: list[Slot], config: CloverConfig, **backend: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **backend)
        self.clover_cores = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base: Any = self.get_base_layer()
        self.out_features = out_features(base)
        self.in_features = in_features(base)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, slots, config)

    def update_layer(self, adapter_name: str, slots: list[Slot], config: CloverConfig) -> None:
        """Add an adapter: its cores, with their bases unless those will be loaded."""
        if self.merged:
            raise CloverError(
                f"adapter {adapter_name!r} can't be added while {', '.join(self.merged_adapters)} is merged; "
                "call unmerge_adapter first"
            )
        weight = _peek(self.get_base_layer())
        base: Any = self.get_base_layer()
        device = base.weight.device
        config.quantised = config.quantised or self.quantization_backend is not None
        options: dict[str, Any] = {
            "kind": config.core, "dropout": config.clover_dropout,
            "quantised": config.quantised, "device": device,
        }  # fmt: skip
        cores = []
        for slot in slots:
            mark = None if weight is None else fingerprint(weight[slot.rows.to(weight.device)])
            alone = slot.partner is None and slot.part in ("up", "gate")
            cores.append(Core(slot.rows, base=mark, invertible=alone, **options))
        self.clover_cores[adapter_name] = nn.ModuleList(cores)
        absent = any(p.is_meta for core in cores for p in core.parameters())
        if weight is not None and not config.bases_stored and not absent:
            self._start(adapter_name, slots, weight, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _start(self, adapter_name: str, slots: list[Slot], weight: Tensor, identity: bool) -> None:
        if not finite(weight):
            bad = "NaN" if weight.isnan().any() else "infinite values"
            raise CloverError(f"a weight of shape {tuple(weight.shape)} contains {bad}; repair the base model")
        for slot, core in zip(slots, self._cores(adapter_name), strict=True):
            bases = None if core.left is None else slot.decompose(weight, _read)
            if empty := core.start(bases, identity):
                warn(
                    f"{empty} of {core.rows.numel()} directions of a {slot.part!r} weight have no singular value; "
                    "they stay as they are"
                )

    def _cores(self, adapter_name: str) -> list[Core]:
        return list(cast(nn.ModuleList, self.clover_cores[adapter_name]))  # type: ignore[arg-type]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """The change goes to device and dtype of the base; its bases keep float32."""
        base: Any = self.get_base_layer()
        if adapter_name not in self.clover_cores or any(p.is_meta for p in self.clover_cores.parameters()):
            return
        dtype = base.weight.dtype if base.weight.is_floating_point() else None
        for core in self._cores(adapter_name):
            core.to(device or base.weight.device)
            if dtype is not None:
                core.change.data = core.change.data.to(dtype)

    def _transforms(self, names: list[str]) -> list[tuple[Core, Tensor]]:
        """A core and the sum of ``E`` over all the adapters named, for each set of rows that any of them turns."""
        found: dict[tuple[int, int, int], tuple[Core, Tensor]] = {}
        for name in names:
            for core in self._cores(name):
                change = core.transform()
                found[core.key] = (core, found[core.key][1] + change if core.key in found else change)
        return list(found.values())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base projection, then the cores. Same shapes and dtype as the base."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        names = [] if self.merged else [n for n in self.active_adapters if n in self.clover_cores]
        return self._turned(y, self._transforms(names)) if names else y

    def _turned(self, y: Tensor, transforms: list[tuple[Core, Tensor]]) -> Tensor:
        """Outputs turned by cores; of cores that stand side by side, the results are put together once."""
        base: Any = self.get_base_layer()
        bias: Tensor | None = base.bias

        def turned(core: Core, transform: Tensor, part: Tensor) -> Tensor:
            whole = core.dense and part.shape == y.shape
            shift = bias if bias is None or whole else bias[core.rows.flatten()]
            return turn(part, transform, shift, invertible=core.invertible)

        transforms = sorted(transforms, key=lambda pair: pair[0].first)
        sizes, at = [], 0
        for core, _ in transforms:
            sizes += [core.first - at, core.rows.numel()]
            at = core.first + core.rows.numel()
        sizes.append(y.shape[-1] - at)
        if min(sizes) < 0 or not all(core.dense for core, _ in transforms):
            for core, transform in transforms:
                columns = core.rows.flatten()
                y = y.index_copy(-1, columns, turned(core, transform, y.index_select(-1, columns)))
            return y
        if len(sizes) == 3 and sizes[1] == y.shape[-1]:
            return turned(*transforms[0], y)
        pieces = list(y.split(sizes, -1))
        pieces[1::2] = [turned(*pair, part) for pair, part in zip(transforms, pieces[1::2], strict=True)]
        return torch.cat(pieces, -1)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base weight.

        Args:
            safe_merge: check the result before it takes the place of the weight.
            adapter_names: all active ones when left out.

        Raises:
            ValueError: ``safe_merge`` found NaN or infinite values.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.clover_cores]
        if not names:
            return
        self._set_merged([*self.merged_adapters, *names], check=safe_merge)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again (to the rounding of its dtype)."""
        if not self.merged:
            warn("no adapter is merged; nothing to do")
            return
        self._set_merged([])

    @torch.no_grad()
    def _set_merged(self, names: list[str], check: bool = False) -> None:
        """Go from the merged adapters to ``names``: undo the one transform, apply the other."""
        with still(self):
            weight = _read(self.get_base_layer())
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            for core, transform in reversed(self._transforms(self.merged_adapters)):
                rows = core.rows
                whole = transform + torch.eye(rows.shape[1], device=wide.device)
                wide = wide.index_copy(
                    0, rows.flatten(), torch.linalg.solve(whole.to(wide.dtype), wide[rows]).flatten(0, 1)
                )
            for core, transform in self._transforms(names):
                rows = core.rows
                wide = wide.index_add(0, rows.flatten(), (transform.to(wide.dtype) @ wide[rows]).flatten(0, 1))
            if check and not finite(wide):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
            self._write(wide.to(weight.dtype))
            self.merged_adapters = names

    def _write(self, weight: Float[Tensor, "out in"]) -> None:
        base: Any = self.get_base_layer()
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise CloverError(
                f"a layer quantised by {backend.backend_name} can't take a merged weight; load the base model without "
                "quantisation to merge"
            )
        with gather_params_ctx(base.parameters()):
            self.set_base_weight(weight.T.contiguous() if isinstance(base, Conv1D) else weight.contiguous())

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, in the layout of the base layer."""
        base = self.get_base_layer()
        weight = _read(base)
        delta = torch.zeros_like(weight)
        with still(self):
            transforms = self._transforms([adapter])
        for core, transform in transforms:
            rows = core.rows
            delta.index_copy_(0, rows.flatten(), (transform.to(weight.dtype) @ weight[rows]).flatten(0, 1))
        return delta.T if isinstance(base, Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "clover." + super().__repr__()


class CloverModel(BaseTuner):
    """Wraps the projections of a model; what ``peft.get_peft_model`` builds for a ``CloverConfig``."""

    prefix = "clover_"
    tuner_layer_cls = CloverLayer
    _found: dict[str, list[Slot]]

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in peft; what was found of the model is forgotten again: it can't be pickled."""
        try:
            super().inject_adapter(*args, **kwargs)
        finally:
            self._found = {}

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Where peft looks for an adapter of each row of the batch: all rows have the active ones."""
        if kwargs.get("adapter_names") is not None:
            raise CloverError(
                f"adapter_names is {kwargs['adapter_names']!r}, but CLOVER has the active adapters for all rows of a "
                "batch; choose them by set_adapter, leave them out by disable_adapter, and give each its own batch"
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name on file of a core's tensor: without the adapter's, so that it loads under any."""
        head, found, tail = key.rpartition(f".clover_cores.{adapter_name}.")
        return f"{head}.clover_cores.{tail}" if found else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The stored tensors by their names in the model; peft would pass over those that have no place there.

        Raises:
            CloverError: a core has none.
        """
        placed = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        for key in state_dict:
            module, found, _ = key.partition(".clover_cores.")
            if found and key in placed:  # it kept its name
                raise CloverError(
                    f"the adapter has a core for {module.removeprefix('base_model.model.')}, for which there is no "
                    "place in this model; load it on the one that it was made for (with all its layers, unpruned if "
                    "that was, pruned alike if that was)"
                )
        return placed

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        self._found = find_slots(self.model, peft_config.block_size)
        if peft_config.target_modules is None:
            wanted = {n for n, slots in self._found.items() if any(s.part in peft_config.parts for s in slots)}
            if not wanted:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} has no {' or '.join(peft_config.parts)} of a known class to tune; "
                    f"name modules in target_modules, or use one of {', '.join(sorted(FAMILIES))}"
                )
            short = tuple({_suffix(name) for name in wanted})
            meant = {
                n for n, _ in self.model.named_modules() if n in short or n.endswith(tuple(f".{s}" for s in short))
            }
            peft_config.target_modules = set(short)
            if not meant <= wanted:  # named one by one, and peft then looks at no other setting
                chosen = {name for name in wanted if self._check_target_module_exists(peft_config, name)}
                if not chosen:
                    raise CloverError(
                        f"layers_to_transform={peft_config.layers_to_transform} and exclude_modules leave nothing to "
                        "tune; choose layers that hold attention"
                    )
                peft_config.target_modules = chosen
        return peft_config

    def fold(self, adapter_name: str = "default") -> None:
        """Make an adapter smaller for inference: of its cores and bases keep the change of the weights alone.

        The outputs stay; ``save_pretrained`` then writes about a third. Training it further is no longer CLOVER.

        Raises:
            CloverError: there is no adapter of that name.
        """
        if adapter_name not in self.peft_config:
            raise CloverError(f"adapter {adapter_name!r} is unknown; choose among {', '.join(self.peft_config)}")
        for layer in self.modules():
            if isinstance(layer, CloverLayer) and adapter_name in layer.clover_cores:
                for core in layer._cores(adapter_name):
                    core.fold()
        self.peft_config[adapter_name].core = "folded"

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = peft_config
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)) and resolve_quantization_backend(base) is None:
            raise ValueError(
                f"Target module {current_key} is a {type(base).__module__}.{type(base).__name__}, which is not "
                "supported; CLOVER tunes linear projections (Linear, Conv1D and quantised ones): "
                "leave it out of target_modules, or train it whole through modules_to_save"
            )
        known = [s for s in self._found.get(current_key, []) if s.rows.numel()]
        slots = [s for s in known if s.part in config.parts] or known
        slots = slots or [rows_in_blocks(current_key, base, config.block_size)]
        if isinstance(target, CloverLayer):
            target.update_layer(adapter_name, slots, config)
            return
        layer = CloverLayer(target, adapter_name, slots, config, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _suffix(name: str) -> str:
    """``self_attn.v_proj`` for ``model.layers.3.self_attn.v_proj``: the same in every layer."""
    *_, parent, last = ["", *name.split(".")]
    return last if parent.isdigit() or not parent else f"{parent}.{last}"


# --- the weight of a base layer, whatever holds it ---


def _read(module: Any) -> Float[Tensor, "out in"]:
    """The weight as ``(out, in)``: dequantised, gathered from all ranks, out of wrappers, Conv1D turned.

    Raises:
        CloverError: the weight is on the meta device.
    """
    weight = _peek(module)
    if weight is None:
        raise CloverError("a base weight is on the meta device; load the model's weights before adding the adapter")
    return weight


@torch.no_grad()
def _peek(module: Any) -> Tensor | None:
    """As ``_read``; None where the weight is not loaded yet."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    with gather_params_ctx(module.parameters()):  # ZeRO-3; nothing elsewhere
        weight = dequantize_module_weight(module).detach()
        kept: Any = getattr(module, "state", None)
        if kept is not None and getattr(module.weight, "CB", None) is not None and module.weight.SCB is None:
            module.weight.SCB = kept.SCB  # bitsandbytes on CPUs loses the scales when peft looks at the weight
        if hasattr(weight, "full_tensor"):  # FSDP2
            weight = weight.full_tensor()
        if weight.is_meta:
            return None
        return weight.T if isinstance(module, Conv1D) else weight


def register() -> None:
    """Make the method known to peft, unless it is by now."""
    if extend_enum() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=CloverConfig, model_cls=CloverModel)
