"""Hosts that the library did not write: small twins of what a user may bring, and of how foreign engines call them.

- `NanoGPT`      learned positions, LayerNorm, tied head, (logits, loss), head on the last position when nothing is graded
- `BigramGPT`    a table fed by a hash of each id and its left neighbour, and one table fed by ids inside every block
- `tiny_hf`      transformers' NanoChatForCausalLM with a random config
- `reference`    this library's own GPT, every parameter random so that each feature is at work
- `EngineCache`, `engine`  how nanochat's Engine calls a model: prefill of one row, a cache copied to several, single steps
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from omni_adapters.reference_gpt import GPT, GPTConfig


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, head_std: float = 0.3) -> nn.Module:
    """Draw every parameter: no feature stays at a zero that would hide a mistake, and logits spread over some units.

    Matrices have variance 1 / fan_in, tables variance 1, the head standard deviation `head_std`; biases spread by 0.2 around
    zero, other vectors and scalars by 0.2 around what they were.
    """
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        owner = model.get_submodule(name.rpartition(".")[0])
        if "lm_head" in name:
            new = head_std * noise
        elif parameter.ndim < 2:
            new = 0.2 * noise if isinstance(owner, nn.Linear) else parameter.float() + 0.2 * noise
        elif isinstance(owner, nn.Embedding):
            new = noise
        else:
            new = noise / parameter.size(1) ** 0.5
        parameter.copy_(new)
    return model


def reference(seed: int = 0, **sizes: Any) -> GPT:
    """A tiny reference GPT: two layers, a short window would need 128 positions, so windows only matter when asked for."""
    sizes = {"sequence_len": 64, "vocab_size": 97, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32} | sizes
    gpt = GPT(GPTConfig(**sizes))
    randomise(gpt, seed)
    return gpt


HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
              "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def bits(tensor: Tensor) -> str:
    """A digest of the tensor's bytes: −0 and 0 differ, NaN equals itself."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.sha256(data).hexdigest()[:16]}"


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a look must not change: parameters, buffers, gradients, flags, hooks, random state, grad mode."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "bits": {name: bits(tensor) for name, tensor in tensors.items()},
        "identity": {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()},
        "wanted": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [list(getattr(module, kind, None) or ()) for kind in HOOK_DICTS]
                  for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "state_dict": list(model.state_dict()),
        "random": bits(torch.get_rng_state()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


# ---- nanoGPT ---------------------------------------------------------------------------------------------------------


@dataclass
class NanoGPTConfig:
    block_size: int = 48
    vocab_size: int = 61
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 24
    dropout: float = 0.0
    flat_positions: bool = True   # positions are (T,); False: (1, T), as in most of nanoGPT's history
    softcap: float | None = None


class NanoGPTBlock(nn.Module):
    def __init__(self, config: NanoGPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, 2 * config.n_embd), nn.GELU(),
                                 nn.Linear(2 * config.n_embd, config.n_embd), nn.Dropout(config.dropout))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, -1))
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """`forward(idx, targets=None)` → (logits, loss); without targets logits are (B, 1, vocab_size) and loss is None."""

    def __init__(self, config: NanoGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(NanoGPTBlock(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} positions in a block of {self.config.block_size}")
        positions = torch.arange(T, device=idx.device)
        positions = positions if self.config.flat_positions else positions.unsqueeze(0)
        parts = self.transformer
        x = parts["drop"](parts["wte"](idx) + parts["wpe"](positions))
        for block in parts["h"]:
            x = block(x)
        x = parts["ln_f"](x)
        logits = self.lm_head(x if targets is not None else x[:, [-1], :])
        if self.config.softcap is not None:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def nano_gpt(seed: int = 0, **config: Any) -> NanoGPT:
    model = NanoGPT(NanoGPTConfig(**config))
    randomise(model, seed, head_std=0.3)
    return model


# ---- tables fed by something computed from ids, and tables inside blocks ---------------------------------------------


@dataclass
class BigramConfig:
    sequence_len: int = 32
    vocab_size: int = 50
    padded_vocab_size: int = 64
    n_layer: int = 2
    n_embd: int = 24
    softcap: float | None = 15.0
    checkpointed: bool = False    # blocks run under activation checkpointing
    reentrant: bool = False
    bigram_first: bool = False    # inside a block the bigram table is read before the value table


class BigramTable(nn.Module):
    """Rows chosen by a hash of an id and its left neighbour; the first position has a row of its own."""

    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.rows = nn.Embedding(4 * config.vocab_size, config.n_embd)

    def forward(self, idx: Tensor) -> Tensor:
        last = self.rows.num_embeddings - 1
        mixed = (idx[:, 1:] * 7919 + idx[:, :-1] * 104729) % last
        return self.rows(torch.cat([torch.full_like(idx[:, :1], last), mixed], dim=1))


class BigramBlock(nn.Module):
    """Causal mean of a value table fed by idx, inside the block: recomputed where blocks are checkpointed."""

    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.values = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.bigram = BigramTable(config)
        self.mix = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.bigram_first = config.bigram_first

    def forward(self, x: Tensor, idx: Tensor) -> Tensor:
        bigram = self.bigram(idx) if self.bigram_first else None
        y = torch.tanh(self.mix(x)) * (1 + self.values(idx)) + (self.bigram(idx) if bigram is None else bigram)
        steps = torch.arange(1, x.size(1) + 1, device=x.device, dtype=x.dtype).unsqueeze(-1)
        return x + self.out(y.cumsum(dim=1) / steps)


class BigramGPT(nn.Module):
    """`forward(idx, targets=None, loss_reduction="mean")` → logits or loss, no cache."""

    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
            "h": nn.ModuleList(BigramBlock(config) for _ in range(config.n_layer)),
        })
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None, loss_reduction: str = "mean") -> Tensor:
        x = F.rms_norm(self.transformer["wte"](idx), (self.config.n_embd,))
        for block in self.transformer["h"]:
            if self.config.checkpointed:
                x = torch.utils.checkpoint.checkpoint(block, x, idx, use_reentrant=self.config.reentrant)
            else:
                x = block(x, idx)
        logits = self.lm_head(F.rms_norm(x, (self.config.n_embd,)))[..., : self.config.vocab_size].float()
        if self.config.softcap is not None:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)


def bigram_gpt(seed: int = 0, **config: Any) -> BigramGPT:
    model = BigramGPT(BigramConfig(**config))
    randomise(model, seed)
    return model


# ---- transformers ----------------------------------------------------------------------------------------------------


def tiny_hf(seed: int = 0, **config: Any) -> nn.Module:
    """NanoChatForCausalLM, two layers, 53 ids, in evaluation mode; no id ends a generation."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    sizes = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": None,
             "pad_token_id": None}
    model = NanoChatForCausalLM(NanoChatConfig(**(sizes | config)))
    randomise(model, seed)
    return model.eval()


# ---- how nanochat's Engine calls a model -----------------------------------------------------------------------------


class EngineCache:
    """Keys and values of some rows; a cache of one row can be copied into every row of a larger one."""

    def __init__(self, batch_size: int, length: int, gpt: GPT) -> None:
        sizes = gpt.config
        per_layer = batch_size, length, sizes.n_kv_head, sizes.n_embd // sizes.n_head
        self.n_layers, self.batch_size = sizes.n_layer, batch_size
        self.pairs = [(torch.zeros(per_layer), torch.zeros(per_layer)) for _ in range(sizes.n_layer)]
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32)
        self.prev_embedding: Tensor | None = None

    def get_pos(self) -> int:
        return int(self.cache_seqlens[0])

    def get_layer_cache(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.pairs[layer]

    def advance(self, steps: int) -> None:
        self.cache_seqlens += steps

    def copy_from(self, one: EngineCache) -> None:
        end = one.get_pos()
        for mine, theirs in zip(self.pairs, one.pairs):
            for to, source in zip(mine, theirs):
                to[:, :end] = source[:, :end]
        self.cache_seqlens.fill_(end)
        if one.prev_embedding is not None:
            self.prev_embedding = one.prev_embedding.expand(self.batch_size, -1, -1).clone()


@torch.inference_mode()
def engine(gpt: GPT, tokens: list[int], num_samples: int = 1, max_tokens: int = 8, temperature: float = 0.0,
           seed: int = 42) -> Iterator[list[int]]:
    """Columns of `num_samples` ids: `gpt.forward` on the prompt once, then on one id per row."""
    rng = torch.Generator().manual_seed(seed)
    first = EngineCache(1, len(tokens), gpt)
    logits = gpt.forward(torch.tensor([tokens]), kv_cache=first)[:, -1].expand(num_samples, -1)
    cache = EngineCache(num_samples, len(tokens) + max_tokens, gpt)
    cache.copy_from(first)
    for _ in range(max_tokens):
        if temperature == 0:
            ids = logits.argmax(dim=-1, keepdim=True)
        else:
            ids = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=rng)
        yield ids[:, 0].tolist()
        logits = gpt.forward(ids, kv_cache=cache)[:, -1]
