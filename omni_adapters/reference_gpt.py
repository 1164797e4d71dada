"""A small nanochat-style GPT with every feature a host can have, so that tests, demos and users need no checkout.

Notable:
- argument names, forward signature and KV cache protocol are nanochat's (github.com/karpathy/nanochat, nanochat/gpt.py)
- rotary positions, QK norm, grouped-query attention, relu² MLP, RMSNorm without parameters, untied head
- value embeddings gated per head in every other layer, the last one included (ResFormer, arXiv:2410.17897)
- smear: a gated share of the previous token's embedding; backout: part of the mid-depth residual is subtracted
- per-layer residual and x0 scalars, sliding windows by pattern, padded vocabulary, soft-capped logits
- one island: it imports nothing of omni_adapters and nothing of omni_adapters imports it

Shapes: B rows, T tokens, C = n_embd, H = n_head, K = n_kv_head, D = C / H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VALUE_GATE_CHANNELS = 12  # leading channels of x that drive the value gate
SMEAR_GATE_CHANNELS = 24  # leading channels of the embedding that drive the smear gate
SOFTCAP = 15.0            # logits stay within ±SOFTCAP
VOCAB_MULTIPLE = 64       # the vocabulary is padded to a multiple of this many rows


@dataclass
class GPTConfig:
    """Sizes of the architecture, named as nanochat names them.

    `window_pattern` is tiled over the layers: L sees the whole sequence, S a quarter of it; the last layer is always L.
    """

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd = {self.n_embd} must be n_head = {self.n_head} times an even head size")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head = {self.n_head} must be a multiple of n_kv_head = {self.n_kv_head}")
        if self.n_embd < SMEAR_GATE_CHANNELS:
            raise ValueError(f"n_embd = {self.n_embd} must be at least {SMEAR_GATE_CHANNELS}, which the smear gate reads")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern = {self.window_pattern!r} must be made of S and L")


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, no parameters."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """A bias-free matmul whose fp32 master weight is cast to the activation dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Every other layer, counted so that the last has one."""
    return (n_layer - 1 - layer) % 2 == 0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, T, H, D): channel pairs (j, j + D/2) turn by −position · frequency_j."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention of the last T_q of T_k positions, each seeing itself and `window` positions before it.

    q (B, T_q, H, D); k, v (B, T_k, K, D) → (B, T_q, H, D).
    """
    T_q, T_k = q.size(1), k.size(1)
    mask = None
    if T_q > 1 and (T_q != T_k or window < T_k - 1):
        query = torch.arange(T_k - T_q, T_k, device=q.device).unsqueeze(1)
        key = torch.arange(T_k, device=q.device)
        mask = (key <= query) & (query - key <= window)
    elif T_q == 1 and window < T_k - 1:
        k, v = k[:, -window - 1 :], v[:, -window - 1 :]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    causal = mask is None and T_q > 1
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.n_head, self.n_kv_head = layer_idx, config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        gated = has_value_embedding(layer_idx, config.n_layer)
        self.ve_gate = Linear(VALUE_GATE_CHANNELS, self.n_kv_head) if gated else None

    def forward(self, x: Tensor, ve: Tensor | None, cos_sin: tuple[Tensor, Tensor], window: int, kv_cache: Any) -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if ve is not None and self.ve_gate is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, K), 0 … 3
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q, k = norm(rotate(q, *cos_sin)), norm(rotate(k, *cos_sin))
        q, k = 1.2 * q, 1.2 * k  # a sharper softmax than unit-norm q and k give
        if kv_cache is not None:
            k, v = self.remember(k, v, kv_cache)
        return self.c_proj(attend(q, k, v, window).reshape(B, T, C))

    def remember(self, k: Tensor, v: Tensor, kv_cache: Any) -> tuple[Tensor, Tensor]:
        """Write k and v at the cache's position; returns all that is cached up to and with them."""
        keys, values = kv_cache.get_layer_cache(self.layer_idx)
        start = kv_cache.get_pos()
        end = start + k.size(1)
        keys[:, start:end], values[:, start:end] = k, v
        if self.layer_idx == kv_cache.n_layers - 1:
            kv_cache.advance(k.size(1))
        return keys[:, :end], values[:, :end]


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, ve: Tensor | None, cos_sin: tuple[Tensor, Tensor], window: int, kv_cache: Any) -> Tensor:
        x = x + self.attn(norm(x), ve, cos_sin, window, kv_cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The host. `forward(idx, targets=None, kv_cache=None, loss_reduction="mean")` → logits (B, T, vocab_size) or loss.

    Parameters start as `init_weights` leaves them, drawn from torch's global generator: seed it for the same model again.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        rows = -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(rows, config.n_embd),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
        })
        self.lm_head = Linear(config.n_embd, rows)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        kv_dim = config.n_kv_head * (config.n_embd // config.n_head)
        self.value_embeds = nn.ModuleDict({
            str(layer): nn.Embedding(rows, kv_dim)
            for layer in range(config.n_layer) if has_value_embedding(layer, config.n_layer)
        })
        short = -(-config.sequence_len // 4 // 128) * 128  # positions, a quarter rounded up to a tile of 128
        pattern = config.window_pattern
        self.windows = [config.sequence_len if pattern[i % len(pattern)] == "L" else short for i in range(config.n_layer)]
        self.windows[-1] = config.sequence_len
        # Ten times the training length: positions are cheap, and a soft prefix lengthens what was trained as text.
        cos, sin = self.rotary_table(10 * config.sequence_len, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @staticmethod
    def rotary_table(length: int, head_dim: int, base: float = 100_000.0) -> tuple[Tensor, Tensor]:
        """cos and sin, each (1, length, 1, head_dim / 2)."""
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)[None, :, None]
        return angle.cos(), angle.sin()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Unit-variance embeddings, uniform ±√(3/C) into the residual stream, zeros out of it, a near-zero head."""
        bound = (3 / self.config.n_embd) ** 0.5
        nn.init.normal_(self.wte().weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks():
            for layer in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0.0, 0.02)
        for table in self.value_embeds.values():
            assert isinstance(table, nn.Embedding)
            nn.init.uniform_(table.weight, -bound, bound)
        nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)

    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(cast(nn.ModuleList, self.transformer["h"])))

    def wte(self) -> nn.Embedding:
        return cast(nn.Embedding, self.transformer["wte"])

    def get_device(self) -> torch.device:
        return self.wte().weight.device

    def forward(self, idx: Tensor, targets: Tensor | None = None, kv_cache: Any = None,
                loss_reduction: str = "mean") -> Tensor:
        T = idx.size(1)
        start = 0 if kv_cache is None else kv_cache.get_pos()
        if start + T > self.cos.size(1):
            raise ValueError(f"{start + T} positions are past the rotary table of {self.cos.size(1)}")
        cos_sin = self.cos[:, start : start + T], self.sin[:, start : start + T]
        x = self.smear(norm(self.wte()(idx)), kv_cache)
        x0, middle = x, None
        cos_sin = cos_sin[0].to(x.dtype), cos_sin[1].to(x.dtype)
        for layer, block in enumerate(self.blocks()):
            x = self.resid_lambdas[layer].to(x.dtype) * x + self.x0_lambdas[layer].to(x.dtype) * x0
            ve = self.value_embeds[str(layer)](idx).to(x.dtype) if str(layer) in self.value_embeds else None
            x = block(x, ve, cos_sin, self.windows[layer], kv_cache)
            if layer == self.config.n_layer // 2:
                middle = x
        if middle is not None:
            x = x - self.backout_lambda.to(x.dtype) * middle
        logits = self.lm_head(norm(x))[..., : self.config.vocab_size].float()
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)

    def smear(self, x: Tensor, kv_cache: Any) -> Tensor:
        """x_t + λ·σ(gate(x_t))·x_{t−1}; a decode step finds x_{t−1} in the cache, a chunk's first token has none."""
        before = None
        if kv_cache is not None:
            before, kv_cache.prev_embedding = kv_cache.prev_embedding, x[:, -1:]
        if x.size(1) > 1:
            tail = x[:, 1:] + self.smear_share(x[:, 1:]) * x[:, :-1]
            return torch.cat([x[:, :1], tail], dim=1)
        return x if before is None else x + self.smear_share(x) * before

    def smear_share(self, x: Tensor) -> Tensor:
        return self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))

    @torch.inference_mode()
    def generate(self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 seed: int = 42) -> Iterator[int]:
        """Stream token ids, recomputing the whole sequence each step (the plain form; the KV cache is the fast one)."""
        rng = torch.Generator(device=self.get_device()).manual_seed(seed)
        ids = torch.tensor([tokens], device=self.get_device())
        for _ in range(max_tokens):
            logits = self.forward(ids)[:, -1]
            if top_k:
                logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -torch.inf
            if temperature > 0:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=rng)
            else:
                token = logits.argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            yield int(token)
