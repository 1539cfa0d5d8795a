"""The models of a diffusers pipeline: which part of it a model is, and what files call its modules."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import HalotuneError

# The models of a pipeline that adapters are made for.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
FLATTENED = "CLIPTextModel"  # transformers 5.6 and later leave out a level of it that all files have: "text_model."
# What a class's name contains -> the part that such a model is; T5 and language models are another part in each pipeline.
_KINDS = {
    "UNet": "unet",
    "CLIPTextModelWithProjection": "text_encoder_2",
    "CLIPTextModel": "text_encoder",
    "Transformer": "transformer",
}


@dataclass(frozen=True)
class Component:
    """A model as a part of its pipeline.

    Attributes:
        name: what the pipeline calls it: "unet", "text_encoder_2" …
        model_class: its class.
    """

    name: str
    model_class: str

    @classmethod
    def of(cls, model_class: str, name: str | None = None) -> Component:
        """The part that a model of this class is, unless it is named.

        Raises:
            HalotuneError: models of this class are different parts of different pipelines.
        """
        found = name or component_of(model_class)
        if found is None:
            raise HalotuneError(
                f"component: cannot tell which part of a pipeline a {model_class} is. Give its name in the pipeline: 'unet', "
                "'transformer', 'text_encoder_3' … (--component)."
            )
        return cls(found, model_class)

    def stored(self, path: str) -> str:
        """The name of a module in files."""
        flattened = self.model_class == FLATTENED and not path.startswith("text_model.")
        return f"text_model.{path}" if flattened else path

    def kohya(self, path: str) -> str:
        """The name that kohya's scripts give a module."""
        return f"{kohya_prefix(self.name)}_{self.stored(path).replace('.', '_')}"


def component_of(model_class: str) -> str | None:
    """The part of a pipeline that a model of this class is, where it is the same in all pipelines."""
    return next((component for part, component in _KINDS.items() if part in model_class), None)


def kohya_prefix(component: str) -> str:
    """`lora_unet`, `lora_te1`, `lora_te2` …"""
    encoder = component.removeprefix("text_encoder")
    return f"lora_te{encoder.strip('_') or 1}" if encoder != component else f"lora_{component}"
