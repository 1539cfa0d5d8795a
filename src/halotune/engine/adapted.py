"""What can be asked of a model with adapters, wrapped once (`AdapterModel`) or twice (`PeftModel`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import HalotuneError, warn
from ..core.prepared import Form
from ..core.sharded_parameters import reshard
from ..core.wrapper import Wrapper
from .files.save import save_adapters
from .gathering import require_no_units, whole_adapters
from .injection.activation import activate, enable, per_sample
from .injection.modules import adapted_layers, modules_to_save_wrappers, per_adapter, public_path
from .injection.offloading import bring_adapters
from .injection.surgery import remove
from .training import penalty
from .weights.combine import combine
from .weights.merge import MergeReport, Requantize, merge, unmerge, untie_copies

if TYPE_CHECKING:
    from ..export.lora import ExportReport
    from .tuner import AdapterModel


class AdaptedModel(Wrapper):
    """A model whose adapters, and what is known of them, `tuner` holds."""

    @property
    def tuner(self) -> AdapterModel:
        raise NotImplementedError

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapters in its layers."""
        return self.tuner.model

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base's own arguments; and `adapter_names`, one per sample of the batch, `"__base__"` for none."""
        wrapped: Any = self._modules[self._wraps]
        if adapter_names is not None:
            with per_sample(self.get_base_model(), adapter_names, self._batch_size(args, kwargs)):
                return self.forward(*args, **kwargs)
        try:
            return wrapped(*args, **kwargs)
        except BaseException:  # KeyboardInterrupt passes hooks by
            self.tuner.scope.close()
            raise

    def _batch_size(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
        """The number of samples of an input that we know by name; None else."""
        main = getattr(self.get_base_model(), "main_input_name", "input_ids")
        inputs = (*args, *(kwargs.get(name) for name in (main, "inputs", "inputs_embeds")))
        return next((t.shape[0] for t in inputs if isinstance(t, Tensor) and t.dim()), None)

    # -- adapters

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """Name -> configuration."""
        return self.tuner.configs

    @property
    def active_adapters(self) -> list[str]:
        return self.tuner.active

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the names where there are several."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make this adapter, or these in this order, the active ones, and (unless `inference_mode`) train them alone."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        if len(set(names)) < len(names):
            raise HalotuneError(f"set_adapter: {names} names an adapter twice; each can be applied once. Name it once.")
        if self.merged_adapters:
            warn("adapters were merged; the base weights are restored before others are set.")
            self.unmerge_adapter()
        reshard(self)
        activate(self.get_base_model(), names, trainable=not inference_mode)
        self.tuner.active = names

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter out. If it was the only active one, the first of the others becomes active."""
        self._check_known([adapter_name])
        if adapter_name in self.merged_adapters:
            self.unmerge_adapter()
        tuner = self.tuner
        remove(tuner.model, adapter_name)
        tuner.scope.reset()
        del tuner.configs[adapter_name]
        tuner.active = [n for n in tuner.active if n != adapter_name]
        if not tuner.active and tuner.configs:
            first = next(iter(tuner.configs))
            warn(f"the active adapter {adapter_name!r} was deleted; {first!r} is active now.")
            self.set_adapter(first, inference_mode=tuner.configs[first].inference_mode)

    @property
    def modules_to_save(self) -> set[str] | None:
        """What the adapters' configurations call the fully fine-tuned modules; None where there are none."""
        return {n for config in self.peft_config.values() for n in config.modules_to_save or []} or None

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters, active or not, or freeze them; the others stay as they are."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_known(names)
        reshard(self)
        held = [module.by_name for module in per_adapter(self.get_base_model()).values()]
        for p in (p for own in held for n in names if n in own for p in own[n].parameters()):
            if p.is_floating_point():
                p.requires_grad_(requires_grad)

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = [n for n in names if n not in self.peft_config]
        if unknown:
            raise HalotuneError(f"there is no adapter named {unknown[0]!r}; the model has {sorted(self.peft_config)}.")

    def enable_adapter_layers(self) -> None:
        """Let the active adapters apply again, after `disable_adapter_layers`."""
        enable(self.get_base_model(), True)

    def disable_adapter_layers(self) -> None:
        """Run as the base model; merged adapters are taken out of the weights."""
        biased = [n for n in self.active_adapters if self.peft_config[n].bias != "none"]
        if biased:
            warn(
                f"{biased[0]!r} trained biases of the base model, which stay: without adapters the output is not the "
                "original model's."
            )
        self.unmerge_adapter()
        enable(self.get_base_model(), False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the base model. Merged adapters are taken out, and merged again afterwards."""
        merged = self.merged_adapters
        floats = any(layer.merged_into_floats for layer in adapted_layers(self.get_base_model()).values())
        self.disable_adapter_layers()
        try:
            yield
        finally:
            self.enable_adapter_layers()
            if merged:
                self.merge_adapter(merged, quantized="keep_float" if floats else "requantize")

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
        model = self.get_base_model()
        with whole_adapters(model, "add_weighted_adapter"):
            config, combined = combine(model, self.peft_config, adapters, weights, combination_type)
        self.tuner.add_adapter(adapter_name, config, low_cpu_mem_usage=True, paths=list(combined))
        for path, layer in adapted_layers(model).items():
            path = public_path(path)
            if path in combined:
                like = next(layer.adapters[n] for n in adapters if n in layer.adapters)
                p = next(like.parameters())
                layer.add(adapter_name, combined[path].to(p.device, p.dtype).requires_grad_(False))

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """The scale of one adapter, everywhere: `W + scale (F(W) − W)`; 1 is its own, 0 is the base."""
        self._check_known([adapter_name])
        for layer in adapted_layers(self.get_base_model()).values():
            layer.set_scale(adapter_name, scale)

    # -- speed and memory

    def cache_weights(self, gib: float) -> None:
        """In eval mode and without gradients, keep each layer's `W'` beside its W, up to this much memory.

        Decoding then costs what the bare model costs, with the base untouched and adapters still to be switched. What is
        kept is dropped when a parameter changes, in training, and with `gib=0`, which is the default.
        """
        if not gib >= 0:
            raise HalotuneError(f"gib: expected the memory to use, 0 for none; got {gib}.")
        self.tuner.scope.cache_weights(int(gib * 2**30))

    @property
    def cached_weights(self) -> tuple[int, int]:
        """How many layers' `W'` are kept now, and their bytes."""
        cache = self.tuner.scope.cache
        return len(cache), cache.used

    def set_adapter_form(self, form: Form, budget_gib: float = 2.0) -> None:
        """In which form adapters are trained on plain linear layers; `get_layer_status` shows it.

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
        self.tuner.scope.set_form(form, int(budget_gib * 2**30))

    # -- training, merging

    def penalty(self) -> Tensor | float:
        """The sum of the active adapters' penalties, to be added to the loss; 0.0 where none has one."""
        return penalty(self.get_base_model())

    @property
    def merged_adapters(self) -> list[str]:
        """The merged adapters, in the order in which they were merged."""
        merged = {n for layer in adapted_layers(self.get_base_model()).values() for n in layer.merged_adapters}
        return [n for n in dict.fromkeys([*self.tuner.merge_order, *sorted(merged)]) if n in merged]

    @property
    def merge_report(self) -> MergeReport | None:
        """The report of the last merge; None before the first."""
        return self.tuner.last_merge

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = True, quantized: Requantize = "requantize"
    ) -> MergeReport:
        """Write adapters (the active ones) into the weights; `unmerge_adapter` restores them bit for bit.

        Adapters that are active and not merged still apply, after the merged ones.

        Args:
            adapter_names: which, in the order in which they apply.
            safe_merge: check all values before any weight changes.
            quantized: quantized weights are requantized, at a price that the report names, or, with "keep_float", replaced by
                floats until `unmerge_adapter`.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        self._check_known(names)
        tuner, before = self.tuner, self.merged_adapters
        bring_adapters(tuner.model)
        reshard(self)
        with whole_adapters(tuner.model, "merge_adapter"):
            tuner.last_merge = report = merge(tuner.model, names, safe=safe_merge, quantized=quantized)
        tuner.merge_order = list(dict.fromkeys([*before, *names]))
        return report

    def unmerge_adapter(self) -> None:
        """Restore the base weights, bit for bit."""
        if self.merged_adapters:
            reshard(self)
        unmerge(self.get_base_model())

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: list[str] | None = None,
        quantized: Requantize = "requantize",
    ) -> Any:
        """Write adapters (the active ones) into the weights for good, and return the plain model.

        The arguments are those of `merge_adapter`. With `safe_merge`, a merge that fails on its way leaves the base as it was:
        until it is over, the weights' copies lie in CPU memory. Without, it holds none, and can only be called again.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        self._check_known(names)
        already = [n for n in self.merged_adapters if n not in names]
        if already:
            raise HalotuneError(f"{already} are merged already but not among {names}. Call unmerge_adapter() first.")
        require_no_units(self, "merge_and_unload")
        tuner = self.tuner
        bring_adapters(tuner.model)
        with whole_adapters(tuner.model, "merge_and_unload"):
            tuner.last_merge = merge(
                tuner.model, names, keep=False, safe=safe_merge, progressbar=progressbar, quantized=quantized
            )  # fmt: skip
        for wrapper in modules_to_save_wrappers(tuner.model).values():
            wrapper.active_adapters, wrapper.enabled = [n for n in names if n in wrapper.modules_to_save], True
        untie_copies(tuner.model)
        return tuner.release(trained=True)

    def unload(self) -> Any:
        """Take all adapters out and return the plain model as it was; only trained biases stay."""
        require_no_units(self, "unload")
        self.unmerge_adapter()
        return self.tuner.release(trained=False)

    # -- files

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Any = None,
        peft_type: str | None = None,
        bone_as_miss: bool = False,
    ) -> None:
        """Write adapters in PEFT's format: `default` into the folder itself, others into subfolders of their names.

        Args:
            save_directory: the folder; it is made where it is missing.
            safe_serialization: only True; pickles are never written.
            selected_adapters: names of adapters; None is all.
            save_embedding_layers: store the embeddings too; "auto": where they are targets or were resized.
            is_main_process: others write nothing.
            state_dict: the model's state dict, where it is at hand already, as a sharded model's must be; an empty one is none.
            save_function: accepted for accelerate's sake (`accelerator.save`); files are always written atomically.
            peft_type: write adapters whose method has this other name under it; the others under their own.
            bone_as_miss: the same as `peft_type="MISS"`: Bone adapters as MiSS, which peft 0.19 and later can read.

        Raises:
            HalotuneError: our own reader would refuse the file; nothing is written then.
        """
        if not safe_serialization:
            raise HalotuneError(
                "save_pretrained: safe_serialization=False would write a pickle, which can run code when it is read. Leave it "
                "True."
            )
        if state_dict is None:
            reshard(self)
        alias = "MISS" if bone_as_miss else peft_type
        save_adapters(self.tuner, save_directory, selected_adapters, save_embedding_layers, is_main_process, state_dict, alias)

    def export(
        self,
        to: Literal["lora"],
        folder: str | PathLike[str],
        *,
        adapter_name: str | Sequence[str] | None = None,
        runtime: str = "peft",
        rank: int | None = None,
        component: str | None = None,
        dtype: torch.dtype | None = None,
        gguf: bool = False,
    ) -> ExportReport:
        """Write adapters as a LoRA that gives the same outputs, for programs that read nothing else.

        HRA and Bone become a LoRA of their own rank, LoHa one of rank r²: exactly. One rank for all layers, `lora_alpha`
        equal to it, the scale in B. BAT has full rank, so it needs `rank`.

        Args:
            to: "lora".
            folder: made where it is missing.
            adapter_name: an adapter, or several that apply in this order; None is the active ones. Their scales count.
            runtime: the target runtime: "peft", "halotune", "vllm", "sglang", "llama.cpp", "diffusers" or "comfyui". It decides
                names and files, and which layers can be represented at all.
            rank: truncate every layer to this rank, at the least error; smaller ones are filled up with zeros.
            component: for diffusers and ComfyUI, the model's name in the pipeline; None tells it from the model's class.
            dtype: of the tensors; None is the adapter's.
            gguf: for "llama.cpp": write `adapter_model.gguf` too, which it loads as it is.

        Returns:
            a report: rank and error of each layer; `print` it.

        Raises:
            HalotuneError: the runtime cannot represent the adapter; it names the layers and says why. Nothing is written.
        """
        from .files.export import export_adapters  # few need it, and `import halotune` stays light

        reshard(self)
        return export_adapters(self.tuner, to, folder, adapter_name, runtime, rank, component, dtype, gguf)
