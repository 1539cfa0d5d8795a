"""A model with adapters in it: what `HRAModel`, `LoHaModel`, `BoneModel` … are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import HalotuneError, warn
from ..core.forms import Form
from ..core.layer import AdaptedLayer
from ..core.wrapper import Wrapper
from ..methods.registry import method_of
from .external_types import register_external_types
from .files.save import save_adapters
from .forward.prepare import Scope
from .injection.activation import activate, check_bias, enable, freeze, train_biases
from .injection.default_targets import DEFAULT_TARGETS
from .injection.inject import inject
from .injection.modules import adapted_layers, modules_to_save_wrappers, paths_in_state_dict, public_path
from .injection.offloading import StayingAdapters
from .injection.surgery import eject, remove
from .training import penalty, warn_if_penalty_unused
from .weights.combine import combine
from .weights.merge import MergeReport, Requantize, merge, unmerge, untie_copies

if TYPE_CHECKING:
    from ..export.lora import ExportReport


PATIENCE = 32  # training passes, of which several may make one optimizer step, before a penalty is missed


class AdapterModel(Wrapper):
    """Adapters on any module, which is changed in place; `model` is that module.

    Args:
        model: any module: a transformers model, a pipeline's UNet, your own.
        peft_config: a configuration, or a dict name -> configuration.
        adapter_name: the adapter's name, for a single configuration.
        low_cpu_mem_usage: create the parameters on the meta device, to be loaded afterwards.
        state_dict: adapt the modules that its keys name, instead of `target_modules`; it is not loaded.
        autocast_adapter_dtype: parameters in fp32 over a half-precision base.
    """

    _wraps = "model"

    prefix: ClassVar[str] = ""
    tuner_layer_cls: ClassVar[type[nn.Module]] = AdaptedLayer
    target_module_mapping: ClassVar[Mapping[str, tuple[str, ...]]] = DEFAULT_TARGETS

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig | Mapping[str, AdapterConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        register_external_types()
        self.model = model
        self.peft_config: dict[str, AdapterConfig] = {}
        self.active_adapters: list[str] = []
        self.merge_report: MergeReport | None = None
        self._merge_order: list[str] = []
        self._training_passes = 0
        self.staying = StayingAdapters(model)
        self.scope = Scope(model)
        configs = {adapter_name: peft_config} if isinstance(peft_config, AdapterConfig) else dict(peft_config)
        paths = None if state_dict is None else paths_in_state_dict(model, state_dict)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            for name, config in configs.items():
                self.add_adapter(
                    name,
                    config,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    paths=paths,
                )
        except BaseException:  # the model as it was, though a first configuration was good
            for name in self.peft_config:
                remove(model, name)
            for p, flag in flags:
                p.requires_grad_(flag)
            self._remove_hooks()
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._training_passes += 1
            if self._training_passes == PATIENCE:
                warn_if_penalty_unused(self.model)
        try:
            return self.model(*args, **kwargs)
        except BaseException:  # KeyboardInterrupt passes hooks by
            self.scope.close()
            raise

    def cache_weights(self, gib: float) -> None:
        """In eval mode and without gradients, keep each layer's `W'` beside its W, up to this much memory.

        Decoding then costs what the bare model costs, with the base untouched and adapters still to be switched. What is
        kept is dropped when a parameter changes, in training, and with `gib=0`, which is the default.
        """
        if not gib >= 0:
            raise HalotuneError(f"gib: expected the memory to use, 0 for none; got {gib}.")
        self.scope.cache_weights(int(gib * 2**30))

    def set_adapter_form(self, form: Form, budget_gib: float = 2.0) -> None:
        """In which form adapters are trained on plain linear layers.

        Args:
            form: "activations": the input or the output of a layer is changed (BAT and LoHa of a large rank, which have no
                such form, build W' layer by layer); "weights": W' of all layers of one shape is built together at the
                beginning of a pass, and a layer is one product with it; "auto": whichever costs less for the sizes at hand.
            budget_gib: where W' of all layers and their gradients would take more memory, it is "activations".
        """
        if form not in ("auto", "activations", "weights"):
            raise HalotuneError(f'form: expected "auto", "activations" or "weights"; got {form!r}.')
        if not budget_gib >= 0:
            raise HalotuneError(f"budget_gib: expected the memory to use, 0 for none; got {budget_gib}.")
        self.scope.set_form(form, int(budget_gib * 2**30))

    @property
    def cached_weights(self) -> tuple[int, int]:
        """How many layers' `W'` are kept now, and their bytes."""
        return len(self.scope.cache), self.scope.cache.used

    # -- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        paths: list[str] | None = None,
    ) -> None:
        """Put one more adapter into the model. The first one becomes active."""
        if adapter_name in self.peft_config:
            raise HalotuneError(f"there is an adapter named {adapter_name!r} already. Delete it, or use another name.")
        check_bias({**getattr(self.model, "peft_config", {}), **self.peft_config}, peft_config, adapter_name)
        config = inject(
            self.model,
            peft_config,
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
            paths=paths,
        )
        self._changed()
        if not self.peft_config:
            freeze(self.model)
        self.peft_config[adapter_name] = config = copy.copy(config)
        active = self.active_adapters or [adapter_name]
        self.active_adapters = active
        activate(self.model, active, trainable=not any(self.peft_config[n].inference_mode for n in active))
        if not config.inference_mode:
            train_biases(self.model, config, adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make this adapter, or these in this order, the active ones, and (unless `inference_mode`) train them alone."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        if len(set(names)) < len(names):
            raise HalotuneError(f"set_adapter: {names} names an adapter twice; each can be applied once. Name it once.")
        if self.merged_adapters:
            warn("adapters were merged; the base weights are restored before others are set.")
            self.unmerge_adapter()
        activate(self.model, names, trainable=not inference_mode)
        self.active_adapters = names

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter out. If it was the only active one, the first of the others becomes active."""
        self._check_known([adapter_name])
        if adapter_name in self.merged_adapters:
            self.unmerge_adapter()
        remove(self.model, adapter_name)
        self._changed()
        del self.peft_config[adapter_name]
        self.active_adapters = [n for n in self.active_adapters if n != adapter_name]
        if not self.active_adapters and self.peft_config:
            first = next(iter(self.peft_config))
            warn(f"the active adapter {adapter_name!r} was deleted; {first!r} is active now.")
            self.set_adapter(first, inference_mode=self.peft_config[first].inference_mode)

    def _changed(self) -> None:
        """Adapters were put in or taken out."""
        self.staying.reset()
        self.scope.reset()

    def _check_known(self, names: list[str]) -> None:
        unknown = [n for n in names if n not in self.peft_config]
        if unknown:
            raise HalotuneError(f"there is no adapter named {unknown[0]!r}; the model has {sorted(self.peft_config)}.")

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the names where there are several."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    def enable_adapter_layers(self) -> None:
        enable(self.model, True)

    def disable_adapter_layers(self) -> None:
        """Run as the base model; merged adapters are taken out of the weights."""
        biased = [n for n in self.active_adapters if self.peft_config[n].bias != "none"]
        if biased:
            warn(
                f"{biased[0]!r} trained biases of the base model, which stay: without adapters the output is not the "
                "original model's."
            )
        self.unmerge_adapter()
        enable(self.model, False)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """A new adapter, inactive, that equals a combination of others exactly.

        Args:
            adapters: their names.
            weights: one number for each.
            adapter_name: what the new one is called.
            combination_type: `"linear"`: `W + Σ w_i (F_i(W) − W)` for Bone or BAT of one r, and LoRA; `"cat"`: one after the
                other, for HRA of weight 1, and LoRA; `"lora"`: as linear for anything but BAT, as a LoRA of the summed ranks.

        Raises:
            HalotuneError: the combination is not exact; it names the one that is.
        """
        self._check_known(adapters)
        config, combined = combine(self.model, self.peft_config, adapters, weights, combination_type)
        self.add_adapter(adapter_name, config, low_cpu_mem_usage=True, paths=list(combined))
        for path, layer in adapted_layers(self.model).items():
            path = public_path(path)
            if path in combined:
                like = next(layer.adapters[n] for n in adapters if n in layer.adapters)
                p = next(like.parameters())
                layer.adapters[adapter_name] = combined[path].to(p.device, p.dtype).requires_grad_(False)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """The scale of one adapter, everywhere: `W + scale (F(W) − W)`."""
        self._check_known([adapter_name])
        for layer in adapted_layers(self.model).values():
            layer.set_scale(adapter_name, scale)

    def penalty(self) -> Tensor | float:
        """The sum of the active adapters' penalties, for the loss; 0.0 where none has one."""
        return penalty(self.model)

    def save_pretrained(self, save_directory: str | PathLike[str], *, bone_as_miss: bool = False, **kwargs: Any) -> None:
        """Write the adapters in PEFT's format; the arguments of `PeftModel.save_pretrained`."""
        if bone_as_miss:
            kwargs["peft_type"] = "MISS"
        save_adapters(self, save_directory, **kwargs)

    def export(self, to: str, folder: str | PathLike[str], **kwargs: Any) -> ExportReport:
        """Write the adapters in another program's format; the arguments of `PeftModel.export`."""
        from .files.export import export_adapters  # few need it, and `import halotune` stays light

        return export_adapters(self, to, folder, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the base model. Merged adapters are taken out, and merged again afterwards."""
        merged = self.merged_adapters
        floats = any(layer.merged_into_floats for layer in adapted_layers(self.model).values())
        self.disable_adapter_layers()
        try:
            yield
        finally:
            self.enable_adapter_layers()
            if merged:
                self.merge_adapter(merged, quantized="keep_float" if floats else "requantize")

    # -- merging

    @property
    def merged_adapters(self) -> list[str]:
        """Their names, in the order in which they were merged."""
        merged = {n for layer in adapted_layers(self.model).values() for n in layer.merged_adapters}
        return [n for n in dict.fromkeys([*self._merge_order, *sorted(merged)]) if n in merged]

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = True, quantized: Requantize = "requantize"
    ) -> MergeReport:
        """Write adapters (the active ones) into the weights; `unmerge_adapter` restores them bit for bit.

        Adapters that are active and not merged still apply, after the merged ones. Values are checked before any
        weight changes; `safe_merge=False` skips that. A quantized weight is requantized, at a price that the report
        names, or with `quantized="keep_float"` replaced by floats until `unmerge_adapter`.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        self._check_known(names)
        before = self.merged_adapters
        self.staying.bring()
        self.merge_report = merge(self.model, names, safe=safe_merge, quantized=quantized)
        self._merge_order = list(dict.fromkeys([*before, *names]))
        return self.merge_report

    def unmerge_adapter(self) -> None:
        """Restore the base weights, bit for bit."""
        unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: list[str] | None = None,
        quantized: Requantize = "requantize",
    ) -> nn.Module:
        """Write adapters (the active ones) into the weights for good, and return the plain model.

        A quantized weight is requantized, or with `quantized="keep_float"` its layer becomes a float one.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        self._check_known(names)
        already = [n for n in self.merged_adapters if n not in names]
        if already:
            raise HalotuneError(f"{already} are merged already but not among {names}. Call unmerge_adapter() first.")
        self.staying.bring()
        self.merge_report = merge(self.model, names, keep=False, safe=safe_merge, progressbar=progressbar, quantized=quantized)
        for wrapper in modules_to_save_wrappers(self.model).values():
            wrapper.active_adapters, wrapper.enabled = [n for n in names if n in wrapper.modules_to_save], True
        untie_copies(self.model)
        return self._release(trained=True)

    def unload(self) -> nn.Module:
        """Take all adapters out and return the plain model as it was; only trained biases stay."""
        self.unmerge_adapter()
        return self._release(trained=False)

    def _release(self, *, trained: bool) -> nn.Module:
        eject(self.model, trained=trained)
        self._remove_hooks()
        self.model.__dict__.pop("_halotune_untied", None)
        self.peft_config, self.active_adapters = {}, []
        return self.model

    def _remove_hooks(self) -> None:
        self.staying.remove()
        self.scope.remove()


@lru_cache
def tuner_class(peft_type: str) -> type[AdapterModel]:
    """The class with a method's name: `HRAModel`, `LoHaModel`, `BoneModel` …; `halotune` exports them."""
    method = method_of(peft_type)
    name = method.config.__name__.removesuffix("Config") + "Model"
    _, _, arguments = (AdapterModel.__doc__ or "").partition("\n")
    body = {"prefix": method.prefix, "__doc__": f"A model with {method.peft_type} adapters.\n{arguments}"}
    return type(name, (AdapterModel,), {**body, "__module__": "halotune"})
