"""wav2vec2, HuBERT, WavLM and w2v-BERT 2.0, frozen: sound becomes frames at 50 Hz, the last hidden state or any other.

    waveforms ─normalise each clip─► (B, 1, samples) ─convolutions─► projection ─layers, masked─► values (B, T_enc, d_model)
    w2v-BERT:  ─filter bank, normalised─► (B, 160, T)                ─projection ─layers, masked─►

Notable:
- transformers' own modules do the work, and one clip alone comes out as from transformers' model, bit for bit
- a clip beside others comes out as it does alone, but for float rounding. What would see the padding never gets to: group norm
  behind the first convolution takes its statistics over the whole clip, so clips of unlike length pass the convolutions apart,
  which is why those checkpoints were trained without an attention mask; layers mask what is padded. Adapter layers and batch
  norm before the positional convolution read across a clip's end: with them only clips of one length share a batch
- frozen as WhisperEncoder is; SpecAugment, dropout and layerdrop never run, and the SpecAugment vector is not even loaded
- heads of CTC and pretraining checkpoints are not read; tensors of the encoder that are missing or unknown are refused
- a hidden layer is recorded here, not asked of transformers, whose releases differ in what they call the last one
- attention costs the square of the length and these models know no 30 s: `max_seconds` refuses longer clips, nothing is cut

wav2vec 2.0: Baevski et al. 2020, arXiv:2006.11477. HuBERT: Hsu et al. 2021, arXiv:2106.07447. WavLM: Chen et al. 2021,
arXiv:2110.13900. w2v-BERT 2.0: Seamless Communication 2023, arXiv:2312.05187.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapters.encoders.pretrained import (
    REQUIRED_FILES,
    WAYS_OUT,
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
    side_by_side,
)
from omni_adapters.encoders.protocol import check_waveforms
from omni_adapters.encoders.weights import fetch_weights
from omni_adapters.encoders.whisper_chunks import Chunk, similar
from omni_adapters.features import Features, pad_rows, valid_steps
from omni_adapters.shapes import BadInput, shape

SETTINGS = ("layer", "max_seconds")  # arguments that decide the features, and which clips have any
MAX_SECONDS = 60.0
WINDOW, HOP = 400, 160  # samples, of w2v-BERT's filter bank, which its extractor does not name


class Family(NamedTuple):
    """Names of transformers' classes."""

    model: str
    config: str
    extractor: str


FAMILIES = {  # by the model_type of config.json
    "wav2vec2": Family("Wav2Vec2Model", "Wav2Vec2Config", "Wav2Vec2FeatureExtractor"),
    "hubert": Family("HubertModel", "HubertConfig", "Wav2Vec2FeatureExtractor"),
    "wavlm": Family("WavLMModel", "WavLMConfig", "Wav2Vec2FeatureExtractor"),
    "wav2vec2-bert": Family("Wav2Vec2BertModel", "Wav2Vec2BertConfig", "SeamlessM4TFeatureExtractor"),
}


class Conv(NamedTuple):
    """What a convolution does to lengths."""

    kernel: int
    stride: int
    padding: int

    def frames(self, steps: int) -> int:
        return max((steps + 2 * self.padding - self.kernel) // self.stride + 1, 0)

    def steps(self, frames: int) -> int:
        """The fewest steps, one at least, that make so many frames."""
        return max((frames - 1) * self.stride + self.kernel - 2 * self.padding, 1)


class HFSpeechEncoder(nn.Module):
    """Waveforms → frozen features (B, T_enc, d_model) of a self-supervised speech model, at 50 Hz. An `AudioEncoder`.

    source:  a directory with a checkpoint in safetensors, of a model_type in `FAMILIES`; or `hf:owner/name` or `ms:owner/name`,
             a model on Hugging Face or ModelScope; or plain `owner/name`, on Hugging Face. Or several of these, tried in order,
             under one deadline (docs/weights.md).
    layer:   which hidden states the features are. 0 enters the first layer, i leaves the i-th; negative numbers count from the
             end; several, or "all", stand side by side in the width. None: the last hidden state, with whatever comes behind
             the layers: the final norm of a "stable layer norm" encoder (wav2vec2-large-lv60, hubert-large, wavlm-large), adapter
             layers. The last layer by its number comes before those, as in transformers' `hidden_states` (5.23; 5.0 norms it).
             Layers above the highest one asked for are dropped.
    device:  where the weights live; None is the CPU.
    dtype:   of weights and features; None is float32, whatever the checkpoint holds.
    max_seconds: the longest clip taken, 60 s by default: a longer one is BadInput. None takes any. Memory goes with its square.
    batch_seconds: sound encoded at once, padding included, unless one clip is longer: it bounds memory.

    Attributes: `source` says where the weights came from, of several places the one that had them, `model_type` which family it
    is; `width` is one layer's, `num_layers` counts the layers that the features hold, `d_model` = num_layers · width;
    `num_channels` of the inputs is 1 for models of waveforms, 160 for w2v-BERT; `min_samples` is the shortest clip that makes a
    frame; `convs` decide lengths.
    Raises WeightsUnavailable when no place has the weights, BadInput when what is there is no such checkpoint.
    """

    def __init__(self, source: Source, *, layer: Layer = None, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None, max_seconds: float | None = MAX_SECONDS, batch_seconds: float = 120.0) -> None:
        super().__init__()
        check_seconds(max_seconds, batch_seconds)
        self.max_seconds, self.batch_seconds = max_seconds, batch_seconds
        directory, self.source = fetch_weights("HFSpeechEncoder", places("HFSpeechEncoder", source), REQUIRED_FILES, WAYS_OUT)
        model = load_model(directory, dtype or torch.float32)
        self.extractor = load_extractor(directory, model.config)
        self.model_type: str = model.config.model_type
        self.num_hidden_layers: int = model.config.num_hidden_layers
        self.layers = selected_layers("HFSpeechEncoder", layer, self.num_hidden_layers)
        if self.layers is not None:
            drop_above(model, max(self.layers))
        adapter = getattr(model, "adapter", None)
        self.takes_samples = hasattr(model, "feature_extractor")
        self.convs = [size_of(layer.conv) for layer in model.feature_extractor.conv_layers] if self.takes_samples else []
        if adapter is not None:
            self.convs += [size_of(getattr(layer, "conv", None) or layer.residual_conv) for layer in adapter.layers]
        self.group_norm = self.takes_samples and model.config.feat_extract_norm == "group"
        self.equal_lengths = adapter is not None or getattr(model.config, "conv_pos_batch_norm", False)
        self.sampling_rate: int = self.extractor.sampling_rate                                                          # Hz
        self.input_hop = 1 if self.takes_samples else HOP * self.extractor.stride                                       # samples
        self.frame_rate = self.sampling_rate / (self.input_hop * math.prod(conv.stride for conv in self.convs))         # Hz
        self.num_channels: int = 1 if self.takes_samples else self.extractor.num_mel_bins * self.extractor.stride
        self.min_inputs = fewest(self.convs)
        self.min_samples = self.min_inputs if self.takes_samples else fewest_samples(self.min_inputs * self.extractor.stride)
        self.width: int = model.config.hidden_size if adapter is None else model.config.output_hidden_size
        self.num_layers = len(self.layers or (-1,))
        self.d_model: int = self.num_layers * self.width
        self.model = model.to(device or "cpu")
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> HFSpeechEncoder:
        """Stays in eval whatever a parent asks: SpecAugment and dropout in a frozen encoder would only be noise."""
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        """Modules with weight norm refuse pickle, by which spawned workers get an encoder: its config and tensors go."""
        return self.__dict__ | {"_modules": {}, "config": self.model.config, "tensors": self.model.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name not in ("config", "tensors")})
        model = bare_model(state["config"])
        if self.layers is not None:
            drop_above(model, max(self.layers))
        load_tensors(model, state["tensors"])
        self.model = model.to(next(iter(state["tensors"].values())).device)
        self.requires_grad_(False)
        self.eval()

    def settings(self) -> dict[str, Any]:
        """`layer` and `max_seconds` where they are not the defaults: what an adapter or a shard says of them."""
        limit = {} if self.max_seconds == MAX_SECONDS else {"max_seconds": self.max_seconds}
        return recorded_layers(self.layers, self.num_hidden_layers) | limit

    def preprocess(self, waveforms: Sequence[Tensor | np.ndarray]) -> Features:
        """16 kHz mono clips → values (B, num_channels, T) float32 on the CPU, zero beyond a clip, and lens (B,) in steps of T.

        For models of waveforms a step is a sample, num_channels 1, and each clip has mean 0 and variance 1 where its
        preprocessor says `do_normalize`. For w2v-BERT a step is 20 ms: two frames of a filter bank, each band of a clip with mean
        0 and variance 1; an odd last frame is dropped, as transformers masks it.

        Raises BadInput for what `check_waveforms` refuses and for clips shorter than `min_samples` or longer than `max_seconds`.
        """
        clips = check_waveforms("HFSpeechEncoder.preprocess", waveforms)
        for number, clip in enumerate(clips):
            self.check_length(number, len(clip))
        values, lens = pad_rows([self.inputs_of(clip.numpy()) for clip in clips])
        return Features(values.transpose(1, 2), lens)

    def check_length(self, number: int, samples: int) -> None:
        came = f"clip {number} of {samples / self.sampling_rate:.4g} s ({samples} samples)"
        if samples < self.min_samples:
            raise BadInput("HFSpeechEncoder.preprocess", came, f"at least {self.min_samples} samples, which make one frame",
                           "leave such clips out, or pad them with silence")
        if self.max_seconds is not None and samples > self.max_seconds * self.sampling_rate:
            raise BadInput("HFSpeechEncoder.preprocess", came, f"at most {self.max_seconds:g} s",
                           "cut it into shorter clips, or allow longer ones: max_seconds=…; memory goes with the square")

    def inputs_of(self, samples: np.ndarray) -> Tensor:
        """transformers' feature extractor on one clip: (samples,) → (T, num_channels)."""
        if self.takes_samples:
            made = self.extractor([samples], sampling_rate=self.sampling_rate, return_tensors="pt")["input_values"][0, :, None]
        else:
            made = self.extractor([samples], sampling_rate=self.sampling_rate, pad_to_multiple_of=None,
                                  return_tensors="pt")["input_features"][0]
        values: Tensor = made.float()
        return values

    @torch.no_grad()
    def forward(self, inputs: Features) -> Features:
        """What `preprocess` returned, on any device → values (B, T_enc, d_model), lens as the convolutions make them.

        Inputs move to the weights' device and dtype. Frames beyond lens are 0. Lens are read as integers: keep them on the CPU
        to spare CUDA a wait. BadInput for lens outside the tensor or too short for a frame; 0 makes none.
        """
        values, lens = inputs
        self.check_inputs(values, lens)
        weight = next(self.model.parameters())
        values = values.to(weight.device, weight.dtype)
        found = [int(length) for length in lens.tolist()]
        frames = [self.num_frames(length) for length in found]
        encoded = values.new_zeros(values.size(0), self.num_frames(values.size(2)), self.d_model)
        with undisturbed_generator():
            for batch in self.batches(found):
                for chunk, row in zip(batch, self.encode([values[row, :, :steps] for row, _, steps in batch])):
                    encoded[chunk.row, :frames[chunk.row]] = row[:frames[chunk.row]]
        return Features(encoded, torch.tensor(frames, device=encoded.device))

    def num_frames(self, steps: int) -> int:
        """Feature frames that so many steps of the inputs make."""
        for conv in self.convs:
            steps = conv.frames(steps)
        return steps

    def batches(self, lens: Sequence[int]) -> list[list[Chunk]]:
        """Who shares a padded batch of at most `batch_seconds`: lengths that differ by less than a factor of two, or not at
        all."""
        chunks = [Chunk(row, 0, steps) for row, steps in enumerate(lens) if steps]
        most = int(self.batch_seconds * self.sampling_rate / self.input_hop)
        return equal(chunks, most) if self.equal_lengths else similar(chunks, most)

    def encode(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips (num_channels, T_i) → (B, T_enc, d_model); frames beyond a clip's own mean nothing."""
        if self.layers is None:
            return self.last_hidden_state(clips)
        with recording(self.model.encoder.layers, self.layers) as hidden:
            self.last_hidden_state(clips)
        return side_by_side(hidden, self.layers)

    def last_hidden_state(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips of one length need no mask, as a clip alone."""
        model, ragged = self.model, len({clip.size(1) for clip in clips}) > 1
        if not self.takes_samples:
            values, lens = pad_rows([clip.T for clip in clips])
            forget_positions(model.encoder.embed_positions)
            mask = valid_steps(Features(values, lens)) if ragged else None
            whole: Tensor = model(values, attention_mask=mask).last_hidden_state
            return whole
        features = pad_rows(self.convolved(clips))
        projected = model.feature_projection(features.values)
        hidden = projected[0] if isinstance(projected, tuple) else projected  # all but HuBERT return their input beside it
        with quietly():
            hidden = model.encoder(hidden, attention_mask=valid_steps(features) if ragged else None).last_hidden_state
        adapter = getattr(model, "adapter", None)
        return hidden if adapter is None else adapter(hidden)

    def convolved(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Clips (1, T_i) → their frames (T_enc_i, conv width). With group norm only clips of one length meet; with layer norm, of
        each frame by itself, a frame sees nothing but its own samples, and padding makes frames beyond the clip's."""
        found: dict[int, Tensor] = {}
        chunks = [Chunk(number, 0, clip.size(1)) for number, clip in enumerate(clips)]
        for group in equal(chunks, max(len(clips) * clip.size(1) for clip in clips)) if self.group_norm else [chunks]:
            longest = max(chunk.frames for chunk in group)
            samples = torch.stack([F.pad(clips[chunk.row][0], (0, longest - chunk.frames)) for chunk in group])
            for chunk, frames in zip(group, self.model.feature_extractor(samples).transpose(1, 2)):
                found[chunk.row] = frames[:self.num_conv_frames(chunk.frames)]
        return [found[number] for number in range(len(clips))]

    def num_conv_frames(self, samples: int) -> int:
        for conv in self.convs[:len(self.model.feature_extractor.conv_layers)]:
            samples = conv.frames(samples)
        return samples

    def check_inputs(self, values: Tensor, lens: Tensor) -> None:
        fits = values.ndim == 3 and values.size(1) == self.num_channels and values.is_floating_point()
        if not fits or lens.shape != values.shape[:1]:
            raise BadInput("HFSpeechEncoder", f"values {shape(values.shape)} of {values.dtype} with lens {shape(lens.shape)}",
                           f"floating-point values {shape(['B', self.num_channels, 'T'])} with lens (B,)",
                           "pass what preprocess returns")
        for row, steps in enumerate(lens.tolist()):
            if steps and not self.min_inputs <= steps <= values.size(2):
                raise BadInput("HFSpeechEncoder", f"lens[{row}] = {steps} for values {shape(values.shape)}",
                               f"0, or {self.min_inputs} ≤ lens ≤ {values.size(2)}", "pass what preprocess returns")


def undisturbed_generator() -> AbstractContextManager[None]:
    """Releases of transformers up to 5.22 at most draw a number a layer for layer drop, in eval mode too; 5.23 does not."""
    import transformers

    draws = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
    return torch.random.fork_rng(devices=[]) if draws and not torch.compiler.is_compiling() else nullcontext()


def check_seconds(max_seconds: object, batch_seconds: object) -> None:
    for name, value in (("max_seconds", max_seconds), ("batch_seconds", batch_seconds)):
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        if not number and (value is not None or name == "batch_seconds"):
            raise BadInput("HFSpeechEncoder", f"{name} {value!r:.40}", "seconds > 0")


def size_of(conv: Any) -> Conv:
    """Of a one-dimensional convolution."""
    return Conv(conv.kernel_size[0], conv.stride[0], conv.padding[0])


def fewest(convs: Sequence[Conv]) -> int:
    """Steps that make one frame: the receptive field, less what padding adds."""
    steps = 1
    for conv in reversed(convs):
        steps = conv.steps(steps)
    return steps


def fewest_samples(fbank_frames: int) -> int:
    """Samples that make so many frames of the filter bank, two at least: of one there is no variance."""
    return WINDOW + HOP * (max(fbank_frames, 2) - 1)


def equal(chunks: Iterable[Chunk], max_frames: int) -> list[list[Chunk]]:
    """Batches of chunks of one length, of at most `max_frames` in all, unless it is one chunk alone."""
    groups: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        groups.setdefault(chunk.frames, []).append(chunk)
    return [group[start:start + max(max_frames // frames, 1)] for frames, group in groups.items()
            for start in range(0, len(group), max(max_frames // frames, 1))]


@contextmanager
def recording(layers: nn.ModuleList, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, a forward of this thread through `layers` leaves the hidden states with these numbers in what is yielded."""
    found: dict[int, Tensor] = {}
    thread = get_ident()

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() == thread:
            found[0] = args[0] if args else kwargs["hidden_states"]

    def leaving(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if get_ident() == thread:
                found[number] = output[0] if isinstance(output, tuple) else output  # WavLM's bias, weights in transformers 5.0
        return hook

    handles = [layers[number - 1].register_forward_hook(leaving(number)) for number in wanted if number]
    if 0 in wanted:
        handles.append(layers[0].register_forward_pre_hook(entering, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quietly() -> Iterator[None]:
    """Without torch's remark on WavLM's masks, one of truth values and one of numbers: it takes both."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
        yield


def forget_positions(positions: Any) -> None:
    """w2v-BERT's rotary table is kept by length alone, whatever device and dtype the model has moved to since."""
    if hasattr(positions, "cached_sequence_length"):
        positions.cached_sequence_length = None


def drop_above(model: Any, number: int) -> None:
    """Take away what runs after the given hidden state; one layer stays, which hidden state 0 enters."""
    model.encoder.layers = model.encoder.layers[:max(number, 1)]
    for name in ("adapter", "intermediate_ffn"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)


def load_model(directory: Path, dtype: torch.dtype) -> Any:
    """transformers' model with the checkpoint's encoder tensors, cast to dtype, on the CPU. Names and shapes must match."""
    import transformers

    where, path = "HFSpeechEncoder", directory / "config.json"
    found = read_object(where, path).get("model_type")
    if not isinstance(found, str) or found not in FAMILIES:
        raise BadInput(where, f"a checkpoint of type {found!r:.60} in {directory}",
                       f"model_type {', '.join(map(repr, FAMILIES))}", "Whisper has a WhisperEncoder" * (found == "whisper"))
    with refusing(where, path):
        config = getattr(transformers, FAMILIES[found].config).from_pretrained(directory, local_files_only=True)
        config.mask_time_prob = config.mask_feature_prob = 0.0  # of SpecAugment: without, there is no vector to mask with
        model = bare_model(config)
    prefix = f"{model.base_model_prefix}."
    tensors = read_tensors(where, directory, lambda key: encoder_name(key, prefix))
    tensors = tensors or read_tensors(where, directory, lambda key: encoder_name(key, ""))
    check_names(where, directory, model.state_dict(), tensors)
    load_tensors(model, copies(tensors, dtype))
    return model


def bare_model(config: Any) -> Any:
    """transformers' model of that config without weights. On "meta" it takes no time and no memory; one vector transformers
    draws elsewhere, from the global generator."""
    import transformers

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return getattr(transformers, FAMILIES[config.model_type].model)(config)


def load_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Into a bare model, as they are: neither copied nor cast."""
    model.load_state_dict(tensors, assign=True)
    positions = getattr(model.encoder, "embed_positions", None)
    if positions is not None:  # a table that follows from the config and is in no checkpoint
        model.encoder.embed_positions = type(positions)(model.config)


def encoder_name(key: str, prefix: str) -> str | None:
    """A tensor's name in transformers' bare model: None for heads, which stand outside the prefix, and for SpecAugment's vector.

    Weight norm of the positional convolution has two spellings, by the age of the torch that saved it.
    """
    name = key.removeprefix(prefix)
    if not key.startswith(prefix) or name == "masked_spec_embed":
        return None
    for old, new in (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1")):
        if name.endswith(f"pos_conv_embed.conv.{old}"):
            return f"{name.removesuffix(old)}{new}"
    return name


def load_extractor(directory: Path, config: Any) -> Any:
    """transformers' feature extractor, refused unless it makes what this model takes."""
    import transformers

    where, path, wanted = "HFSpeechEncoder", directory / "preprocessor_config.json", FAMILIES[config.model_type].extractor
    found = read_object(where, path).get("feature_extractor_type", wanted)
    if found != wanted:
        raise BadInput(where, f"a preprocessor of type {found!r:.60} in {directory}", repr(wanted),
                       "take both files from one checkpoint")
    with refusing(where, path):
        extractor = getattr(transformers, wanted).from_pretrained(directory, local_files_only=True)
        bands = wanted == "SeamlessM4TFeatureExtractor"
        makes = int(extractor.num_mel_bins * extractor.stride if bands else extractor.feature_size)
        rate = int(extractor.sampling_rate)
    takes = config.feature_projection_input_dim if bands else 1
    if makes != takes or rate < 1:
        raise BadInput(where, f"a preprocessor in {directory} for {makes} channels at {rate} Hz", f"{takes} at a rate > 0",
                       "take both files from one checkpoint")
    return extractor
