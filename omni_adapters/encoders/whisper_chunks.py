"""Whisper's encoder over mel frames of any length: cut into chunks, encoded with chunks of similar length, joined again.

    mel (B, n_mels, T_mel), lens ─plan─► chunks of at most 30 s ─batches─► encoder ─► values (B, ceil(T_mel / 2), d_model)

Notable:
- who sits where is decided in plain integers; tensors are only cut, encoded and copied back
- transformers' forward takes 3000 frames and no mask. Convolutions and layers are the checkpoint's own, run here, so that a
  chunk costs what it is long, as Ultravox does it (github.com/fixie-ai/ultravox, ultravox/model/ultravox_model.py)
- what stands beyond a chunk is zero wherever a convolution can see it, as its own padding is, and no key of attention: a
  chunk comes out the same alone and beside longer ones, but for the rounding of kernels blocked for another batch
- chunks in one batch differ in length by less than a factor of two: at most half of the work is on padding
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapters.encoders.pretrained import side_by_side

CONV_STRIDE = 2  # mel frames per encoder frame, the stride of the second convolution


class Chunk(NamedTuple):
    """A stretch of one row: `frames` mel frames from `start` on."""

    row: int
    start: int
    frames: int


def plan(lens: Sequence[int], chunk_frames: int) -> list[Chunk]:
    """Rows of these lengths, in mel frames, cut every `chunk_frames`: the last chunk of a row is shorter, none is empty."""
    return [Chunk(row, start, min(chunk_frames, length - start))
            for row, length in enumerate(lens) for start in range(0, length, chunk_frames)]


def similar(chunks: Iterable[Chunk], max_frames: int) -> list[list[Chunk]]:
    """Batches of chunks, longest first. The longest of a batch is less than twice as long as its shortest, and a batch
    padded to it has at most `max_frames` mel frames, unless it is one chunk alone."""
    found: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda one: -one.frames):
        batch = found[-1] if found else []
        longest = batch[0].frames if batch else 0
        if longest < 2 * chunk.frames and batch and (len(batch) + 1) * longest <= max_frames:
            batch.append(chunk)
        else:
            found.append([chunk])
    return found


def encode_batches(mel: Tensor, batches: Sequence[Sequence[Chunk]], d_model: int, encode: Callable[[Tensor, list[int]], Tensor],
                   width: int | None = None) -> Tensor:
    """mel (B, n_mels, T_mel) → values (B, ceil(T_mel / 2), d_model): each chunk's frames at its place, zeros elsewhere.

    encode: mel (chunks, n_mels, frames) and the mel frames that are sound in each → (chunks, ceil(frames / 2), d_model).
    width:  mel frames of every cut, sound or not; by default those of the longest chunk in its batch.
    """
    values = mel.new_zeros(mel.size(0), num_frames(mel.size(2)), d_model)
    for batch in batches:
        cut = torch.stack([stretch(mel[chunk.row], chunk.start, width or max(batch, key=lambda one: one.frames).frames)
                           for chunk in batch])
        for chunk, encoded in zip(batch, encode(cut, [chunk.frames for chunk in batch])):
            start, frames = num_frames(chunk.start), num_frames(chunk.frames)
            values[chunk.row, start:start + frames] = encoded[:frames]
    return values


def encode_clips(encoder: Any, mel: Tensor, lens: Sequence[int], layers: Sequence[int] | None = None) -> Tensor:
    """transformers' Whisper encoder over mel (B, n_mels, T ≤ 3000), of which row b has lens[b] ≥ 1 frames.

        x = gelu(conv2(gelu(conv1(mel)))) + positions[:ceil(T / 2)];  x = layer(x), keys beyond lens masked;  layer_norm(x)

    layers: numbers of hidden states, as in transformers; None is the last.

    Returns (B, ceil(T / 2), width), or the layers side by side; frames beyond ceil(lens / 2) mean nothing. Rows without padding
    need no mask.
    """
    sizes = torch.tensor(lens, device=mel.device) if min(lens) < mel.size(2) else None
    values = F.gelu(encoder.conv1(cleared(mel, sizes)))
    values = F.gelu(encoder.conv2(cleared(values, sizes))).transpose(1, 2)  # (B, T_enc, width)
    hidden = values + encoder.embed_positions.weight[:values.size(1)]
    mask = None if sizes is None else key_mask(num_frames(sizes), hidden)
    layers = (encoder.config.encoder_layers,) if layers is None else layers
    return side_by_side(hidden_states(encoder, hidden, mask, layers), layers)


def hidden_states(encoder: Any, hidden: Tensor, mask: Tensor | None, layers: Sequence[int]) -> dict[int, Tensor]:
    """What enters the first layer (B, T_enc, width) → the hidden states with these numbers. Higher layers do not run."""
    found = {}
    for number in range(max(layers) + 1):
        if number:
            hidden = encoder.layers[number - 1](hidden, attention_mask=mask)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # transformers 5.0 returns attention weights beside it
        if number in layers:
            found[number] = encoder.layer_norm(hidden) if number == encoder.config.encoder_layers else hidden
    return found


def cleared(values: Tensor, lens: Tensor | None) -> Tensor:
    """(B, channels, T) with zeros beyond each row's length, whatever stood there; None: every row is full."""
    if lens is None:
        return values
    beyond = torch.arange(values.size(2), device=values.device) >= lens.unsqueeze(1)  # (B, T)
    return values.masked_fill(beyond.unsqueeze(1), 0.0)


def key_mask(lens: Tensor, hidden: Tensor) -> Tensor:
    """(B, 1, 1, T_enc), added to attention scores: 0 within a row's length, −inf beyond. Every row has one frame at least."""
    beyond = torch.arange(hidden.size(1), device=hidden.device) >= lens.unsqueeze(1)
    return hidden.new_zeros(beyond.shape).masked_fill(beyond, float("-inf"))[:, None, None]


def stretch(mel: Tensor, start: int, width: int) -> Tensor:
    """(n_mels, T_mel) → (n_mels, width) from frame `start` on; zeros where the row has ended."""
    cut = mel[:, start:start + width]
    return F.pad(cut, (0, width - cut.size(1)))


def num_frames(mel_frames: Any) -> Any:
    """ceil(mel frames / 2), of an integer or a tensor."""
    return (mel_frames + CONV_STRIDE - 1) // CONV_STRIDE
