"""The forward that nanochat-omni patched by hand, as an independent plain function: the yardstick for the prepender.

Audio features, normed, are concatenated before the text after smear; rotary tables are sliced for the longer sequence;
value embeddings see id 0 in the prefix; targets are padded with −1; there is no KV cache. It drives the sub-modules of a
reference GPT one by one and knows nothing of hooks.
"""

import torch
import torch.nn.functional as F

from omni_adapters.reference_gpt import GPT, SOFTCAP, norm


def hand_patched_logits(gpt: GPT, idx: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Logits (B, T_soft + T, vocab_size) for soft tokens (B, T_soft, n_embd) before the text idx (B, T)."""
    B, T_soft = soft.shape[:2]
    T_all = T_soft + idx.size(1)
    text = gpt.smear(norm(gpt.transformer.wte(idx)), None) if idx.size(1) else gpt.transformer.wte(idx)
    x = x0 = torch.cat([norm(soft.to(text.dtype)), text], dim=1)
    ids = torch.cat([idx.new_zeros(B, T_soft), idx], dim=1)
    cos_sin = gpt.cos[:, :T_all], gpt.sin[:, :T_all]
    for layer, block in enumerate(gpt.transformer.h):
        x = gpt.resid_lambdas[layer] * x + gpt.x0_lambdas[layer] * x0
        ve = gpt.value_embeds[str(layer)](ids) if str(layer) in gpt.value_embeds else None
        x = block(x, ve, cos_sin, gpt.windows[layer], None)
        if layer == gpt.config.n_layer // 2:
            middle = x
    x = norm(x - gpt.backout_lambda * middle)
    logits = gpt.lm_head(x)[..., : gpt.config.vocab_size].float()
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def hand_patched_loss(gpt: GPT, idx: torch.Tensor, targets: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """The mean loss with targets padded by −1 over the prefix."""
    logits = hand_patched_logits(gpt, idx, soft)
    padded = torch.cat([targets.new_full(soft.shape[:2], -1), targets], dim=1)
    return F.cross_entropy(logits.flatten(0, 1), padded.flatten(), ignore_index=-1)
