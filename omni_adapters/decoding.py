"""Cached decoding for hosts of any age: one KV cache that speaks both protocols nanochat has had.

- since Jan 2026 a host asks `get_layer_cache(layer)` for (B, T, K, D) buffers, writes into them and calls `advance(T)`;
  since Mar 2026 it also keeps `prev_embedding` there for smear
- before that it called `insert_kv(layer, k, v)` with (B, K, T, D) and read back all that was cached
(nanochat/engine.py at the respective commits)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapters.anatomy import Anatomy, logits_of
from omni_adapters.shapes import BadInput, shape
from omni_adapters.splice import SoftTokens, Splice


class KVCache:
    """Keys and values of `B` rows that all stand at the same position.

    sizes: (n_layer, n_kv_head, head_dim); room: most positions it can hold.
    """

    def __init__(self, B: int, room: int, sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.n_layers, self.n_heads, self.head_dim = sizes
        self.batch_size, self.max_seq_len, self.device, self.dtype = B, room, device, dtype
        self.cache_seqlens = torch.zeros(B, dtype=torch.int32, device=device)  # int32 is what FlashAttention takes
        self.prev_embedding: Tensor | None = None
        self.position = 0  # the same number on the host: reading cache_seqlens would synchronise CUDA
        self.buffers: tuple[Tensor, Tensor] | None = None

    def get_pos(self) -> int:
        return self.position

    def advance(self, num_tokens: int) -> None:
        self.position += num_tokens
        self.cache_seqlens += num_tokens

    def get_layer_cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """(k, v), each (B, room, K, D), of one layer."""
        keys, values = self.allocate((self.batch_size, self.max_seq_len, self.n_heads, self.head_dim), self.dtype)
        return keys[layer], values[layer]

    def insert_kv(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, K, T, D); returns views of all that is cached, (B, K, T_all, D)."""
        keys, values = self.allocate((self.batch_size, self.n_heads, self.max_seq_len, self.head_dim), k.dtype)
        start, end = self.position, self.position + k.size(2)
        keys[layer, :, :, start:end], values[layer, :, :, start:end] = k, v
        if layer == self.n_layers - 1:
            self.advance(k.size(2))
        return keys[layer, :, :, :end], values[layer, :, :, :end]

    def allocate(self, layer_shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """On first use, since the host's protocol decides the order of axes."""
        if self.buffers is None:
            sizes = (self.n_layers, *layer_shape)
            self.buffers = torch.zeros(sizes, device=self.device, dtype=dtype), torch.zeros(
                sizes, device=self.device, dtype=dtype)
        return self.buffers


def check_sampling(where: str, max_tokens: int, temperature: float, top_k: int | None) -> None:
    if max_tokens < 0:
        raise BadInput(where, f"max_tokens = {max_tokens}", "max_tokens ≥ 0")
    if not 0 <= temperature < float("inf"):
        raise BadInput(where, f"temperature = {temperature}", "a finite temperature ≥ 0", "0 is greedy")
    if top_k is not None and top_k < 1:
        raise BadInput(where, f"top_k = {top_k}", "top_k ≥ 1 or None")


def sample(logits: Tensor, rng: torch.Generator | None, temperature: float, top_k: int | None) -> Tensor:
    """Logits (B, vocab_size) → ids (B, 1): greedy at temperature 0, else softmax of the top_k logits."""
    if logits.ndim != 2:
        raise BadInput("sample", f"logits {shape(logits.shape)}", "(B, vocab_size)")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is None or top_k >= logits.size(-1):
        return torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=rng)
    kept, ids = logits.topk(top_k, dim=-1)
    return ids.gather(1, torch.multinomial(F.softmax(kept / temperature, dim=-1), 1, generator=rng))


class Drivable(Protocol):
    """What a decoder needs of a prepender."""

    anatomy: Anatomy

    def plan(self, where: str, idx: Tensor, soft_tokens: SoftTokens | None, kwargs: dict[str, Any],
             text_lens: Tensor | None = None, exact: bool = False) -> tuple[Splice | None, Tensor]: ...
    def run(self, splice: Splice | None, fused_idx: Tensor, targets: Tensor | None, kwargs: dict[str, Any]) -> Any: ...
    def dtype(self) -> torch.dtype: ...


class Decoder:
    """Next-token logits for rows whose fused lengths agree: `start()` for the prompt, then `step(ids)` per token column.

    Three ways to the same logits: nanochat's kv_cache, transformers' own cache, or everything again each step.

    idx: (B, T) prompts, right-padded where text_lens (B,) says so. room: most positions a row will reach.
    """

    def __init__(self, host: Drivable, idx: Tensor, soft_tokens: SoftTokens | None, room: int,
                 text_lens: Tensor | None = None) -> None:
        if isinstance(soft_tokens, Mapping):  # generated ids are text, whatever they are: placeholders leave the vocabulary
            beyond = {key: host.anatomy.num_embeddings + number for number, key in enumerate(soft_tokens)}
            placed = idx
            for key, new in beyond.items():
                placed = torch.where(idx == key, new, placed)
            idx, soft_tokens = placed, {beyond[key]: clips for key, clips in soft_tokens.items()}
        self.host, self.idx, self.soft_tokens = host, idx, soft_tokens
        self.text_lens = torch.full((idx.size(0),), idx.size(1), device=idx.device) if text_lens is None else text_lens
        anatomy = host.anatomy
        self.kwargs: dict[str, Any] = {}
        self.returned: str | None = None  # what transformers calls the cache that comes back
        # A bigram table wants the token before, which a cached step does not bring: such hosts recompute.
        cached = not anatomy.derived_tables
        if cached and anatomy.cache == "kv_cache" and anatomy.cache_shape is not None:
            self.kwargs = {"kv_cache": KVCache(idx.size(0), room, anatomy.cache_shape, idx.device, host.dtype())}
        elif cached and anatomy.cache in ("past_key_values", "cache"):
            self.returned = anatomy.cache
            self.kwargs = {self.returned: None, "use_cache": True}

    def start(self) -> Tensor:
        """Prefill; logits (B, vocab_size) after each row's last text token."""
        logits = self.run(self.idx, self.soft_tokens, self.text_lens)
        if logits.size(1) == 1:  # the host crops to the last position by itself
            return logits[:, 0]
        return logits[torch.arange(logits.size(0), device=logits.device), self.text_lens - 1]

    def step(self, ids: Tensor) -> Tensor:
        """Logits (B, vocab_size) after one more token per row, ids (B, 1)."""
        if self.kwargs:
            return self.run(ids, None, None)[:, -1]
        self.idx = F.pad(self.idx, (0, 1)).scatter(1, self.text_lens.unsqueeze(1), ids)
        self.text_lens = self.text_lens + 1
        return self.start()

    def run(self, idx: Tensor, soft_tokens: SoftTokens | None, text_lens: Tensor | None) -> Tensor:
        where = "SoftTokenPrepender.generate"
        splice, fused_idx = self.host.plan(where, idx, soft_tokens, self.kwargs, text_lens, exact=True)
        result = self.host.run(splice, fused_idx, None, self.kwargs)
        if self.returned is not None:
            self.kwargs[self.returned] = getattr(result, self.returned)
        return logits_of(result)


@torch.inference_mode()
def stream(decoder: Decoder, max_tokens: int, temperature: float, top_k: int | None, seed: int) -> Iterator[Tensor]:
    """Columns of token ids (B, 1), sampled one after another."""
    rng = torch.Generator(device=decoder.idx.device).manual_seed(seed)
    ids = None
    for _ in range(max_tokens):
        logits = decoder.start() if ids is None else decoder.step(ids)
        ids = sample(logits, rng, temperature, top_k)
        yield ids
