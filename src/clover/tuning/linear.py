"""One projection that is tuned: its base as it is, quantised or not, and the cores that turn its outputs."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clover.errors import CloverError, warn
from clover.model.heads import finite
from clover.tuning.config import CloverConfig
from clover.tuning.cores import Core, can_be_undone, fingerprint, still, turn
from clover.tuning.targets import Slot, in_features, out_features


class CloverLinear(nn.Module, BaseTunerLayer):
    """A projection (Linear, Conv1D or a quantised linear) whose outputs are turned by the cores of its adapters.

    Active adapters add up: the weight is ``(I + E_1 + E_2 + ...) W``. Those whose blocks differ in size
    (``block_size``) follow one another instead, ``(I + E_2) (I + E_1) W``.
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
        self.original: Float[Tensor, "out in"] | None = None  # while adapters are merged: the weight without them
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
        base: Any = self.get_base_layer()
        _check_base(base, self.quantization_backend)
        weight = _peek(base)
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
        absent = any(p.is_meta for core in cores for p in core.parameters())
        known = {core.key: core for name in self.clover_cores for core in self._cores(name) if core.ready}
        self.clover_cores[adapter_name] = nn.ModuleList(cores)
        if weight is not None and not config.bases_stored and not absent:
            self._start(adapter_name, slots, weight, config.init_weights)
        elif not absent:  # those that will be loaded; some trainers copy only what is trained from another adapter
            for core in cores:
                if core.key in known:
                    core.share(known[core.key])
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
        """The cores go to the device of the base; their dtype is another matter, see ``_cast_adapter_dtype``."""
        base: Any = self.get_base_layer()
        if adapter_name not in self.clover_cores or any(p.is_meta for p in self.clover_cores.parameters()):
            return
        for core in self._cores(adapter_name):
            core.to(device or base.weight.device)

    def cast(self, adapter_name: str, widely: bool) -> None:
        """Give the trained numbers of an adapter float32, or the dtype of the base; its bases keep float32."""
        base: Any = self.get_base_layer()
        dtype = torch.float32 if widely or not base.weight.is_floating_point() else base.weight.dtype
        for core in self._cores(adapter_name) if adapter_name in self.clover_cores else ():
            if not core.change.is_meta and core.change.dtype != torch.float64:
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
        """Take all merged adapters out of the base weight again: to the bit, but to rounding where it is sharded.

        Raises:
            CloverError: the weight is sharded, and what was merged can't be undone.
        """
        if not self.merged:
            warn("no adapter is merged; nothing to do")
            return
        self._set_merged([])

    @torch.no_grad()
    def _set_merged(self, names: list[str], check: bool = False) -> None:
        """Go from the merged adapters to ``names``: undo the one transform, apply the other."""
        with still(self):
            weight = self._stored()
            dtype, wide, kept = weight.dtype, self._unmerged(weight), self.original
            if kept is None and not _is_sharded(self.get_base_layer()):  # those are too large to keep
                kept = weight.clone()
            for core, transform in self._transforms(names):
                rows = core.rows
                wide = wide.index_add(0, rows.flatten(), (transform.to(wide.dtype) @ wide[rows]).flatten(0, 1))
            merged = wide.to(dtype)
            if check and not finite(merged):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
            self._write(merged)
            self.merged_adapters = names
            self.original = kept if names else None

    def _stored(self) -> Float[Tensor, "out in"]:
        """The weight that was kept when adapters were merged, or else the base's."""
        base: Any = self.get_base_layer()
        return _read(base) if self.original is None else self.original.to(base.weight.device)

    def _unmerged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The stored weight without what was merged into it, at least float32."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.original is not None:
            return wide
        for core, transform in reversed(self._transforms(self.merged_adapters)):
            rows = core.rows
            if not can_be_undone(transform):
                raise CloverError("what was merged into a sharded weight put directions out; load the base again")
            whole = transform + torch.eye(rows.shape[1], device=wide.device)
            solved = torch.linalg.solve(whole.to(wide.dtype), wide[rows])
            wide = wide.index_copy(0, rows.flatten(), solved.flatten(0, 1))
        return wide

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
        with still(self):
            stored = self._stored()
            weight, transforms = self._unmerged(stored), self._transforms([adapter])
        delta = torch.zeros_like(weight)
        for core, transform in transforms:
            rows = core.rows
            delta.index_copy_(0, rows.flatten(), (transform.to(weight.dtype) @ weight[rows]).flatten(0, 1))
        delta = delta.to(stored.dtype)
        return delta.T if isinstance(base, Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "clover." + super().__repr__()


# --- the weight of a base layer, whatever holds it ---


def _check_base(base: Any, backend: Any) -> None:
    """Refuse a layer whose weight can't be read as numbers.

    Raises:
        CloverError: the kind of quantisation has no way back, or the weight was offloaded.
    """
    kind = f"{type(base).__module__}.{type(base).__name__}"
    if isinstance(backend, ForwardOnlyQuantizationBackend) or hasattr(base, "weight_scale_inv"):
        raise CloverError(
            f"the weight of a {kind} can't be read back, and CLOVER decomposes it; quantise the model by bitsandbytes "
            "or torchao instead, or tune it unquantised"
        )
    if base.weight.is_meta and hasattr(base, "_hf_hook"):
        raise CloverError("a base weight is offloaded to a CPU or a disk; load the model where it fits, then tune it")


def _is_sharded(module: Any) -> bool:
    """Whether a process holds a part of the weight only: under FSDP2, or ZeRO-3."""
    return hasattr(module.weight, "full_tensor") or hasattr(module.weight, "ds_id")


def _read(module: Any) -> Float[Tensor, "out in"]:
    """The weight as ``(out, in)``: dequantised, gathered from all ranks, out of wrappers, Conv1D turned.

    Raises:
        CloverError: the weight is on the meta device, or packed for a CPU's 4-bit kernels.
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
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise CloverError(
            "bitsandbytes packed a 4-bit weight for this CPU when the model ran in evaluation mode, and can read it "
            "back only roughly; load the model again, and add or merge the adapter before it runs"
        )
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
