"""Whisper's encoder, frozen: sound becomes frames of d_model channels at 50 Hz, 1500 for 30 s.

Notable:
- frozen from birth: no parameter asks for a gradient, `train()` of any parent leaves it in eval, and what comes out
  carries no autograd graph, yet may be saved by the graph that follows (`no_grad`, not `inference_mode`)
- only the encoder's tensors are read from the checkpoint; the decoder never enters memory
- context="full": the values are transformers' own, bit for bit: its feature extractor and its encoder do the work. Sound is
  padded with silence to 30 s, the only length transformers' encoder takes; `lens` counts what was sound
- context="clip": a clip is encoded as long as it is (`whisper_chunks`), at a fraction of the cost. Its features differ from
  those of "full", where every frame attends to the silence too: an adapter belongs to one of the two
- either way a clip's mel frames are the same: the waveform is padded with silence, never the mel
- sound over 30 s is cut every 30 s, each chunk encoded alone, as a clip of its own; "full" does so only when asked
- any hidden layer, or several side by side: layers above the highest one asked for are dropped, and cost nothing

Whisper: Radford et al. 2022, arXiv:2212.04356.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from omni_adapters.encoders import pretrained
from omni_adapters.encoders.pretrained import (
    REQUIRED_FILES,
    Layer,
    Source,
    check_names,
    copies,
    places,
    read_object,
    read_tensors,
    recorded_layers,
    refusing,
    selected_layers,
)
from omni_adapters.encoders.protocol import check_waveforms
from omni_adapters.encoders.weights import fetch_weights
from omni_adapters.encoders.whisper_chunks import CONV_STRIDE, Chunk, encode_batches, encode_clips, num_frames, plan, similar
from omni_adapters.features import Features
from omni_adapters.shapes import BadInput, shape

DEFAULT_ID = "openai/whisper-base"
EDGE_HOPS = 2  # of silence after a clip: frames reach 200 samples beyond the last one, as they do where 30 s are padded
WAYS_OUT = f"{pretrained.WAYS_OUT} Without a source, WHISPER_MS_ID, WHISPER_HF_ID and WHISPER_DIR name the places."

Context = Literal["full", "clip"]
Long = Literal["refuse", "chunk"]
DEFAULT_LONG: dict[Context, Long] = {"full": "refuse", "clip": "chunk"}
SETTINGS = ("context", "long", "layer")  # arguments that decide the features, and which clips have any


class WhisperEncoder(nn.Module):
    """Waveforms → frozen Whisper features (B, T, d_model) at 50 Hz, T = 1500 for context="full". An `AudioEncoder`.

    source:  a directory with a Whisper checkpoint in safetensors; or `hf:owner/name` or `ms:owner/name`, a model on
             Hugging Face or ModelScope; or plain `owner/name`, on Hugging Face. Or several of these, tried in order, under
             one deadline (docs/weights.md). None: ModelScope's $WHISPER_MS_ID if that is set, then Hugging Face's $WHISPER_HF_ID,
             by default openai/whisper-base, then the directory $WHISPER_DIR if that is set.
    device:  where the weights live; None is the CPU.
    dtype:   of weights and features; None is float32, whatever the checkpoint holds. float16 overflows in some layers.
    context: what a frame attends to. "full": 30 s, the clip and silence, as Whisper was trained. "clip": the clip alone; a
             clip costs what it is long, and is the same in any batch but for float rounding.
    long:    what becomes of a clip over 30 s. "refuse": BadInput. "chunk": it is cut every 30 s, the chunks are encoded
             apart, and their frames stand in one row, in order, nothing dropped. None is "refuse" for "full", "chunk" for
             "clip".
    max_chunks: chunks of 30 s encoded at once, padding included, for "clip" and for what is cut: it bounds memory.
    layer:   which hidden states the features are, numbered as transformers' `hidden_states`: 0 is what the convolutions and
             positions make, i what the i-th layer returns, and the last one of them is normed by the encoder's final norm, so it
             is the last hidden state. Negative numbers count from the end. None: the last hidden state. Several, or "all",
             stand side by side in the width, first the channels of the first one asked for.

    Attributes: `source` says where the weights came from, of several places the one that had them; `n_mels` and `width` (of one
    layer) are the checkpoint's; `num_layers` counts the layers that the features hold, `d_model` = num_layers · width.
    Raises WeightsUnavailable when no place has the weights, BadInput when what is there is no Whisper checkpoint.
    """

    def __init__(self, source: Source | None = None, *, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None, context: Context = "full", long: Long | None = None,
                 max_chunks: int = 16, layer: Layer = None) -> None:
        super().__init__()
        check_settings(context, long, max_chunks)
        self.context: Context = context
        self.long: Long = long or DEFAULT_LONG[context]
        self.max_chunks = max_chunks
        directory, self.source = fetch_weights("WhisperEncoder", candidates(source), REQUIRED_FILES, WAYS_OUT)
        encoder = load_encoder(directory, dtype or torch.float32)
        self.num_hidden_layers: int = encoder.config.encoder_layers
        self.layers = selected_layers("WhisperEncoder", layer, self.num_hidden_layers)
        if self.layers is not None:
            encoder.layers = encoder.layers[:max(self.layers)]
        self.encoder = encoder.to(device or "cpu")
        self.extractor = load_extractor(directory, self.encoder.config)
        self.sampling_rate: int = self.extractor.sampling_rate                                  # Hz
        self.hop_length: int = self.extractor.hop_length                                        # samples per mel frame
        self.frame_rate: float = self.sampling_rate / (self.hop_length * CONV_STRIDE)           # Hz
        self.n_mels: int = self.encoder.config.num_mel_bins
        self.width: int = self.encoder.config.d_model
        self.num_layers: int = len(self.layers or (-1,))
        self.d_model: int = self.num_layers * self.width
        self.chunk_frames: int = self.encoder.config.max_source_positions * CONV_STRIDE         # mel frames in 30 s
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> WhisperEncoder:
        """Stays in eval whatever a parent asks: dropout in a frozen encoder would only be noise on the features."""
        return super().train(False)

    def settings(self) -> dict[str, Any]:
        """`context`, `long` and `layer` where they are not the defaults: what an adapter or a shard says of them."""
        named = {name: value for name, value, default in (("context", self.context, "full"),
                                                          ("long", self.long, DEFAULT_LONG[self.context])) if value != default}
        return named | recorded_layers(self.layers, self.num_hidden_layers)

    def preprocess(self, waveforms: Sequence[Tensor | np.ndarray]) -> Features:
        """16 kHz mono clips → values (B, n_mels, T_mel) float32 on the CPU, lens (B,) = ceil(samples / 160) in mel frames.

        T_mel is the longest clip's; for context="full" 3000, or the multiple of it that holds the longest. A clip over 30 s
        is its chunks' mel frames one after the other, each normalised by its own loudest cell, as a clip is. Beyond a
        clip (for "full", beyond its last chunk) values are 0 and not looked at.

        Raises BadInput for what `check_waveforms` refuses and, with long="refuse", for a clip over 30 s, which is never cut
        unasked.
        """
        clips = check_waveforms("WhisperEncoder.preprocess", waveforms)
        limit = self.extractor.n_samples
        if self.long == "refuse":
            self.check_lengths(clips)
        lens = torch.tensor([-(-len(clip) // self.hop_length) for clip in clips], dtype=torch.int64)
        if self.context == "full" and max(len(clip) for clip in clips) <= limit:
            return Features(self.mel([clip.numpy() for clip in clips], padding="max_length"), lens)
        mels = [torch.cat([self.chunk_mel(chunk.numpy()) for chunk in clip.split(limit)], dim=1) for clip in clips]
        values = torch.zeros(len(mels), self.n_mels, max(mel.size(1) for mel in mels))
        for row, mel in zip(values, mels):
            row[:, :mel.size(1)] = mel
        return Features(values, lens)

    def check_lengths(self, clips: Sequence[Tensor]) -> None:
        limit = self.extractor.n_samples
        for number, clip in enumerate(clips):
            if len(clip) > limit:
                seconds, most = len(clip) / self.sampling_rate, limit / self.sampling_rate
                raise BadInput("WhisperEncoder.preprocess", f"clip {number} of {seconds:.2f} s ({len(clip)} samples)",
                               f"at most {most:g} s ({limit} samples)", 'cut it into shorter clips, or let long="chunk" do so')

    def chunk_mel(self, samples: np.ndarray) -> Tensor:
        """(samples,) of at most 30 s → mel (n_mels, T): of ceil(samples / 160) frames, or of 3000 for context="full".

        The clip is followed by silence as far as its frames, or those next to them, see: so they and their loudest cell are
        those of the clip padded to 30 s.
        """
        if self.context == "full":
            return self.mel([samples], padding="max_length")[0]
        frames = -(-len(samples) // self.hop_length)
        whole = min((frames + EDGE_HOPS) * self.hop_length, self.extractor.n_samples)
        return self.mel([np.pad(samples, (0, whole - len(samples)))], padding="longest")[0, :, :frames]

    def mel(self, arrays: list[np.ndarray], padding: str) -> Tensor:
        """transformers' feature extractor: arrays (samples,) → (B, n_mels, T_mel)."""
        made = self.extractor(arrays, sampling_rate=self.sampling_rate, padding=padding, return_tensors="pt")
        values: Tensor = made["input_features"]
        return values

    @torch.no_grad()
    def forward(self, inputs: Features) -> Features:
        """What `preprocess` returned, on any device → values (B, ceil(T_mel / 2), d_model), lens = ceil(mel frames / 2).

        Inputs move to the weights' device and dtype. Frames beyond lens are 0, or, for context="full", Whisper's view of the
        silent padding. What is cut or masked by `lens` reads them as integers: keep them on the CPU to spare CUDA a wait.
        Lens beyond the tensor are BadInput; for context="full" only lens on the CPU are looked at.
        """
        mel, lens = inputs
        self.check_mel(mel, lens)
        weight = self.encoder.conv1.weight
        mel = mel.to(weight.device, weight.dtype)
        if self.context == "full" and mel.size(2) == self.chunk_frames:
            if lens.device.type == "cpu" and not torch.compiler.is_compiling():
                read_lens(mel, lens)
            values = self.encode_full(mel)
        else:
            values = self.encode(mel, plan(read_lens(mel, lens), self.chunk_frames))
        return Features(values, num_frames(lens).to(values.device))

    def encode(self, mel: Tensor, chunks: list[Chunk]) -> Tensor:
        """Chunks of mel (B, n_mels, T_mel), at most `max_chunks` times 30 s at once → (B, ceil(T_mel / 2), d_model)."""
        if self.context == "clip":
            batches = similar(chunks, self.max_chunks * self.chunk_frames)
            return encode_batches(mel, batches, self.d_model,
                                  lambda cut, lens: encode_clips(self.encoder, cut, lens, self.layers))
        batches = [chunks[start:start + self.max_chunks] for start in range(0, len(chunks), self.max_chunks)]
        return encode_batches(mel, batches, self.d_model, lambda cut, lens: self.encode_full(cut), width=self.chunk_frames)

    def encode_full(self, mel: Tensor) -> Tensor:
        """mel (B, n_mels, 3000) → (B, 1500, d_model), every frame attending to all 30 s."""
        if self.layers is not None:
            return encode_clips(self.encoder, mel, [mel.size(2)] * mel.size(0), self.layers)
        values: Tensor = self.encoder(mel).last_hidden_state
        return values

    def check_mel(self, mel: Tensor, lens: Tensor) -> None:
        frames = self.chunk_frames
        fits, wanted = mel.ndim == 3 and mel.size(2) == frames, str(frames)
        if self.context == "clip":
            fits, wanted = mel.ndim == 3 and mel.size(2) > 0, "T_mel"
        elif self.long == "chunk":
            fits, wanted = mel.ndim == 3 and mel.size(2) > 0 and mel.size(2) % frames == 0, f"a multiple of {frames}"
        if not fits or mel.size(1) != self.n_mels or lens.shape != mel.shape[:1]:
            raise BadInput("WhisperEncoder", f"values {shape(mel.shape)} with lens {shape(lens.shape)}",
                           f"values {shape(['B', self.n_mels, wanted])} with lens (B,)", "pass what preprocess returns")


def check_settings(context: object, long: object, max_chunks: object) -> None:
    if context not in get_args(Context):
        raise BadInput("WhisperEncoder", f"context {context!r:.40}", "'full' or 'clip'")
    if long is not None and long not in get_args(Long):
        raise BadInput("WhisperEncoder", f"long {long!r:.40}", "'refuse', 'chunk' or None")
    if isinstance(max_chunks, bool) or not isinstance(max_chunks, int) or max_chunks < 1:
        raise BadInput("WhisperEncoder", f"max_chunks {max_chunks!r:.40}", "an integer ≥ 1")


def read_lens(mel: Tensor, lens: Tensor) -> list[int]:
    """The lengths as integers, refused where they lie outside the tensor."""
    found = [int(length) for length in lens.tolist()]
    for row, length in enumerate(found):
        if not 0 <= length <= mel.size(2):
            raise BadInput("WhisperEncoder", f"lens[{row}] = {length} for values {shape(mel.shape)}", f"0 ≤ lens ≤ {mel.size(2)}",
                           "lens count mel frames, as preprocess does")
    return found


def candidates(source: Source | None) -> list[str | Path]:
    """The places to try, in order, as `fetch_weights` takes them; the environment counts only when source is None."""
    if source is not None:
        return places("WhisperEncoder", source)
    said = {name: os.environ.get(f"WHISPER_{name}") for name in ("MS_ID", "HF_ID", "DIR")}
    return [*([f"ms:{said['MS_ID']}"] if said["MS_ID"] else []), f"hf:{said['HF_ID'] or DEFAULT_ID}",
            *([Path(said["DIR"])] if said["DIR"] else [])]


def load_encoder(directory: Path, dtype: torch.dtype) -> Any:
    """transformers' WhisperEncoder with the checkpoint's encoder tensors, cast to dtype, on the CPU.

    Names and shapes must match exactly.
    """
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Encoder

    found = read_object("WhisperEncoder", directory / "config.json").get("model_type")
    if found != "whisper":
        raise BadInput("WhisperEncoder", f"a checkpoint of type {found!r} in {directory}", "model_type 'whisper'")
    with refusing("WhisperEncoder", directory / "config.json"), torch.device("meta"):  # weights replaced below cost no time
        config = WhisperConfig.from_pretrained(directory, local_files_only=True)
        encoder = Encoder(config)
    tensors = read_tensors("WhisperEncoder", directory, encoder_name)
    check_names("WhisperEncoder", directory, encoder.state_dict(), tensors)
    encoder.load_state_dict(copies(tensors, dtype), assign=True)
    return encoder


def encoder_name(key: str) -> str | None:
    """Encoder tensors stand under `encoder.` (WhisperModel) or `model.encoder.` (with a language-model head)."""
    name = key.removeprefix("model.")
    return name.removeprefix("encoder.") if name.startswith("encoder.") else None


def load_extractor(directory: Path, config: Any) -> Any:
    """transformers' WhisperFeatureExtractor, refused unless it makes the mel shape this encoder takes."""
    from transformers import WhisperFeatureExtractor

    path = directory / "preprocessor_config.json"
    read_object("WhisperEncoder", path)
    with refusing("WhisperEncoder", path):
        extractor = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
        makes = extractor.feature_size, extractor.nb_max_frames
    takes = config.num_mel_bins, config.max_source_positions * CONV_STRIDE
    if makes != takes:
        raise BadInput("WhisperEncoder", f"a preprocessor in {directory} for {makes[0]} mel bins × {makes[1]} frames",
                       f"{takes[0]} × {takes[1]}", "take both files from one checkpoint")
    return extractor
