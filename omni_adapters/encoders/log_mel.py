"""Log-mel frames as features: an encoder without weights, so that an alignment can be shown on a laptop.

Notable:
- Whisper's recipe (github.com/openai/whisper, whisper/audio.py): 25 ms Hann windows every 10 ms, 80 slaney mel bands
  up to 8 kHz, log10, at most 80 dB below the clip's loudest cell, then (x + 4) / 4
- a clip is framed alone: what shares its batch cannot touch it, to the last bit
- silence is appended to the waveform, never to the mel: 0 in log-mel is loud
- mean and std per band are buffers with identity defaults, so a checkpoint with or without statistics has the same keys
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapters.encoders.protocol import check_waveforms
from omni_adapters.features import Features, check_values, pad_rows, valid_steps
from omni_adapters.shapes import BadInput, shape

SAMPLING_RATE = 16_000    # Hz
N_FFT = 400               # samples in a window, 25 ms
HOP_LENGTH = 160          # samples from one frame to the next, 10 ms
N_MELS = 80
POWER_FLOOR = 1e-10       # of a mel cell, before the logarithm
DYNAMIC_RANGE = 8.0       # in log10 of power: cells more than 80 dB below the loudest are raised to there
MIN_STD = 0.05            # 2 dB: a band that stood still in training must not be magnified without bound in use


def num_mel_frames(num_samples: int) -> int:
    """ceil(samples / HOP_LENGTH): the frames whose hop holds at least one sample of the clip."""
    return -(-num_samples // HOP_LENGTH)


class LogMelEncoder(nn.Module):
    """Waveforms → log-mel frames (B, T, 80) at 100 Hz, normalised per band once `fit_statistics` has run.

        values = (log_mel.transpose(1, 2) − mean) / std

    mean, std: (80,) per mel band, in log-mel units of 40 dB; 0 and 1 leave the frames as they are. Both are persistent
    buffers. There are no parameters, hence nothing to freeze. An `AudioEncoder`.

    Another kind of frame, (d_model, T) of a clip, is a subclass with its own `d_model` and `frames`.
    """

    sampling_rate: int = SAMPLING_RATE
    n_mels: int = N_MELS
    d_model: int = N_MELS
    frame_rate: float = SAMPLING_RATE / HOP_LENGTH
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | Sequence[float] | None = None,
                 std: Tensor | Sequence[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", self._statistic("mean", mean, default=0.0))
        self.register_buffer("std", self._statistic("std", std, default=1.0))
        if std is not None and not (self.std > 0).all():
            raise BadInput(type(self).__name__, f"std down to {float(self.std.min())}", "positive values",
                           "fit_statistics never sets less than MIN_STD")

    def preprocess(self, waveforms: Sequence[Tensor | np.ndarray]) -> Features:
        """16 kHz mono clips → values (B, d_model, max T_mel) float32 on the CPU, lens (B,) = ceil(samples / 160).

        Beyond a clip's length values are 0. Raises BadInput for what `check_waveforms` refuses.
        """
        clips = check_waveforms(f"{type(self).__name__}.preprocess", waveforms)
        frames = pad_rows([self.frames(clip).T for clip in clips])
        return Features(frames.values.transpose(1, 2).contiguous(), frames.lens)

    def frames(self, samples: Tensor) -> Tensor:
        """(samples,) float32 at 16 kHz → (d_model, ceil(samples / 160)) float32."""
        return log_mel(samples)

    def forward(self, inputs: Features) -> Features:
        """values (B, d_model, T_mel) → (B, T_mel, d_model), normalised, beside the same lens; frames beyond lens mean nothing."""
        self._check_frames(type(self).__name__, inputs)
        return Features((inputs.values.transpose(1, 2).contiguous() - self.mean) / self.std, inputs.lens)

    @torch.no_grad()
    def fit_statistics(self, inputs: Features | Iterable[Features]) -> None:
        """Set mean and std from what `preprocess` returned for training clips, over valid frames only.

        Several batches count as one; only one of them is in memory at a time (merged as Chan, Golub and LeVeque 1979 do).
        The std is the population's, at least MIN_STD. Raises BadInput, and changes nothing, when no frame is valid or
        one is not finite.
        """
        where = f"{type(self).__name__}.fit_statistics"
        count, mean, squares = 0, torch.zeros(self.d_model, dtype=torch.float64), torch.zeros(self.d_model, dtype=torch.float64)
        for batch in [inputs] if isinstance(inputs, Features) else inputs:
            self._check_frames(where, batch)
            rows = Features(batch.values.transpose(1, 2), batch.lens)
            if not sum(check_values(where, rows)):
                continue
            frames = rows.values[valid_steps(rows)].double().cpu()  # (frames, d_model)
            apart, share = frames.mean(dim=0) - mean, len(frames) / (count + len(frames))
            squares += (frames - frames.mean(dim=0)).square().sum(dim=0) + apart.square() * count * share
            mean += apart * share
            count += len(frames)
        if not count:
            raise BadInput(where, "features without one valid frame", "training clips")
        self.mean.copy_(mean)
        self.std.copy_((squares / count).sqrt().clamp_min(MIN_STD))

    def _statistic(self, name: str, values: Tensor | Sequence[float] | None, default: float) -> Tensor:
        """(d_model,) float32 of its own storage, filled with `default` when nothing was given."""
        if values is None:
            return torch.full((self.d_model,), default)
        statistic = torch.as_tensor(values, dtype=torch.float32).detach().clone()
        if statistic.shape != (self.d_model,) or not statistic.isfinite().all():
            raise BadInput(type(self).__name__, f"{name} of shape {shape(statistic.shape)}", f"{self.d_model} finite numbers",
                           "one per band")
        return statistic

    def _check_frames(self, where: str, inputs: Features) -> None:
        values, lens = inputs
        if values.ndim != 3 or values.size(1) != self.d_model or not values.is_floating_point():
            raise BadInput(where, f"values {shape(values.shape)} of {values.dtype}",
                           f"mel frames {shape(['B', self.d_model, 'T_mel'])}", "pass what preprocess returns")
        if lens.shape != values.shape[:1]:
            raise BadInput(where, f"lens {shape(lens.shape)} for {values.size(0)} clips", "one length per clip")


def log_mel(samples: Tensor) -> Tensor:
    """(samples,) float32 at 16 kHz → (80, ceil(samples / 160)) float32, Whisper's recipe.

    Each frame is centred on the first sample of its hop. The clip is padded with zeros to whole hops, to two of them at
    least, because the reflection at its edges reads N_FFT / 2 samples; the surplus frames are dropped.
    """
    frames = num_mel_frames(samples.numel())
    whole = F.pad(samples, (0, max(frames, 2) * HOP_LENGTH - samples.numel()))
    window = torch.hann_window(N_FFT, dtype=samples.dtype, device=samples.device)
    spectrum = torch.stft(whole, N_FFT, HOP_LENGTH, window=window, pad_mode="reflect", return_complex=True)
    power = spectrum[:, :frames].abs().square()  # (n_fft / 2 + 1, T_mel)
    log_power = (mel_filters() @ power).clamp_min(POWER_FLOOR).log10()
    return (log_power.clamp_min(log_power.max() - DYNAMIC_RANGE) + 4) / 4


@lru_cache(maxsize=1)
def mel_filters() -> Tensor:
    """(80, 201) float32: triangles over the FFT bins, evenly spaced on the slaney mel scale, each of unit area in Hz.

    The scale (M. Slaney, Auditory Toolbox, 1998) is linear below 1 kHz, 200/3 Hz a mel, and logarithmic above, 27 mels
    for a factor of 6.4.
    """
    top = 15 + 27 * np.log(SAMPLING_RATE / 2 / 1000) / np.log(6.4)  # mels at 8 kHz
    mels = np.linspace(0, top, N_MELS + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))  # Hz
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hertz = np.arange(N_FFT // 2 + 1) * SAMPLING_RATE / N_FFT
    triangles = np.minimum((hertz - low) / (centre - low), (high - hertz) / (high - centre)).clip(min=0)
    return torch.from_numpy(triangles * 2 / (high - low)).float()
