"""Checkpoints of wav2vec2, HuBERT, WavLM and w2v-BERT 2.0 with some ten thousand parameters, so that tests need no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WAVES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, conv_dim=(16,) * 7,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=12, layerdrop=0.5, num_codevectors_per_group=4,
    codevector_dim=8, proj_codevector_dim=8,
)
BERT: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, layerdrop=0.5,
                            conv_depthwise_kernel_size=5, vocab_size=12, left_max_position_embeddings=8,
                            right_max_position_embeddings=4)
LAYER_NORM: dict[str, Any] = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)  # as the large ones
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2-group": ("Wav2Vec2", WAVES), "wav2vec2-layer": ("Wav2Vec2", WAVES | LAYER_NORM),
    "hubert-group": ("Hubert", WAVES), "hubert-layer": ("Hubert", WAVES | LAYER_NORM),
    "wavlm-group": ("WavLM", WAVES), "wavlm-layer": ("WavLM", WAVES | LAYER_NORM),
    "bert": ("Wav2Vec2Bert", BERT),
}


def make_tiny_speech(path: str | Path, kind: str, head: str = "Model", seed: int = 0, do_normalize: bool = True,
                     **config: Any) -> Path:
    """Save a random model of a kind in KINDS (width 32, 3 layers) as safetensors with its preprocessor, and return the directory.

    head:   of the class that is saved: "Model", "ForCTC", "ForPreTraining".
    config: overrides entries of the configuration. Vectors and scalars, which begin as ones and zeros, are drawn as well. The
            global random state is left as it was.
    """
    import transformers

    name, sizes = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**sizes | config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(path)
    extractor = (transformers.SeamlessM4TFeatureExtractor() if name == "Wav2Vec2Bert" else
                 transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask="layer" in kind))
    extractor.save_pretrained(path)
    return Path(path)
