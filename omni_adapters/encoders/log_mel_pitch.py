"""Log-mel frames beside a pitchgram: what a mel band is too wide to tell, how high a voice is at each moment.

Notable:
- at 1 kHz a mel band is as wide as a low voice's harmonics are apart, so that pitch, melody and voicing are hardly in log-mel
  frames; speech recognisers of tone languages have long had a pitch beside them (Ghahremani et al. 2014, "A pitch extraction
  algorithm tuned for automatic speech recognition")
- no pitch is decided on: the whole curve is given, how well each height would do, and a projector may read a glide, a voice over
  another, or none at all out of it
- compressed spectra sharpen the peaks and make them depend less on vowels (Tolonen and Karjalainen 2000, "A computationally
  efficient multipitch analysis model"); dividing by the sum makes the curve blind to loudness
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapters.encoders.log_mel import HOP_LENGTH, N_MELS, SAMPLING_RATE, LogMelEncoder, log_mel, num_mel_frames

WINDOW = 640                 # samples, 40 ms: three periods of a voice at 75 Hz
N_FFT = 1024                 # bins 15.6 Hz apart
TOP = 2000.0                 # Hz: harmonics above are rough even in a clear voice
LOWEST, OCTAVES = 60.0, 3    # Hz; the heights of speech, 60 to 480 Hz
N_HEIGHTS = 12 * OCTAVES + 1  # a semitone apart
COMPRESSION = 2 / 3          # magnitudes to this power
SILENT = 1e-3                # a sum of compressed magnitudes that digital silence alone stays below


class LogMelPitchEncoder(LogMelEncoder):
    """Waveforms → log-mel frames and pitchgram (B, T, 80 + 37) at 100 Hz, normalised per band as a `LogMelEncoder`'s are."""

    d_model: int = N_MELS + N_HEIGHTS

    def frames(self, samples: Tensor) -> Tensor:
        return torch.cat([log_mel(samples), pitchgram(samples)])


def pitchgram(samples: Tensor) -> Tensor:
    """(samples,) float32 at 16 kHz → (37, ceil(samples / 160)) float32 in [−1, 1]: how like the sound around each hop is to
    itself a period later, for periods of 60 Hz to 480 Hz, a semitone apart.

        r[h] = Σ_f |X_f|^(2/3) cos(2π f / h) / Σ_f |X_f|^(2/3),  f from 15.6 to 2000 Hz

    A voice at 120 Hz has its peak at h = 120, and lower ones at 60 and below; noise stays near 0, digital silence is 0. A
    microphone's offset looks like a high voice where nobody speaks. Taking a clip's mean away would only move that: silence
    would then have the offset.
    """
    frames = num_mel_frames(samples.numel())
    whole = F.pad(samples, (0, max(frames, N_FFT // 2 // HOP_LENGTH + 1) * HOP_LENGTH - samples.numel()))
    window = torch.hann_window(WINDOW, dtype=samples.dtype, device=samples.device)
    spectrum = torch.stft(whole, N_FFT, HOP_LENGTH, WINDOW, window, pad_mode="reflect", return_complex=True)
    waves = cosines().to(samples)
    magnitudes = spectrum[1 : 1 + waves.size(1), :frames].abs().pow(COMPRESSION)  # (bins, T)
    return (waves @ magnitudes) / magnitudes.sum(dim=0).clamp_min(SILENT)


@lru_cache(maxsize=1)
def cosines() -> Tensor:
    """(37, 128) float32: cos(2π f / h) for heights h and the FFT's frequencies f, without the one of 0 Hz."""
    heights = LOWEST * 2 ** (torch.arange(N_HEIGHTS, dtype=torch.float64) / 12)  # Hz
    frequencies = torch.arange(1, round(TOP * N_FFT / SAMPLING_RATE) + 1, dtype=torch.float64) * SAMPLING_RATE / N_FFT
    return torch.cos(2 * torch.pi * frequencies / heights.unsqueeze(1)).float()
