"""What tells a GPT or an encoder from others: its sizes, and a digest of its weights.

Hashing a GPT takes seconds, and a run asks several times: its `Digest` hashes again only where a tensor may have changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omni_adapters.anatomy import plain_name, unwrap
from omni_adapters.collective import is_sharded, whole
from omni_adapters.encoders.hf_speech import HFSpeechEncoder
from omni_adapters.encoders.protocol import AudioEncoder, Encoder
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.prepender import SoftTokenPrepender


class Digest:
    """The `digest` of tensors that hardly ever change, computed again only when one of them may have."""

    def __init__(self) -> None:
        self.sha256 = ""
        self.seen: dict[str, tuple[Any, ...]] | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> str:
        """Sharded tensors are taken for those that were digested before they were sharded, unless one of them trains."""
        trains = any(tensor.requires_grad for tensor in tensors.values())
        sharded = any(is_sharded(tensor) for tensor in tensors.values())
        seen = None if sharded else {name: state_of(tensor) for name, tensor in tensors.items()}
        if trains or not self.sha256 or (not sharded and seen != self.seen):
            self.sha256, self.seen = digest(tensors), seen
        return self.sha256


def describe_host(prepender: SoftTokenPrepender, sha256: Digest) -> dict[str, Any]:
    """Sizes of the GPT and a digest of the weights it came with, LoRA left out."""
    anatomy = prepender.anatomy
    state = {plain_name(name): t for name, t in unwrap(prepender.gpt).state_dict(keep_vars=True).items()
             if not name.endswith((".lora_a", ".lora_b"))}
    return {"n_embd": anatomy.n_embd, "vocab_size": anatomy.vocab_size, "num_embeddings": anatomy.num_embeddings,
            "sha256": sha256.of(state)}


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """What it is, where it came from, and a digest of its weights, None where it has none; its rates where it hears;
    `dtype` where that is not float32, and the settings of a Whisper or an HFSpeechEncoder where they are not the defaults."""
    parameters = list(encoder.parameters()) if isinstance(encoder, nn.Module) else []
    weights = encoder.state_dict() if isinstance(encoder, nn.Module) and parameters else {}
    source = getattr(encoder, "source", None)
    described: dict[str, Any] = {"type": type(encoder).__name__, "source": None if source is None else str(source),
                                 "d_model": encoder.d_model, "sha256": digest(weights) if weights else None}
    if isinstance(encoder, AudioEncoder):
        described |= {"frame_rate": float(encoder.frame_rate), "sampling_rate": encoder.sampling_rate}
    if isinstance(encoder, WhisperEncoder | HFSpeechEncoder):
        described |= encoder.settings()
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters}
    return described if dtypes <= {"float32"} else described | {"dtype": ", ".join(sorted(dtypes))}


def state_of(tensor: Tensor) -> tuple[Any, ...]:
    """Changes when the tensor is replaced, cast, moved, or written to in place."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes; of sharded tensors all ranks together.

    float16 and bfloat16 count as the float32 of the same value: nanochat holds in float32 on a CPU what it held in bfloat16
    on CUDA, and an adapter fits both.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(whole(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
