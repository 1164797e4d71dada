"""A Whisper checkpoint of 190 thousand encoder parameters, so that tests need no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def make_tiny_whisper(path: str | Path, seed: int = 0, **config: Any) -> Path:
    """Save a random Whisper (d_model 64, 2 encoder layers, 80 mels, 30 s) as safetensors with its preprocessor.

    `config` overrides entries of WhisperConfig. The global random state is left as it was. Returns the directory.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    sizes: dict[str, Any] = dict(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=80, max_source_positions=1500, max_target_positions=32,
        vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, dropout=0.1,
    )
    sizes.update(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        WhisperForConditionalGeneration(WhisperConfig(**sizes)).save_pretrained(path)
    WhisperFeatureExtractor(feature_size=sizes["num_mel_bins"]).save_pretrained(path)
    return Path(path)
