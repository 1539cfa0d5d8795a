"""A layer with adapters on it: composition, scale, merge and restore. It knows no method."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adapter import Adapted, Adapter
from .base import Base, base_for
from .errors import HalotuneError
from .merge_record import MergeRecord
from .offload import brought
from .operator import Matrix, Operator
from .prepared import exact_dtype
from .rows import MIXED
from .tensor_parallel import run_inside, shard_of
from .wrapper import PerAdapter


class AdaptedLayer(PerAdapter):
    """`base_layer` with named adapters. The active ones compose as functions, in order: `W -> F2(F1(W))`.

    Where `merged_adapters` is not empty the stored weight holds those already, and a snapshot of the original is kept.
    """

    _wraps, _holds = "base_layer", "adapters"

    # As PEFT's `BaseTunerLayer` has them.
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("adapters",)
    other_param_names: ClassVar[tuple[str, ...]] = ()
    cast_input_dtype_enabled = False  # parameters meet the input in its own dtype

    penalty_taken = False  # whether somebody has asked for its adapters' penalty

    def __init__(self, base_layer: nn.Module, name: str = "") -> None:
        super().__init__()
        self._kind = type(base_for(base_layer, name))
        self.base_layer = base_layer
        self.shard = shard_of(base_layer)
        self.adapters = nn.ModuleDict()
        self.scales: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._original: tuple[nn.Module, nn.Parameter, Any] | None = None  # module, weight, snapshot

    @property
    def base(self) -> Base:
        """The base layer as a linear operator."""
        return self._kind(self._modules["base_layer"])  # type: ignore[arg-type]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def merged_into_floats(self) -> bool:
        """Whether a plain layer replaces a quantized one."""
        return self._original is not None and self._original[0] is not self.base_layer

    def _running_names(self) -> list[str]:
        if not self.enabled or MIXED.rows.get(self) is not None:
            return []
        merged, scales = self.merged_adapters, self.scales
        return [n for n in self.active_adapters if n not in merged and scales.get(n)]

    def running(self) -> list[Adapter]:
        """The adapters that are active and not merged yet."""
        adapters: Any = self._modules["adapters"]
        return [adapters._modules[n] for n in self._running_names()]

    def operator(self) -> Operator:
        """The base with the running adapters."""
        return self._on(self.base, self._running_names())

    def _on(self, op: Operator, names: list[str], here: bool = False) -> Operator:
        """`op` with these adapters; `here`, it is the product of the layer's shard."""
        adapters: Any = self._modules["adapters"]
        for name in names:
            adapter = adapters._modules[name]
            op = Adapted(op, adapter.here if here else adapter, self.scales[name])
        return op

    def _run(self, x: Tensor, names: list[str]) -> Tensor:
        if self.shard is None or not names:
            return self._on(self.base, names)(x)
        return run_inside(self.base_layer, self.shard, x, lambda product: self._on(product, names, here=True))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise HalotuneError(
                f"{type(self.base_layer).__name__}: an adapted layer takes its input alone; got "
                f"{len(args)} more arguments and {sorted(kwargs)}. Leave this layer out with exclude_modules."
            )
        base: Any = self._modules["base_layer"]
        if "_hf_hook" in base.__dict__:
            x = brought(x, base)
        rows = MIXED.rows.get(self)
        return self._run(x, self._running_names()) if rows is None else rows.run(x, self._run_one)

    def _run_one(self, name: str, x: Tensor) -> Tensor:
        return self._run(x, [name] if name in self.adapters else [])

    def set_scale(self, name: str, scale: float) -> None:
        """Apply `W + scale (F(W) − W)` instead of the adapter's map F."""
        if name in self.merged_adapters:
            raise HalotuneError(f"adapter {name!r} is merged, so its scale is fixed. Call unmerge_adapter() first.")
        if name in self.scales:
            self.scales[name] = float(scale)

    def add(self, name: str, adapter: Adapter) -> None:
        adapter.tensors()  # it learns their names while they are parameters
        adapter.shard = self.shard
        self.adapters[name] = adapter
        self.scales[name] = 1.0

    def remove(self, name: str) -> None:
        if name in self.merged_adapters:
            self.unmerge()
        super().remove(name)
        self.scales.pop(name, None)

    # -- merging

    def pending(self, names: list[str]) -> list[str]:
        """Those of these adapters that the layer has, and that are not merged yet."""
        return [n for n in names if n in self.adapters and n not in self.merged_adapters]

    @torch.no_grad()
    def merged_weight(self, names: list[str]) -> Tensor:
        """The weight with these adapters applied in order, in fp32 or better; nothing is written."""
        W = self.base.weight().detach()
        return self._on(Matrix(W.to(exact_dtype(W.dtype))), names).weight()

    @torch.no_grad()
    def check_finite(self, names: list[str], path: str = "an adapted layer") -> None:
        """Raises where merging these adapters would write values that are not finite."""
        merged = self.merged_weight(names).to(self.base.dtype)
        if not torch.isfinite(merged).all():
            raise HalotuneError(
                f"{path}: merging {', '.join(names)} gives {int((~torch.isfinite(merged)).sum())} values that are not finite "
                f"in {self.base.dtype}. Nothing was merged. Check the adapter for NaN, or load the base in fp32."
            )

    @torch.no_grad()
    def merge(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        keep: bool = True,
        untie: bool = False,
        as_float: torch.dtype | None = None,
    ) -> MergeRecord:
        """Write adapters into the stored weight: those of this layer that are not merged yet.

        Args:
            adapter_names: in the order in which they apply; None is the active ones.
            safe_merge: refuse values that are not finite.
            keep: hold a snapshot for `unmerge`.
            untie: write to a parameter of this layer's own; the tied one stays as it is.
            as_float: put a plain layer of this dtype where the quantized one is, instead of requantizing.
        """
        names = self.pending(self.active_adapters if adapter_names is None else adapter_names)
        if not names:
            return MergeRecord.total([])
        base = self.base
        base.require_mergeable(type(self.base_layer).__name__, as_float is not None)
        if safe_merge:
            self.check_finite(names)
        untie = untie and not base.quantization  # writing gives a quantized layer a new parameter anyway
        before, after = base.weight().detach(), self.merged_weight(names)
        if keep and self._original is None:
            self._original = self.base_layer, base.parameter, None if untie else base.snapshot()
        before = before.clone()
        if as_float is not None and base.quantization:
            self._put(base.as_float(after, as_float))
        else:
            if untie:
                stored = base.parameter
                self.base_layer.weight = nn.Parameter(stored.detach().clone(), requires_grad=stored.requires_grad)
            self.base.write(after)
        self.merged_adapters = [*self.merged_adapters, *names]
        return MergeRecord.measure(before, after, self.base.weight().detach())

    @property
    def original_weight(self) -> Tensor:
        """The stored weight as it was before any merge, in the base layer's own layout."""
        if self._original is None:
            return self.base.parameter
        _, parameter, snapshot = self._original
        return snapshot if isinstance(snapshot, Tensor) else parameter

    def held(self) -> tuple[Any, ...]:
        """What `put_back` needs to undo merges that come, with a copy of the weight in CPU memory."""
        kept = self.base.snapshot()
        kept = kept.cpu() if isinstance(kept, Tensor) else kept
        return self.base_layer, self.base.parameter, kept, self._original, self.merged_adapters

    def put_back(self, held: tuple[Any, ...]) -> None:
        """Undo the merges since `held()`, bit for bit."""
        module, parameter, kept, self._original, self.merged_adapters = held
        self._put(module)
        if self.base.parameter is not parameter and not self.base.quantization:
            self.base_layer.weight = parameter  # it was untied
        self.base.restore(kept)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if self._original is None and self.merged:
            raise HalotuneError(
                f"{type(self.base_layer).__name__} {self.base.shape}: {', '.join(self.merged_adapters)} were merged for good, "
                "and nothing was kept to restore the weight from. Call merge_and_unload() to finish, or load the base again."
            )
        if self._original is not None:
            self.base.require_stored(type(self.base_layer).__name__)
            module, parameter, snapshot = self._original
            self._put(module)
            if snapshot is None:
                self.base_layer.weight = parameter
            else:
                self.base.restore(snapshot)
            self._original = None
        self.merged_adapters = []

    def _put(self, module: nn.Module) -> None:
        self.base_layer, self._kind = module, type(base_for(module))

    # -- the names by which diffusers and transformers drive a layer: those of PEFT's `BaseTunerLayer`

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        return not self.enabled

    @property
    def r(self) -> dict[str, int]:
        """Name -> rank."""
        return {n: a.rank for n, a in self.adapters.items()}  # type: ignore[misc]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these of its adapters the active ones, in this order; exactly they are trained (unless `inference_mode`)."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.active_adapters = [n for n in names if n in self.adapters]
        for n, adapter in self.adapters.items():
            adapter.requires_grad_(n in names and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        self.enabled = enabled

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for n in self.active_adapters:
            self.set_scale(n, self.scales[n] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None sets the scale of the active adapters to 1."""
        for n in self.active_adapters:
            self.set_scale(n, 1.0 if scale is None else self.scales[n] / scale)

    def delete_adapter(self, adapter_name: str) -> None:
        self.remove(adapter_name)

    def extra_repr(self) -> str:
        return f"active={self.active_adapters}, merged={self.merged_adapters}" if self.adapters else ""
