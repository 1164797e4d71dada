"""Give any nanochat-style GPT ears, without editing it. This file is an index and nothing else.

Notable: a name is imported from its module when it is first asked for (PEP 562), so `import omni_adapters` costs nothing, and the
command line works, the doctor above all, where torch does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_adapters.encoders.protocol import AudioEncoder
    from omni_adapters.features import Features
    from omni_adapters.lora import LoRALinear
    from omni_adapters.model import OmniGPT
    from omni_adapters.prepender import SoftTokenPrepender
    from omni_adapters.projector import Projector

__version__ = "0.1.0"

__all__ = ["AudioEncoder", "Features", "LoRALinear", "OmniGPT", "Projector", "SoftTokenPrepender", "__version__"]

_HOMES = {"AudioEncoder": "encoders.protocol", "Features": "features", "LoRALinear": "lora", "OmniGPT": "model",
          "Projector": "projector", "SoftTokenPrepender": "prepender"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
