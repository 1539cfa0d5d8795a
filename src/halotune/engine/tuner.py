"""A model with adapters in it: what `HRAModel`, `LoHaModel`, `BoneModel` … are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Self

from ..core.config import AdapterConfig
from ..core.errors import HalotuneError, warn
from ..core.layer import AdaptedLayer
from ..methods.registry import method_of
from .adapted import AdaptedModel
from .files.keys import bias_keys, held_tensors
from .forward.prepare import Scope
from .gathering import is_divided
from .injection.activation import activate, check_bias, freeze
from .injection.default_targets import DEFAULT_TARGETS
from .injection.first_pass import FirstPass
from .injection.inject import inject
from .injection.modules import paths_in_state_dict
from .injection.surgery import eject, remove
from .weights.merge import MergeReport

# Other libraries tell adapters by their types. Each of these, called before a model is wrapped, makes our layers known to a
# library that is in use, and returns the library's types that the wrapped model's class must derive from.
external_types: list[Callable[[], tuple[type, ...]]] = []


def register_external_types() -> tuple[type, ...]:
    """Make our layers known, and return the types that a wrapper must take on."""
    return tuple(t for function in external_types for t in function())


class AdapterModel(AdaptedModel):
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
        self.configs: dict[str, AdapterConfig] = {}
        self.active: list[str] = []
        self.last_merge: MergeReport | None = None
        self.merge_order: list[str] = []
        self.scope = Scope(model)
        self.first_pass = FirstPass()
        configs = {adapter_name: peft_config} if isinstance(peft_config, AdapterConfig) else dict(peft_config)
        paths = None if state_dict is None else paths_in_state_dict(model, state_dict)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            for name, config in configs.items():
                self.add_adapter(name, config, low_cpu_mem_usage, autocast_adapter_dtype, paths)
        except BaseException:  # the model as it was, though a first configuration was good
            for name in self.configs:
                remove(model, name)
            for p, flag in flags:
                p.requires_grad_(flag)
            self.scope.remove()
            self.first_pass.remove(model)
            raise

    @property
    def tuner(self) -> Self:
        return self

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        paths: list[str] | None = None,
    ) -> None:
        """Put one more adapter into the model. The first one becomes active."""
        if adapter_name in self.configs:
            raise HalotuneError(f"there is an adapter named {adapter_name!r} already. Delete it, or use another name.")
        check_bias({**getattr(self.model, "peft_config", {}), **self.configs}, peft_config, adapter_name)
        config = inject(self.model, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype, paths)
        if not peft_config.inference_mode and any(isinstance(m, DistributedDataParallel) for m in self.model.modules()):
            warn(
                "DistributedDataParallel wraps the base model, and averages the gradients of those parameters alone that it "
                "found there: each process would train an adapter of its own. Put adapters in first, and wrap the result."
            )
        if not peft_config.inference_mode and is_divided(self.model):
            warn(
                "the base model is sharded already, and gradients of those parameters alone are averaged that were there then: "
                "each process would train an adapter of its own. Put adapters in first, and shard the result."
            )
        self.scope.reset()
        self.first_pass.watch(self.model)
        if not self.configs:
            freeze(self.model)
        self.configs[adapter_name] = config = copy.copy(config)
        self.active = active = self.active or [adapter_name]
        activate(self.model, active, trainable=not any(self.configs[n].inference_mode for n in active))
        if not config.inference_mode:
            held = held_tensors(self.model, keep_vars=True)
            for key in bias_keys(self.model, held, adapter_name, config.bias):
                if isinstance(held[key], nn.Parameter):
                    held[key].requires_grad_(True)

    def release(self, *, trained: bool) -> nn.Module:
        eject(self.model, trained=trained)
        self.scope.remove()
        self.first_pass.remove(self.model)
        self.model.__dict__.pop("_halotune_untied", None)
        self.configs, self.active = {}, []
        return self.model


@lru_cache
def tuner_class(peft_type: str) -> type[AdapterModel]:
    """The class with a method's name: `HRAModel`, `LoHaModel`, `BoneModel` …; `halotune` exports them."""
    method = method_of(peft_type)
    name = method.config.__name__.removesuffix("Config") + "Model"
    _, _, arguments = (AdapterModel.__doc__ or "").partition("\n")
    body = {"prefix": method.prefix, "__doc__": f"A model with {method.peft_type} adapters.\n{arguments}"}
    return type(name, (AdapterModel,), {**body, "__module__": "halotune"})
