"""`PeftModel` and the task classes: a base model with adapters, under the API that PEFT's users know."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..core.config import CLASSES, AdapterConfig, TaskType
from ..core.errors import HalotuneError
from ..core.sharded_parameters import is_unit
from ..methods.registry import method_of
from .adapted import AdaptedModel
from .files.card import CARD_NAME, mark_card
from .files.hotswap import require_same
from .files.hub import upload
from .files.load import AdapterSource
from .files.save import parameter_count
from .files.state_dict import set_peft_model_state_dict
from .injection.activation import per_sample
from .injection.in_place import add_in_place
from .injection.modules import adapted_layers, paths_in_state_dict, unwrapped
from .injection.resolve import task_heads
from .status import LayerStatus, ModelStatus, layer_status, model_status
from .tuner import AdapterModel, register_external_types, tuner_class


class PeftModel(AdaptedModel):
    """A base model with adapters. The base's own attributes and methods are reached through it.

    Args:
        model: the base model; it is changed in place.
        peft_config: the first adapter's configuration.
        adapter_name: its name.
        autocast_adapter_dtype: parameters in fp32 over a half-precision base.
        low_cpu_mem_usage: create the parameters on the meta device, to be loaded afterwards.
    """

    _wraps = "base_model"

    heads: ClassVar[tuple[str, ...]] = ()  # modules that the task fully fine-tunes, as PEFT names them
    other_heads: ClassVar[tuple[str, ...]] = ()  # and what else some of transformers' classes call them
    _hf_peft_config_loaded: ClassVar[bool] = True  # without it transformers' Trainer refuses a quantized base

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if "_public" in cls.__dict__:  # made below already: replicas call it without a model
            return super().__new__(cls)
        model = args[0] if args else kwargs.get("model")
        return super().__new__(_class_for(_public(cls), type(unwrapped(model)), register_external_types()))  # type: ignore[arg-type]

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # not super(): a type of another library, taken on in `_class_for`, must not set anything up
        if isinstance(model, (PeftModel, AdapterModel)):
            raise HalotuneError(
                f"the model is a {type(model).__name__} already. Use add_adapter for a second adapter, or unload() first."
            )
        if there := list(adapted_layers(model)):
            raise HalotuneError(
                f"the model has adapters already, {len(there)} such as on {there[0]}; a file saved from a "
                "second wrapper would hold those too. Call add_adapter on the first for a second adapter, or its unload()."
            )
        self.base_model: AdapterModel = tuner_class(str(method_of(peft_config.peft_type).peft_type))(
            model,
            self._with_heads(peft_config, model),
            adapter_name,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        self.training = self.base_model.training = model.training
        _let_checkpointing_reach(model)

    def _with_heads(self, config: AdapterConfig, model: nn.Module) -> AdapterConfig:
        """A copy of the configuration that knows the base and the task's heads."""
        config = copy.copy(config)
        if config.base_model_name_or_path is None:
            model = unwrapped(model)
            own = getattr(model, "config", None)
            name = getattr(model, "name_or_path", None) or getattr(own, "_name_or_path", None)
            config.base_model_name_or_path = str(name) if name else None  # diffusers' may be a Path
        if self.heads:
            named = config.modules_to_save or []
            found = task_heads(model, config, self.heads, self.other_heads)
            config.modules_to_save = list(dict.fromkeys([*named, *self.heads, *found]))
        return config

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class with the base's signature is made at run time
        return _blank, (_public(type(self)), type(unwrapped(self.get_base_model()))), self.__dict__

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate with the active adapters, or with one per sample; the base's own arguments."""
        if is_unit(self) and "generate" not in vars(self):
            from torch.distributed.fsdp import register_fsdp_forward_method  # `import halotune` stays light

            register_fsdp_forward_method(self, "generate")  # what this unit holds is gathered for it, as for `forward`
            return self.generate(*args, adapter_names=adapter_names, **kwargs)
        generate: Any = self.get_base_model().generate
        if adapter_names is None:
            return generate(*args, **kwargs)
        with per_sample(self.get_base_model(), adapter_names, self._batch_size(args, kwargs)):
            return generate(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """transformers 5's name of `gradient_checkpointing_enable`."""
        base: Any = self.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable(*args, **kwargs)
        _let_checkpointing_reach(base)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Trade time for memory; transformers' own arguments."""
        base: Any = self.get_base_model()
        base.gradient_checkpointing_enable(*args, **kwargs)
        _let_checkpointing_reach(base)

    # -- the parts

    @property
    def tuner(self) -> AdapterModel:
        return self.base_model

    @property
    def active_peft_config(self) -> AdapterConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> str:
        return str(method_of(self.active_peft_config.peft_type).peft_type)

    # -- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put one more adapter into the model, inactive."""
        config = self._with_heads(peft_config, self.get_base_model())
        self.base_model.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)

    # -- counting

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The numbers of trainable and of all parameters; packed 4-bit weights count as what they hold."""
        trainable = total = 0
        for p in self.parameters():
            n = parameter_count(p)
            total += n
            trainable += n if p.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[LayerStatus]:
        """One entry per adapted layer."""
        return layer_status(self)

    def get_model_status(self) -> ModelStatus:
        """All layers' entries in one; what differs between layers is "irregular"."""
        return model_status(self)

    # -- files

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload adapter",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Save the adapters and upload them in one commit.

        Args:
            repo_id: `user/repository`; it is made where it is missing.
            commit_message: the commit's first line.
            commit_description: the rest of it.
            private: whether a new repository is private; None is the account's default.
            token: of the hub; None is the one that is logged in.
            revision: the branch.
            create_pr: open a pull request instead of committing to the branch.
            kwargs: for `save_pretrained`.

        Returns:
            huggingface_hub's `CommitInfo`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            about = {"commit_message": commit_message, "commit_description": commit_description, "create_pr": create_pr}
            return upload(Path(folder), repo_id, private, token, revision, **about)

    def create_or_update_model_card(self, output_dir: str | PathLike[str]) -> None:
        """Say in a folder's card that it holds adapters; trainers call this after they have written a card of their own."""
        mark_card(Path(output_dir) / CARD_NAME, self.active_peft_config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """A base model with an adapter that was saved.

        Args:
            model: the base model; untouched where an error is raised.
            model_id: the adapter's folder, or its repository on the hub.
            adapter_name: what it is called in this model.
            is_trainable: go on training it, in the base's mode; else it is frozen, and the model in eval mode.
            config: instead of the stored configuration.
            autocast_adapter_dtype: parameters in fp32 over a half-precision base; else in the file's dtype.
            low_cpu_mem_usage: accepted for PEFT's sake; parameters are never initialised before they are loaded.
            key_mapping: regular expression -> replacement, applied to the file's keys.
            kwargs: `subfolder`; `revision`, `token`, `cache_dir` … of the hub; `ignore_mismatched_sizes`; PEFT's `device_map`,
                `max_memory` and `offload_…`, without effect: an adapter lies where its layers do. Others are errors.
        """
        source = AdapterSource.read(model_id, config, is_trainable, key_mapping, **kwargs)
        return cls.from_source(model, source, adapter_name, autocast_adapter_dtype)

    @classmethod
    def from_source(
        cls, model: nn.Module, source: AdapterSource, adapter_name: str = "default", autocast_adapter_dtype: bool = True
    ) -> PeftModel:
        """`from_pretrained` for an adapter that was read already."""
        wrapper = PEFT_CLASSES.get(source.config.task_type or "", PeftModel) if cls is PeftModel else cls
        trained = [p for p in model.parameters() if p.requires_grad]
        wrapped = wrapper(model, source.config, adapter_name, autocast_adapter_dtype, source.complete)
        try:
            wrapped._load(source, adapter_name, autocast_adapter_dtype)
        except BaseException:
            wrapped.unload()
            for p in trained:
                p.requires_grad_(True)
            raise
        return wrapped

    def load_adapter(
        self,
        model_id: str | PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load one more adapter from a folder or the hub, inactive; or new weights for one of the same configuration.

        The arguments are those of `from_pretrained`, the eval mode too; `torch_device` is where its parameters go.
        """
        source = AdapterSource.read(model_id, None, is_trainable, key_mapping, **kwargs)
        result = self.add_source(source, adapter_name, autocast_adapter_dtype)
        if torch_device is not None:
            for layer in adapted_layers(self).values():
                if adapter_name in layer.adapters:
                    layer.adapters[adapter_name].to(torch_device)
        return result

    def add_source(self, source: AdapterSource, adapter_name: str, autocast_adapter_dtype: bool = True) -> Any:
        """`load_adapter` for an adapter that was read already."""
        new = adapter_name not in self.peft_config
        if new:
            self.add_adapter(adapter_name, source.config, source.complete, autocast_adapter_dtype)
        else:
            require_same(self.peft_config[adapter_name], source.config, adapter_name, source.file)
        try:
            return self._load(source, adapter_name, autocast_adapter_dtype)
        except BaseException:
            if new:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.delete_adapter(adapter_name)
            raise

    def _load(self, source: AdapterSource, name: str, autocast: bool) -> Any:
        result = set_peft_model_state_dict(
            self,
            source.tensors,
            name,
            ignore_mismatched_sizes=not source.complete,
            file=source.file,
            keep_dtype=not autocast,
        )
        if source.config.inference_mode:
            self.eval()
        return result


def _let_checkpointing_reach(model: nn.Module) -> None:
    """Checkpointed blocks get gradients only where their input asks for one, and frozen embeddings do not."""
    on = getattr(model, "is_activation_checkpointing", None)  # transformers 5's name
    if on is None:
        on = getattr(model, "is_gradient_checkpointing", False)
    if on and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]


# -- one class per base class. Trainers read the signature of its `forward` to tell which columns a model takes, and test
# for the type of another library


@cache
def _class_for(cls: type[PeftModel], base: type[nn.Module], types: tuple[type, ...]) -> type[PeftModel]:
    shared: Any = PeftModel.forward
    forward: Any = FunctionType(shared.__code__, shared.__globals__, "forward", shared.__defaults__, shared.__closure__)
    forward.__kwdefaults__ = shared.__kwdefaults__
    own: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_public": cls}
    with suppress(TypeError, ValueError):  # a forward without a signature
        forward.__signature__ = inspect.signature(base.forward)
        forward.__doc__ = base.forward.__doc__
        own["forward"] = forward
    return type(cls.__name__, (cls, *types), own)


def _public(cls: type[PeftModel]) -> type[PeftModel]:
    return cls.__dict__.get("_public", cls)


def _blank(cls: type[PeftModel], base: type[nn.Module]) -> PeftModel:
    return object.__new__(_class_for(cls, base, register_external_types()))


# -- tasks


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; its head is fully fine-tuned."""

    heads = ("classifier", "score")
    other_heads = ("classification_head", "logits_proj", "sequence_summary")


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; its head is fully fine-tuned."""

    heads = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answering model with adapters; its head is fully fine-tuned."""

    heads = ("qa_outputs",)
    other_heads = ("classifier", "qa_classifier", "answer_head", "start_logits", "end_logits", "answer_class", "splinter_qass")


class PeftModelForFeatureExtraction(PeftModel):
    """An encoder with adapters."""


PEFT_CLASSES: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS.value: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM.value: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM.value: PeftModelForCausalLM,
    TaskType.TOKEN_CLS.value: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS.value: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION.value: PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter into a model and return the wrapped model.

    Args:
        model: any module; its layers are wrapped in place.
        peft_config: the method's own: `HRAConfig`, `OFTConfig`, `LoHaConfig` …
        adapter_name: the adapter's name.
        mixed: accepted for PEFT's sake; adapters of different methods can always live on one model.
        autocast_adapter_dtype: parameters in fp32 over a half-precision base.
        revision: of the base model, for the stored configuration.
        low_cpu_mem_usage: create the parameters on the meta device, to be loaded afterwards.

    Returns:
        the class of the configuration's `task_type`, or `PeftModel`.
    """
    if not isinstance(peft_config, AdapterConfig):
        known, found = ", ".join(c.__name__ for c in CLASSES.values()), type(peft_config)
        raise HalotuneError(
            f"get_peft_model: expected one of halotune's configurations, {known}; got {found.__module__}.{found.__name__}. "
            "Build it from halotune, or read a saved one with PeftConfig.from_pretrained."
        )
    if revision is not None:
        peft_config = copy.copy(peft_config)
        peft_config.revision = revision
    task = peft_config.task_type
    wrapper = PEFT_CLASSES[TaskType(task).value] if task else PeftModel
    return wrapper(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model without wrapping it: the same object comes back.

    Args:
        state_dict: adapt the modules that its keys name, instead of `target_modules`; it is not loaded.
    """
    paths = None if state_dict is None else paths_in_state_dict(model, state_dict)
    tuner = add_in_place(model, adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage, paths=paths)
    tuner.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return model
