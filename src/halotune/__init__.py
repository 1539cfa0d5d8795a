"""halotune: HRA, LoHa and Bone/BAT adapters, as cheap as LoRA, under PEFT's API and file formats.

The names are those of `halotune.api`, which needs torch: it is imported with the first of them that is asked for, so that
`halotune --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import *  # noqa: F403  (it has an __all__)
    from .api import __all__ as __all__
else:  # out of a type checker's sight, which would take any misspelt name for good

    def __getattr__(name):
        if name == "__all__" or not name.startswith("__"):  # the others are asked for by Python's own machinery
            api = import_module(".api", __name__)
            globals().update({public: getattr(api, public) for public in api.__all__}, __all__=api.__all__)
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *import_module(".api", __name__).__all__})
