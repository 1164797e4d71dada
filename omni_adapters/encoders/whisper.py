"""Whisper's encoder, frozen: 30 s of sound become 1500 frames of d_model channels at 50 Hz.

Notable:
- frozen from birth: no parameter asks for a gradient, `train()` of any parent leaves it in eval, and what comes out
  carries no autograd graph, yet may be saved by the graph that follows (`no_grad`, not `inference_mode`)
- only the encoder's tensors are read from the checkpoint; the decoder never enters memory
- the values are transformers' own, bit for bit: its feature extractor and its encoder do the work
- sound is padded with silence to 30 s, the only length transformers' encoder takes; `lens` counts what was sound

Whisper: Radford et al. 2022, arXiv:2212.04356.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omni_adapters.encoders.protocol import check_waveforms
from omni_adapters.encoders.weights import fetch_weights, weight_files
from omni_adapters.features import Features
from omni_adapters.shapes import BadInput, listing, shape

DEFAULT_ID = "openai/whisper-base"
REQUIRED_FILES = ("config.json", "preprocessor_config.json")
CONV_STRIDE = 2  # mel frames per encoder frame, the stride of the second convolution
WAYS_OUT = (
    "Ways out: pass a local directory with config.json, preprocessor_config.json and model.safetensors, "
    'WhisperEncoder("path/to/whisper"); name another model with WHISPER_HF_ID or WHISPER_MS_ID; point HF_ENDPOINT or '
    "MODELSCOPE_ENDPOINT at a mirror that answers, in the environment of the process."
)


class WhisperEncoder(nn.Module):
    """Waveforms → frozen Whisper features (B, 1500, d_model) at 50 Hz. An `AudioEncoder`.

    source: a directory with a Whisper checkpoint in safetensors; or `hf:owner/name` or `ms:owner/name`, a model on
            Hugging Face or ModelScope; or plain `owner/name`, on Hugging Face. Only that one place is tried.
            None: ModelScope's $WHISPER_MS_ID if that is set, then Hugging Face's $WHISPER_HF_ID, by default
            openai/whisper-base.
    device: where the weights live; None is the CPU.
    dtype:  of weights and features; None is float32, whatever the checkpoint holds. float16 overflows in some layers.

    Attributes: `source` says where the weights came from; `n_mels` and `d_model` are the checkpoint's.
    Raises WeightsUnavailable when no place has the weights, BadInput when what is there is no Whisper checkpoint.
    """

    def __init__(self, source: str | os.PathLike[str] | None = None, *, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        directory, self.source = fetch_weights("WhisperEncoder", candidates(source), REQUIRED_FILES, WAYS_OUT)
        self.encoder = load_encoder(directory, dtype or torch.float32).to(device or "cpu")
        self.extractor = load_extractor(directory, self.encoder.config)
        self.sampling_rate: int = self.extractor.sampling_rate                                  # Hz
        self.hop_length: int = self.extractor.hop_length                                        # samples per mel frame
        self.frame_rate: float = self.sampling_rate / (self.hop_length * CONV_STRIDE)           # Hz
        self.n_mels: int = self.encoder.config.num_mel_bins
        self.d_model: int = self.encoder.config.d_model
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> WhisperEncoder:
        """Stays in eval whatever a parent asks: dropout in a frozen encoder would only be noise on the features."""
        return super().train(False)

    def preprocess(self, waveforms: Sequence[Tensor | np.ndarray]) -> Features:
        """16 kHz mono clips of up to 30 s → values (B, n_mels, 3000) float32 on the CPU, lens (B,) in mel frames.

        A clip has ceil(samples / 160) of them. Raises BadInput for what `check_waveforms` refuses and for a clip over
        30 s, which is never cut unasked.
        """
        clips = check_waveforms("WhisperEncoder.preprocess", waveforms)
        limit = self.extractor.n_samples
        for number, clip in enumerate(clips):
            if len(clip) > limit:
                seconds, most = len(clip) / self.sampling_rate, limit / self.sampling_rate
                raise BadInput("WhisperEncoder.preprocess", f"clip {number} of {seconds:.2f} s ({len(clip)} samples)",
                               f"at most {most:g} s ({limit} samples)", "cut it into shorter clips")
        arrays = [clip.numpy() for clip in clips]
        mel = self.extractor(arrays, sampling_rate=self.sampling_rate, return_tensors="pt")["input_features"]
        return Features(mel, torch.tensor([-(-len(clip) // self.hop_length) for clip in clips], dtype=torch.int64))

    @torch.no_grad()
    def forward(self, inputs: Features) -> Features:
        """What `preprocess` returned, on any device → values (B, 1500, d_model), lens = ceil(mel frames / 2).

        Inputs move to the weights' device and dtype. Frames beyond lens are Whisper's view of the silent padding.
        """
        mel, lens = inputs
        frames = self.encoder.config.max_source_positions * CONV_STRIDE
        if mel.ndim != 3 or mel.shape[1:] != (self.n_mels, frames) or lens.shape != mel.shape[:1]:
            raise BadInput("WhisperEncoder", f"values {shape(mel.shape)} with lens {shape(lens.shape)}",
                           f"values {shape(['B', self.n_mels, frames])} with lens (B,)", "pass what preprocess returns")
        weight = self.encoder.conv1.weight
        values = self.encoder(mel.to(weight.device, weight.dtype)).last_hidden_state
        return Features(values, ((lens + CONV_STRIDE - 1) // CONV_STRIDE).to(values.device))


def candidates(source: str | os.PathLike[str] | None) -> list[str | Path]:
    """The places to try, in order, as `fetch_weights` writes them; the environment counts only when source is None."""
    if source is not None:
        return [source if isinstance(source, str) else Path(source)]
    places: list[str | Path] = [f"hf:{os.environ.get('WHISPER_HF_ID') or DEFAULT_ID}"]
    if os.environ.get("WHISPER_MS_ID"):
        places.insert(0, f"ms:{os.environ['WHISPER_MS_ID']}")
    return places


def load_encoder(directory: Path, dtype: torch.dtype) -> Any:
    """transformers' WhisperEncoder with the checkpoint's encoder tensors, cast to dtype, on the CPU.

    Names and shapes must match exactly: from_pretrained would fill a gap with random numbers and a warning.
    """
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Encoder

    found = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    if found != "whisper":
        raise BadInput("WhisperEncoder", f"a checkpoint of type {found!r} in {directory}", "model_type 'whisper'")
    config = WhisperConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):  # no time and no random numbers spent on weights that are replaced below
        encoder = Encoder(config)
    tensors = read_encoder_tensors(directory)
    check_names("WhisperEncoder", directory, encoder.state_dict(), tensors)
    # Copies: what safe_open returns is the mapped file itself, gone when somebody truncates it.
    encoder.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}, assign=True)
    return encoder


def read_encoder_tensors(directory: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors under `encoder.` (WhisperModel) or `model.encoder.` (with a language-model head)."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, a safetensors file is not a dict
                    name = key.removeprefix("model.")
                    if name.startswith("encoder."):
                        tensors[name.removeprefix("encoder.")] = file.get_tensor(key)
        except SafetensorError as error:
            raise BadInput("WhisperEncoder", f"{path}, which does not read ({error})", "a whole safetensors file",
                           "delete it and fetch it again") from error
    return tensors


def check_names(where: str, directory: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuse tensors that are missing, unknown, or of another shape than the config in the same directory implies."""
    wrong = [name for name, tensor in expected.items() if name not in found or found[name].shape != tensor.shape]
    wrong += [name for name in found if name not in expected]
    if wrong:
        raise BadInput(where, f"a checkpoint in {directory} that disagrees with its config on {listing(wrong)}",
                       f"the {len(expected)} encoder tensors of that config", "fetch the directory again, as a whole")


def load_extractor(directory: Path, config: Any) -> Any:
    """transformers' WhisperFeatureExtractor, refused unless it makes the mel shape this encoder takes."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
    makes = extractor.feature_size, extractor.nb_max_frames
    takes = config.num_mel_bins, config.max_source_positions * CONV_STRIDE
    if makes != takes:
        raise BadInput("WhisperEncoder", f"a preprocessor in {directory} for {makes[0]} mel bins × {makes[1]} frames",
                       f"{takes[0]} × {takes[1]}", "take both files from one checkpoint")
    return extractor
