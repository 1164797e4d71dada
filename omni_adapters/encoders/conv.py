"""A small convolutional encoder to train oneself: ears where none are at hand, or for sounds that pretrained ones never heard.

    encoder = ConvEncoder()                         # trains with training/acoustic.py; examples/texture.py shows how
    encoder.save("runs/ears")
    encoder = ConvEncoder.load("runs/ears")         # frozen, like any other; also open_encoder("runs/ears")

Notable:
- 25 Hz: two convolutions of stride 2, as speech recognisers subsample (Gulati et al. 2020, "Conformer"), then blocks of a
  depthwise convolution over time and two matmuls (Liu et al. 2022, "A ConvNet for the 2020s")
- what stands beyond a clip is zeroed wherever a convolution could see it, so that a clip alone and in a ragged batch are one
- normalised inputs are its own: the frontend's statistics are buffers that are saved with the weights
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapters.encoders.log_mel_pitch import LogMelPitchEncoder
from omni_adapters.encoders.pretrained import REQUIRED_FILES, Source, check_names, places, read_object, read_tensors
from omni_adapters.encoders.weights import fetch_weights
from omni_adapters.features import Features, features_to
from omni_adapters.files import json_bytes, write_whole
from omni_adapters.lora import keeping_dtype
from omni_adapters.projector_parts import zero_padding
from omni_adapters.shapes import BadInput

MODEL_TYPE = "omni_conv"  # in config.json
KERNEL = 5                # frames that a subsampling convolution sees
STRIDE = 2                # of each of the two: 100 Hz → 25 Hz
WAYS_OUT = "Ways out: pass a directory that ConvEncoder.save wrote, with its config.json, preprocessor_config.json and weights."


class ConvEncoder(nn.Module):
    """Waveforms → features (B, ⌈T / 4⌉, width) at 25 Hz. An `AudioEncoder`, with parameters that learn until they are frozen.

    width:      of the features, a positive number; of the first convolution's, three quarters.
    num_blocks: each sees `kernel` frames of 40 ms.
    kernel:     odd.

    Attributes: `source`, where it was loaded from or last saved to, None where it was neither; `d_model` = width. Raises BadInput
    for other sizes.
    """

    sampling_rate: int = LogMelPitchEncoder.sampling_rate
    frame_rate: float = LogMelPitchEncoder.frame_rate / STRIDE**2

    def __init__(self, width: int = 128, num_blocks: int = 4, kernel: int = 9) -> None:
        super().__init__()
        sizes = {"width": width, "num_blocks": num_blocks, "kernel": kernel}
        if not all(type(size) is int and size > 0 for size in sizes.values()) or kernel % 2 == 0:
            raise BadInput("ConvEncoder", ", ".join(f"{name} {size!r:.20}" for name, size in sizes.items()),
                           "positive numbers, an odd kernel")
        self.sizes, self.d_model = sizes, width
        self.source: str | None = None
        self.frontend = LogMelPitchEncoder()
        widths = self.frontend.d_model, 3 * width // 4 or 1, width
        self.subsample = nn.ModuleList(nn.Conv1d(*pair, KERNEL, STRIDE, KERNEL // 2) for pair in pairwise(widths))
        self.blocks = nn.ModuleList(Block(width, kernel) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvEncoder:
        """Casts leave the frontend's statistics in float32: they are of sound, which is."""
        return super()._apply(keeping_dtype(fn, (self.frontend.mean, self.frontend.std)), recurse)

    def preprocess(self, waveforms: Sequence[Tensor | np.ndarray]) -> Features:
        """16 kHz mono clips → what the frontend makes of them: values (B, 117, max T), lens (B,) in frames of 10 ms."""
        return self.frontend.preprocess(waveforms)

    def forward(self, inputs: Features) -> Features:
        """values (B, 117, T) → (B, ⌈T / 4⌉, width), lens → ⌈lens / 4⌉; features beyond lens mean nothing. Inputs move to the
        weights' device and dtype."""
        weight = self.norm.weight
        values, lens = zero_padding(self.frontend(features_to(inputs, weight.device)))
        values = values.to(weight.dtype)
        for number, conv in enumerate(self.subsample):
            values = conv((F.gelu(values) if number else values).transpose(1, 2)).transpose(1, 2)
            values, lens = zero_padding(Features(values, (lens + STRIDE - 1) // STRIDE))
        for block in self.blocks:
            values = zero_padding(Features(block(values), lens)).values
        return Features(self.norm(values), lens)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """config.json, preprocessor_config.json and model.safetensors, which `load` reads. The directory is made, and is the
        encoder's `source` from then on: save again what has been trained on."""
        from safetensors.torch import save

        folder = Path(directory).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        files = {"model.safetensors": save({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}),
                 "config.json": json_bytes({"model_type": MODEL_TYPE, **self.sizes}),
                 "preprocessor_config.json": json_bytes({"feature_extractor_type": type(self.frontend).__name__,
                                                         "sampling_rate": self.sampling_rate})}
        for name, content in files.items():
            write_whole("ConvEncoder.save", folder / name, content)
        self.source = str(folder)

    @classmethod
    def load(cls, source: Source, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ConvEncoder:
        """A frozen one, from a directory that `save` wrote, or wherever `fetch_weights` may look; `source` says where it was.

        Raises WeightsUnavailable when no place has it, BadInput when what is there is no such encoder.
        """
        directory, found = fetch_weights("ConvEncoder", places("ConvEncoder", source), REQUIRED_FILES, WAYS_OUT)
        config = read_object("ConvEncoder", directory / "config.json")
        if config.pop("model_type", None) != MODEL_TYPE or config.keys() - {"width", "num_blocks", "kernel"}:
            raise BadInput("ConvEncoder", f"{directory / 'config.json'} of something else",
                           f"model_type {MODEL_TYPE!r} and its sizes", "was it written by ConvEncoder.save? Then fetch it again")
        encoder = cls(**config)
        tensors = read_tensors("ConvEncoder", directory, lambda name: name)
        check_names("ConvEncoder", directory, encoder.state_dict(), tensors)
        encoder.load_state_dict(tensors)
        encoder.source = found
        return encoder.to(device or "cpu", dtype or torch.float32).requires_grad_(False).eval()


class Block(nn.Module):
    """x + W₂ GELU(W₁ norm(depthwise(x))), W₁ to twice the width: (B, T, width), zero beyond a clip."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(mixed))))
