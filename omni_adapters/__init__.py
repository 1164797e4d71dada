"""Give any nanochat-style GPT ears, without editing it. This file is an index and nothing else."""

from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.features import Features
from omni_adapters.lora import LoRALinear
from omni_adapters.model import OmniGPT
from omni_adapters.prepender import SoftTokenPrepender
from omni_adapters.projector import Projector

__version__ = "0.1.0"

__all__ = ["AudioEncoder", "Features", "LoRALinear", "OmniGPT", "Projector", "SoftTokenPrepender", "__version__"]
