"""What the house expects of an encoder, and of the waveforms that go into one.

Notable:
- a protocol, so that any object with these names will do; nothing has to be inherited
- `check_waveforms` is the one gate for sound: every encoder's `preprocess` starts with it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from omni_adapters.features import Features
from omni_adapters.shapes import BadInput, shape


@runtime_checkable
class Encoder(Protocol):
    """A frozen encoder of any signal: what every sense needs of one.

    d_model: width of one feature frame (of a patch, where it sees).
    """

    d_model: int

    def preprocess(self, signals: Sequence[Any], /) -> Features:
        """Signals as they come (waveforms, images) → encoder inputs, one row each."""
        ...

    def __call__(self, inputs: Features, /) -> Features:
        """Encoder inputs → values (B, T_enc, d_model), lens in feature frames."""
        ...


@runtime_checkable
class AudioEncoder(Encoder, Protocol):
    """A frozen encoder of sound.

    sampling_rate: Hz the waveforms must have.
    d_model:       width of one feature frame.
    frame_rate:    feature frames per second.
    """

    sampling_rate: int
    d_model: int
    frame_rate: float

    def preprocess(self, waveforms: Sequence[Tensor | np.ndarray], /) -> Features:
        """1-D float mono waveforms → encoder inputs; for mel models values (B, n_mels, T_mel), lens in mel frames."""
        ...

    def __call__(self, inputs: Features, /) -> Features:
        """Encoder inputs → values (B, T_enc, d_model), lens in feature frames."""
        ...


def check_waveforms(where: str, waveforms: Sequence[Tensor | np.ndarray]) -> list[Tensor]:
    """A list of clips → the same clips as detached float32 CPU tensors (samples,), one copy each at most.

    BadInput, naming the clip, unless every clip is a 1-D floating-point tensor or array with at least one sample and
    no NaN or infinity. What `where` says opens the message.
    """
    if isinstance(waveforms, (Tensor, np.ndarray)):
        raise BadInput(where, f"one {type(waveforms).__name__} of shape {shape(waveforms.shape)}",
                       "a list of 1-D mono waveforms", "wrap a single clip: preprocess([waveform])")
    if not len(waveforms):
        raise BadInput(where, "no waveforms", "at least one 1-D mono waveform")
    return [_check_waveform(where, number, waveform) for number, waveform in enumerate(waveforms)]


def _check_waveform(where: str, number: int, waveform: Tensor | np.ndarray) -> Tensor:
    if not isinstance(waveform, (Tensor, np.ndarray)):
        raise BadInput(where, f"clip {number} of type {type(waveform).__name__}", "a tensor or a numpy array")
    if waveform.ndim != 1:
        raise BadInput(where, f"clip {number} of shape {shape(waveform.shape)}", "mono sound of shape (samples,)",
                       "average the channels, or pick one")
    floating = waveform.is_floating_point() if isinstance(waveform, Tensor) else waveform.dtype.kind == "f"
    if not floating:
        raise BadInput(where, f"clip {number} of {waveform.dtype}", "floating-point samples within ±1",
                       "divide int16 samples by 32768")
    if not len(waveform):
        raise BadInput(where, f"clip {number} without samples", "at least one sample", "drop empty clips")
    if isinstance(waveform, np.ndarray):
        # A copy: torch shares neither negative strides nor foreign byte order, and warns about read-only arrays.
        with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused below
            waveform = torch.from_numpy(np.array(waveform, dtype=np.float32))
    samples = waveform.detach().to("cpu", torch.float32)
    if not samples.isfinite().all():
        raise BadInput(where, f"NaN or infinity in clip {number}", "finite samples", "look at how the clip was decoded")
    return samples
