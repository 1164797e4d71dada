"""What the house expects of an encoder: a protocol, so that any object with these names will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from omni_adapters.features import Features


@runtime_checkable
class AudioEncoder(Protocol):
    """A frozen encoder of sound.

    sampling_rate: Hz the waveforms must have.
    d_model:       width of one feature frame.
    frame_rate:    feature frames per second.
    """

    sampling_rate: int
    d_model: int
    frame_rate: float

    def preprocess(self, waveforms: Sequence[Tensor | np.ndarray]) -> Features:
        """1-D float mono waveforms → encoder inputs; for mel models values (B, n_mels, T_mel), lens in mel frames."""
        ...

    def __call__(self, inputs: Features) -> Features:
        """Encoder inputs → values (B, T_enc, d_model), lens in feature frames."""
        ...
