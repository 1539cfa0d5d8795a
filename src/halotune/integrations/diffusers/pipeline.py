"""Adapters in the models of a diffusers pipeline, under one object."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...core.config import AdapterConfig
from ...core.errors import HalotuneError, did_you_mean
from ...core.files import WEIGHTS_NAME, locate, write_atomically
from ...engine.files.save import prepare
from ...engine.files.state_dict import read_tensors, set_peft_model_state_dict
from ...engine.injection.in_place import adapters_in, add_in_place, forget, remove_in_place
from ...engine.injection.surgery import taken_out
from ...engine.tuner import AdapterModel
from ...engine.weights.merge import MergeReport
from ..peft_types import peft_types
from .index import INDEX_NAME, read_index
from .models import check_alone, check_in_memory, follow, in_order, mark, reapply_group_offloading, tidy

Weight = float | Mapping[str, float]


class PipelineAdapters:
    """The adapters in a pipeline's models.

    The models are changed in place and stay what they are: `pipe.unet` is a `UNet2DConditionModel` still, saves itself
    without adapters (fused ones are in its weights), and takes them along to every pipeline that shares it. This object
    holds nothing: any number of them, and diffusers' own methods, act on the same adapters.

    With peft installed these of diffusers work too: `set_adapters`, `get_active_adapters`, `get_list_adapters`,
    `delete_adapters`, `enable_lora`, `disable_lora`, `fuse_lora`, `unfuse_lora`, `unload_lora_weights`,
    `cross_attention_kwargs={"scale": …}`; and LoRAs can be loaded over the adapters (`load_lora_weights`). Its `add_adapter`
    takes peft's configurations only.

    Args:
        pipe: a `DiffusionPipeline`, or anything whose `components` is a dict name -> model.
    """

    def __init__(self, pipe: Any) -> None:
        if not isinstance(getattr(pipe, "components", None), Mapping):
            raise HalotuneError(f"PipelineAdapters: expected a diffusers pipeline; got a {type(pipe).__name__}.")
        self.pipe = pipe

    def __repr__(self) -> str:
        lines = [f"  {c}: {', '.join(n + '*' * (n in t.active_adapters) for n in t.peft_config)}" for c, t in self._tuners()]
        return "\n".join([f"PipelineAdapters of a {type(self.pipe).__name__} (* active)", *lines])

    # -- what there is

    def _models(self) -> dict[str, nn.Module]:
        """The pipeline's models; a compiled one is the one inside."""
        models = {c: m for c, m in self.pipe.components.items() if isinstance(m, nn.Module)}
        return {c: getattr(m, "_orig_mod", m) for c, m in models.items()}

    def _tuners(self) -> list[tuple[str, AdapterModel]]:
        """The models that have adapters, with these."""
        found = [(c, m, adapters_in(m)) for c, m in self._models().items()]
        for _, model, tuner in found:
            if tuner is not None:
                follow(model, tuner)
        return [(c, tuner) for c, _, tuner in found if tuner is not None and tuner.peft_config]

    @property
    def names(self) -> dict[str, list[str]]:
        """Adapter -> the models that it is in."""
        out: dict[str, list[str]] = {}
        for component, tuner in self._tuners():
            for name in tuner.peft_config:
                out.setdefault(name, []).append(component)
        return out

    @property
    def active(self) -> list[str]:
        """The active adapters, in the order in which they apply."""
        return in_order(tuner.active_adapters for _, tuner in self._tuners())

    @property
    def fused(self) -> list[str]:
        """The adapters that are in the weights."""
        return in_order(tuner.merged_adapters for _, tuner in self._tuners())

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, of all models."""
        for _, tuner in self._tuners():
            yield from (p for p in tuner.model.parameters() if p.requires_grad)

    def penalty(self) -> Tensor | float:
        """The sum of the active adapters' penalties, to be added to the loss; 0.0 where none has one."""
        return sum((tuner.penalty() for _, tuner in self._tuners()), 0.0)

    # -- adding, loading, saving

    def add(self, configs: Mapping[str, AdapterConfig], name: str = "default", *, autocast_adapter_dtype: bool = True) -> None:
        """Put a new adapter into models, and make it the active one, to be trained.

        Args:
            configs: model, as the pipeline names it -> configuration, of any method.
            name: the adapter's name.
            autocast_adapter_dtype: parameters in fp32 over a half-precision model.
        """
        for component, config in configs.items():
            if not isinstance(config, AdapterConfig):
                raise HalotuneError(
                    f"{component}: expected one of halotune's configurations; got a "
                    f"{type(config).__module__}.{type(config).__name__}."
                )
        with self._adding(configs, name) as models:
            for component, model in models.items():
                config, base = copy.copy(configs[component]), getattr(self.pipe, "name_or_path", None)
                if config.base_model_name_or_path is None and base:
                    config.base_model_name_or_path = str(base)
                add_in_place(model, name, config, autocast_adapter_dtype=autocast_adapter_dtype)

    def load(
        self,
        folder: str | PathLike[str],
        name: str | None = None,
        components: Sequence[str] | None = None,
        *,
        trainable: bool = False,
        **kwargs: Any,
    ) -> str:
        """Load an adapter, and make it the active one; its name is returned.

        Args:
            folder: what `save` wrote, or any folder that holds folders in PEFT's format named as the pipeline's models; or
                the repository of such a folder on the hub.
            name: what it is called here; None is the name it was saved under.
            components: only these of its models.
            trainable: go on training it; else it is frozen.
            kwargs: `revision`, `token`, `cache_dir` … of the hub.
        """
        saved_as, held = read_index(folder, self._models(), components, kwargs)
        name = name or saved_as
        with self._adding(held, name, f"{folder}: ") as models:
            for component, model in models.items():
                config = AdapterConfig.from_pretrained(folder, subfolder=component, **kwargs)
                config.inference_mode = not trainable
                file = locate(folder, WEIGHTS_NAME, subfolder=component, **kwargs)
                tensors = read_tensors(file)
                add_in_place(model, name, config, low_cpu_mem_usage=True)
                set_peft_model_state_dict(model, tensors, name, low_cpu_mem_usage=True, file=file)
        return name

    def save(
        self, folder: str | PathLike[str], name: str | None = None, *, peft_type: str | None = None, bone_as_miss: bool = False
    ) -> None:
        """Write one adapter: a folder in PEFT's format for each of its models, and last the index.

        Args:
            folder: it is made where it is missing.
            name: the adapter; it can be left out where there is only one.
            peft_type, bone_as_miss: as in `PeftModel.save_pretrained`.
        """
        if name is None and len(self.names) != 1:
            raise HalotuneError(
                f"save: the pipeline has the adapters {sorted(self.names)}. Name one; each has a folder of its own."
            )
        (name,) = self._known(list(self.names) if name is None else name)
        folder = Path(folder)
        if folder.is_file():
            raise HalotuneError(f"save: {folder} is a file. Give a folder.")
        tuners = {c: tuner for c, tuner in self._tuners() if name in tuner.peft_config}
        for tuner in tuners.values():
            check_alone(tuner.model, "save")
        alias = "MISS" if bone_as_miss else peft_type
        for write in [prepare(tuner, name, folder / c, peft_type=alias) for c, tuner in tuners.items()]:
            write()
        index = {
            "adapter_name": name,
            "components": {c: type(tuner.model).__name__ for c, tuner in tuners.items()},
            "pipeline": type(self.pipe).__name__,
        }
        write_atomically(folder / INDEX_NAME, lambda file: file.write_text(json.dumps(index, indent=2) + "\n", "utf-8"))

    @contextmanager
    def _adding(self, parts: Iterable[str], name: str, source: str = "") -> Iterator[dict[str, nn.Module]]:
        """Yields the models of these names, to put an adapter into; all or none keep it, and then it is the active one."""
        models, parts = self._models(), list(parts)
        missing = [c for c in parts if c not in models]
        if missing or not parts:
            raise HalotuneError(
                f"{source}{type(self.pipe).__name__} has no model {missing[0]!r}; it has {', '.join(models)}."
                + did_you_mean(missing[0], models)
                if missing
                else f"{source}no model is named. {type(self.pipe).__name__} has {', '.join(models)}."
            )
        taken = [c for c in parts if c in self.names.get(name, [])]
        if taken:
            raise HalotuneError(f"{taken[0]}: there is an adapter named {name!r} already. Delete it, or use another name.")
        for c in parts:
            check_alone(models[c], f"adapter {name!r}")
            check_in_memory(models[c])
        active = self.active
        peft_types()  # diffusers finds adapters by the type of peft's layers, and calls them by that type's methods
        try:
            yield {c: models[c] for c in parts}
            for c in parts:
                mark(models[c])
            self._activate([name])
            for tuner in (tuner for c, tuner in self._tuners() if c in parts):
                tuner.set_scale(name, 1.0)
        except BaseException:
            self._remove(name, parts)
            if self.active != active:
                self._activate(active)
            raise
        for c in parts:
            reapply_group_offloading(models[c])

    # -- which adapters run, and how strongly

    def set(self, names: str | Sequence[str], weights: Weight | Sequence[Weight | None] | None = None) -> None:
        """Make these adapters the active ones; they apply in this order.

        Args:
            names: an adapter, or several.
            weights: the scale of all or of each: 0 is the base model, 1 (or None) the adapter as it was trained; or a
                dict model -> scale, where models left out have 1.

        Of scale s an adapter maps `W -> W + s (F(W) − W)`. Adapters that were fused are taken out of the weights.
        """
        names, there = self._known(names), self.names
        given = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        if len(given) != len(names):
            raise HalotuneError(f"set: {len(names)} adapters, but {len(given)} weights. Give one weight, or one per adapter.")
        scales = {n: _scales(n, w, there[n]) for n, w in zip(names, given, strict=True)}
        self._activate(names)
        for component, tuner in self._tuners():
            for name in names:
                if component in scales[name]:
                    tuner.set_scale(name, scales[name][component])

    def _activate(self, names: list[str]) -> None:
        for _, tuner in self._tuners():
            own = [n for n in names if n in tuner.peft_config]
            tuner.set_adapter(own, inference_mode=any(tuner.peft_config[n].inference_mode for n in own))

    def enable(self) -> None:
        """Run with the adapters again, after `disable`."""
        for _, tuner in self._tuners():
            tuner.enable_adapter_layers()

    def disable(self) -> None:
        """Run as the base pipeline. Adapters that were fused are taken out of the weights."""
        for _, tuner in self._tuners():
            tuner.disable_adapter_layers()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the pipeline is the base pipeline; fused adapters are taken out, and fused again afterwards."""
        with ExitStack() as stack:
            for _, tuner in self._tuners():
                stack.enter_context(tuner.disable_adapter())
            yield

    # -- fusing, and taking out

    def fuse(self, names: str | Sequence[str] | None = None, *, safe: bool = True) -> dict[str, MergeReport]:
        """Write adapters (the active ones) into the weights, at their scales; `unfuse` restores these bit for bit.

        Args:
            names: an adapter, or several.
            safe: refuse values that are not finite; then no model is changed.

        Returns:
            for each model what it did.
        """
        wanted = self._known(self.active if names is None else names)
        tuners = {c: tuner for c, tuner in self._changeable() if any(n in tuner.peft_config for n in wanted)}
        for tuner in tuners.values():
            check_alone(tuner.model, "fuse")
        before = {c: tuner.merged_adapters for c, tuner in tuners.items()}
        reports: dict[str, MergeReport] = {}
        try:
            for c, tuner in tuners.items():
                reports[c] = tuner.merge_adapter([n for n in wanted if n in tuner.peft_config], safe_merge=safe)
        except BaseException:
            for c in reports:
                tuners[c].unmerge_adapter()
                tuners[c].merge_adapter(before[c])
            raise
        return reports

    def unfuse(self) -> None:
        """Restore the weights of all models, bit for bit."""
        for _, tuner in self._changeable():
            tuner.unmerge_adapter()

    def delete(self, names: str | Sequence[str]) -> None:
        """Take adapters out. Where one was the only active one of a model, the first of its others becomes active."""
        names = self._known(names)
        self._changeable()
        for name in names:
            self._remove(name, self.names[name])

    def _remove(self, name: str, components: Iterable[str]) -> None:
        for component, tuner in self._tuners():
            if component in components and name in tuner.peft_config:
                remove_in_place(tuner.model, name)
                tidy(tuner.model)

    def unload(self) -> None:
        """Take all adapters out: every model is as it was."""
        for _, tuner in self._changeable():
            forget(tuner.model)
            tidy(tuner.model)

    def merge_and_unload(self) -> None:
        """Write the active adapters into the weights for good, and take all adapters out: the models are plain ones."""
        self.fuse()
        for _, tuner in self._tuners():
            forget(tuner.model, merged=True)
            tidy(tuner.model)

    def _changeable(self) -> list[tuple[str, AdapterModel]]:
        """The models that have adapters, none of them in a state where they must stay as they are."""
        tuners = self._tuners()
        for _, tuner in tuners:
            check_in_memory(tuner.model)
        return tuners

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Inside, the models hold their own modules alone, for code that copies or converts their weights.

        `ControlNetModel.from_unet(pipe.unet)` is an example. Fused adapters are in these weights.
        """
        with ExitStack() as stack:
            for _, tuner in self._tuners():
                stack.enter_context(taken_out(tuner.model))
            yield

    def _known(self, names: str | Sequence[str]) -> list[str]:
        """One or several names, which are those of adapters."""
        names = [names] if isinstance(names, str) else list(names)
        unknown = [n for n in names if n not in self.names]
        if unknown:
            raise HalotuneError(f"there is no adapter named {unknown[0]!r}; the pipeline has {sorted(self.names)}.")
        return names


def _scales(name: str, weight: Weight | None, components: Sequence[str]) -> dict[str, float]:
    """The scale of an adapter in each of its models."""
    of = weight if isinstance(weight, Mapping) else {c: 1.0 if weight is None else weight for c in components}
    strange = [c for c in of if c not in components]
    if strange:
        raise HalotuneError(
            f"weights: adapter {name!r} is not in {strange[0]!r}, but in {', '.join(components)}. Leave it out."
        )
    for c, w in of.items():
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w):
            raise HalotuneError(f"weights: the scale of {name!r} in {c} is {w!r}. Give a finite number, such as 0.7.")
    return {c: float(of.get(c, 1.0)) for c in components}
