"""halotune: HRA, LoHa and Bone/BAT adapters, as cheap as LoRA, under PEFT's API and file formats.

`__all__` has the names of `halotune.api` and the methods' configurations; those of `halotune.compat` and the methods' model
classes (`HRAModel` …) can be imported as well. They need torch, which is imported with the first of them that is asked for,
so that `halotune --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import *  # noqa: F403
    from .compat import *  # noqa: F403
    from .methods import *  # noqa: F403  (the configurations)
else:  # out of a type checker's sight, which would take any misspelt name for good

    def _public():
        api, others = vars(import_module(".api", __name__)), vars(import_module(".compat", __name__))
        methods = import_module(".methods.registry", __name__).methods()
        front = {k: v for k, v in api.items() if k[0] != "_"} | {m.config.__name__: m.config for m in methods}
        return {"__all__": sorted(front), **front, **{k: v for k, v in others.items() if k[0] != "_"}}

    def __getattr__(name):
        if name == "__all__" or not name.startswith("_"):  # the others are asked for by Python's own machinery
            globals().update(_public())
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *_public()})
