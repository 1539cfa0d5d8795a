"""Adapters in the models of a diffusers pipeline: UNet or transformer, text encoders, ControlNet.

    adapters = PipelineAdapters(pipe)
    adapters.add({"unet": HRAConfig(r=8), "text_encoder": LoHaConfig(r=4)}, name="dog")
    ...                                                     # train it: adapters.parameters()
    adapters.save("dog")
    adapters.load("style", name="style")
    adapters.set(["style", "dog"], weights=[0.7, 1.0])
    adapters.fuse()

An adapter's folder holds a folder in PEFT's format for each model, named as in the pipeline, and an index.
"""

from .index import INDEX_NAME
from .pipeline import PipelineAdapters

__all__ = ["INDEX_NAME", "PipelineAdapters"]
