"""A Whisper encoder's time on clips shorter than 30 s: as long as they are, against padded to 30 s.

Architectures of Whisper's tiny, base and small with random weights: speed does not depend on them. Two groups a case: from mel
frames, the encoder alone, and from waveforms, the log-mel frames included. Errors are those of each variant's first clip, against
the same context in fp64, relative to the largest feature: the two contexts are two functions, each right about its own. On CUDA
convolutions compute in fp32 where fp32 is measured: TF32, which cuDNN takes unless told otherwise, has 10 bits.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.group import Device, Group, Suite, Variant
from benchmarks.step import raising
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.features import Features

SIZES = {"tiny": (384, 4, 6), "base": (512, 6, 8), "small": (768, 12, 12)}  # d_model, layers, heads (arXiv:2212.04356, table 1)
# Relative, on the largest feature: a residual stream of 9 to 25 additions, each rounded by 2⁻²⁴ or 2⁻⁹ of itself, behind products
# of up to 3072 terms that round likewise; with every rounding the same way 25 × 2⁻²⁴ = 1.5e-6 and 25 × 2⁻⁹ = 0.05, twice over.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 0.1}


class Case(NamedTuple):
    size: str
    seconds: int
    clips: int
    dtype: torch.dtype = torch.float32


def cases(suite: Suite, device: Device) -> list[Case]:
    """A laptop's seconds for "quick": every clip is encoded padded to 30 s, too."""
    if suite == "quick":
        return [Case("base", 5, 1), Case("tiny", 5, 4)]
    if device == "cpu":  # a batch only where four clips of 30 s take seconds
        return [*(Case(size, seconds, 1) for size in SIZES for seconds in (1, 5, 15)), Case("tiny", 5, 4), Case("base", 5, 4)]
    return [Case(size, seconds, clips, dtype) for size in SIZES for seconds in (1, 5, 15) for clips in (1, 32)
            for dtype in BOUNDS]


def groups(suite: Suite, device: Device) -> Iterator[Group]:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # until the last group has been measured
    try:
        with tempfile.TemporaryDirectory() as folder:
            for case in cases(suite, device):
                directory = Path(folder) / case.size
                if not directory.exists():
                    random_whisper(directory, *SIZES[case.size])
                yield from groups_of(case, directory, device)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def groups_of(case: Case, directory: Path, device: Device) -> Iterator[Group]:
    """From mel frames, then from waveforms."""
    full, clip = (WhisperEncoder(directory, device=device, dtype=case.dtype, context=context) for context in ("full", "clip"))
    rng = torch.Generator().manual_seed(0)
    sound = [0.1 * torch.randn(case.seconds * full.sampling_rate, generator=rng) for _ in range(case.clips)]
    mel = {encoder: on(device, encoder.preprocess(sound)) for encoder in (full, clip)}
    expected = {encoder: exact(encoder, directory, sound[:1]) for encoder in mel}
    frames = {full: 1500, clip: 50 * case.seconds}
    flops = {encoder: case.clips * flops_of(*SIZES[case.size][:2], frames[encoder], full.n_mels) for encoder in mel}
    fast = compiled(clip) if device == "cuda" else None
    dtype = str(case.dtype).removeprefix("torch.")
    name = f"{case.size}, {case.clips} clip{'s' * (case.clips > 1)} of {case.seconds} s, {dtype}"

    def variants(run: Any, transformers: Any) -> list[Variant]:
        def variant(name: str, encoder: WhisperEncoder, step: Callable[[], Features | Tensor]) -> Variant:
            try:
                return Variant(name, step, error=error(step(), expected[encoder]), flops=flops[encoder])
            except Exception as failure:
                return raising(name, failure)

        return [variant("context=full", full, partial(run, full)), variant("context=clip", clip, partial(run, clip)),
                variant("transformers", full, transformers),
                variant("context=clip, layers compiled", clip, partial(run, clip, fast)) if fast else
                Variant("context=clip, layers compiled", why="measured on CUDA, where launches count")]

    def from_mel(encoder: WhisperEncoder, other: WhisperEncoder | None = None) -> Features:
        return (other or encoder)(mel[encoder])

    def from_waveforms(encoder: WhisperEncoder, other: WhisperEncoder | None = None) -> Features:
        return (other or encoder)(encoder.preprocess(sound))

    own_mel, bound = mel[full].values.to(device, case.dtype), BOUNDS[case.dtype]
    yield Group("encoder", f"{name}: mel frames → features", "context=full",
                variants(from_mel, partial(own, full, own_mel)), bound)
    yield Group("encoder", f"{name}: waveforms → features", "context=full",
                variants(from_waveforms, lambda: own(full, extracted(full, sound).to(device, case.dtype))), bound)


@torch.no_grad()
def own(encoder: WhisperEncoder, mel: Tensor) -> Tensor:
    """transformers' own call, without this package."""
    values: Tensor = encoder.encoder(mel).last_hidden_state
    return values


def extracted(encoder: WhisperEncoder, sound: list[Tensor]) -> Tensor:
    made = encoder.extractor([clip.numpy() for clip in sound], sampling_rate=encoder.sampling_rate, return_tensors="pt")
    values: Tensor = made["input_features"]
    return values


def compiled(encoder: WhisperEncoder) -> WhisperEncoder:
    """The same, its layers compiled one by one: they share one program for each length."""
    fast = copy.deepcopy(encoder)
    for layer in fast.encoder.layers:
        layer.compile()
    return fast


def exact(encoder: WhisperEncoder, directory: Path, sound: list[Tensor]) -> Tensor:
    """Features in fp64 by the same context and the same weights, from the mel frames as the encoder's dtype has them."""
    weight = encoder.encoder.conv1.weight
    twin = WhisperEncoder(directory, device=weight.device, dtype=torch.float64, context=encoder.context)
    with torch.no_grad():  # of the weights as they are: rounding those to bfloat16 is no error of the encoder's
        for theirs, ours in zip(twin.parameters(), encoder.parameters()):
            theirs.copy_(ours)
    inputs = encoder.preprocess(sound)
    return twin(Features(inputs.values.to(weight.dtype), inputs.lens)).values


def error(came: Features | Tensor, expected: Tensor) -> float:
    """Largest difference of the first clip's features, relative to the largest feature."""
    values = came.values if isinstance(came, Features) else came
    return float((values[:1].double() - expected).abs().max() / expected.abs().max())


def on(device: str, inputs: Features) -> Features:
    """Mel frames on the device, lengths on the CPU, where they are read."""
    return Features(inputs.values.to(device), inputs.lens)


def flops_of(d_model: int, layers: int, frames: int, n_mels: int) -> float:
    """Of one clip with `frames` encoder frames: two convolutions of 3 taps, four projections, two of 4 × d_model, attention."""
    convolutions = 2 * 3 * d_model * (n_mels * 2 * frames + d_model * frames)
    layer = 2 * frames * (4 + 8) * d_model**2 + 4 * frames**2 * d_model
    return float(convolutions + layers * layer)


def random_whisper(directory: Path, d_model: int, layers: int, heads: int) -> None:
    """A checkpoint with an encoder of these sizes, the least of a decoder, and Whisper's preprocessor."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": 4 * d_model, "decoder_layers": 1,
                 "decoder_attention_heads": heads, "decoder_ffn_dim": d_model, "vocab_size": 64}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        WhisperModel(WhisperConfig(d_model=d_model, **sizes, **special)).save_pretrained(directory)
    WhisperFeatureExtractor().save_pretrained(directory)
