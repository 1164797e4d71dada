"""The trained bridge: frames of an encoder in, soft tokens of the GPT's width out.

Notable: nanochat's house style (no bias, fp32 masters cast to the activation dtype), frames stacked before the first
matmul as in SLAM-ASR (arXiv:2402.08846), and a start at zero where asked. Everything else is a part (`projector_parts`,
`encoders.layer_mix`) that stands in its place along the data's way, or is not there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from omni_adapters.encoders.layer_mix import LayerMix
from omni_adapters.features import Features, check_form, full
from omni_adapters.projector_parts import (
    ACTIVATIONS,
    AttentionPool,
    RMSNorm,
    Stack,
    StridedConv,
    draw,
    linear,
    stack_frames,
    zero_padding,
)
from omni_adapters.shapes import BadInput, listing

__all__ = ["Projector", "build_projector", "described_projector", "settings_of", "stack_frames", "wording"]

NORMS = ("in", "mid", "out")
DOWNSAMPLES = ("stack", "conv")
SIZES = ("in_dim", "out_dim", "hidden_dim", "stack")
DEFAULTS: dict[str, Any] = {"num_layers": 1, "normalize_layers": False, "activation": "gelu", "norm": (), "downsample": "stack",
                            "pool": None}


class Projector(nn.Module):
    """fc2(GELU(fc1(stacked frames))), no bias.

        (B, T, in_dim) → stack → (B, ⌈T/stack⌉, stack·in_dim) → fc1 → GELU → fc2 → (B, ⌈T/stack⌉, out_dim)

    With every part in its place:

        zero beyond lens → mix layers → downsample → norm in → fc1 → activation → norm mid → fc2 → norm out → pool

    Frames at and beyond `lens` count as zeros, so the last soft token of a row does not depend on how long its
    batch-mates are. Weights stay in their own dtype (fp32 by default) and are cast to that of the features.

    in_dim:    width of one frame (encoder.d_model).
    out_dim:   width of the GPT (n_embd).
    hidden_dim: what fc2 reads, by default out_dim · 4.
    stack:     frames joined into one soft token; 8 turns Whisper's 50 Hz into 6.25 soft tokens a second.
    zero_init: the last weight before the pool starts at zero (with "out" in norm that norm's gain, since the norm of a zero fc2
               would amplify fc2's first gradient by 1/√1e-6 = 1000; else fc2), so the first step sees norm(0) = 0 as soft
               tokens. The GPT's norm amplifies the first gradient by orders of magnitude: warm the rate up. False draws fc2
               like fc1 and starts the gain at 1.
    num_layers: layers of the encoder side by side in in_dim, mixed into one by learned weights (`LayerMix`); 1: none to mix.
    normalize_layers: each layer gets mean 0 and variance 1 before it is mixed.
    activation: "gelu", or "swiglu" (arXiv:2002.05202): fc1 then makes 2 · hidden_dim, value and gate, as in Ultravox.
    norm:      where RMSNorms stand, of "in" (before fc1), "mid" (before fc2), "out" (after it); None for nowhere. Ultravox has
               "in" and, by version, "mid" or "out".
    downsample: "stack", or "conv": one convolution of stride `stack` whose windows overlap by half (`StridedConv`).
    pool:      number of soft tokens of every clip, however long: learned queries attend to its steps (`AttentionPool`).
               None: one soft token for each step.

    Raises BadInput for features of another width or rank.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int | None = None, *, stack: int = 1,
                 zero_init: bool = True, num_layers: int = 1, normalize_layers: bool = False,
                 activation: Literal["gelu", "swiglu"] = "gelu", norm: Sequence[str] | None = None,
                 downsample: Literal["stack", "conv"] = "stack", pool: int | None = None) -> None:
        super().__init__()
        hidden_dim = 4 * out_dim if hidden_dim is None else hidden_dim
        norm = () if norm is None else norm
        check_sizes({"in_dim": in_dim, "out_dim": out_dim, "hidden_dim": hidden_dim, "stack": stack, "num_layers": num_layers,
                     "pool": 1 if pool is None else pool})
        check_choices(in_dim, num_layers, activation, norm, downsample)
        self.in_dim, self.out_dim, self.hidden_dim, self.stack = in_dim, out_dim, hidden_dim, stack
        self.num_layers, self.normalize_layers, self.activation = num_layers, normalize_layers, activation
        self.norm, self.downsample, self.pool = tuple(place for place in NORMS if place in norm), downsample, pool
        self.zero_init = zero_init
        width, (halves, self.act) = in_dim // num_layers, ACTIVATIONS[activation]
        entry = stack * width if downsample == "stack" else width
        self.mix = LayerMix(num_layers, width, normalize=normalize_layers) if num_layers > 1 else nn.Identity()
        self.downsampling = Stack(stack) if downsample == "stack" else StridedConv(width, stack)
        self.norm_in = RMSNorm(entry) if "in" in norm else nn.Identity()
        self.fc1 = nn.Linear(entry, halves * hidden_dim, bias=False)
        self.norm_mid = RMSNorm(hidden_dim) if "mid" in norm else nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, out_dim, bias=False)
        self.norm_out = RMSNorm(out_dim) if "out" in norm else nn.Identity()
        self.pooling = nn.Identity() if pool is None else AttentionPool(out_dim, pool)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices uniform ±√(3/fan_in), variance 1/fan_in; gains 1, the mix a mean; zero what zero_init says."""
        draw(self.fc1.weight)
        draw(self.fc2.weight)
        for part in self.children():
            if isinstance(part, LayerMix | StridedConv | RMSNorm | AttentionPool):
                part.reset_parameters()
        if self.zero_init:
            last = self.norm_out if isinstance(self.norm_out, RMSNorm) else self.fc2
            nn.init.zeros_(last.weight)

    @overload
    def forward(self, features: Tensor) -> Tensor: ...
    @overload
    def forward(self, features: Features) -> Features: ...

    def forward(self, features: Tensor | Features) -> Tensor | Features:
        given = full(features) if isinstance(features, Tensor) else features
        check_form("Projector", given, self.in_dim, "build it with in_dim = encoder.d_model")
        frames = zero_padding(given)                                             # (B, T, in_dim)
        x, lens = self.downsampling(Features(self.mix(frames.values), frames.lens))
        hidden = self.act(linear(self.norm_in(x), self.fc1))                     # (B, ⌈T/stack⌉, hidden_dim)
        soft = self.norm_out(linear(self.norm_mid(hidden), self.fc2))            # (B, ⌈T/stack⌉, out_dim)
        made: Features = self.pooling(Features(soft, lens))
        return made.values if isinstance(features, Tensor) else made

    def num_soft_tokens(self, num_frames: int) -> int:
        """Of a clip of that many frames: ⌈num_frames / stack⌉, or `pool` if there is a frame."""
        return -(-num_frames // self.stack) if self.pool is None else self.pool * min(num_frames, 1)

    def extra_repr(self) -> str:
        return ", ".join([f"stack={self.stack}", f"zero_init={self.zero_init}",
                          *(f"{name}={value!r}" for name, value in settings_of(self).items())])


def check_sizes(sizes: Mapping[str, object]) -> None:
    """Also what an edited description may hold."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BadInput("Projector", f"{name} = {size!r:.40}", f"{name} ≥ 1, an integer")


def check_choices(in_dim: int, num_layers: int, activation: str, norm: Sequence[str], downsample: str) -> None:
    """Refuse settings that name no part."""
    if in_dim % num_layers:
        raise BadInput("Projector", f"in_dim = {in_dim} for {num_layers} layers", f"a multiple of {num_layers}",
                       "in_dim is encoder.d_model, num_layers · the width of one")
    if activation not in tuple(ACTIVATIONS):
        raise BadInput("Projector", f"activation = {activation!r:.40}", f"one of {', '.join(ACTIVATIONS)}")
    if downsample not in DOWNSAMPLES:
        raise BadInput("Projector", f"downsample = {downsample!r:.40}", f"one of {', '.join(DOWNSAMPLES)}")
    if not isinstance(norm, Collection) or isinstance(norm, str) or any(place not in NORMS for place in norm):
        raise BadInput("Projector", f"norm = {norm!r:.40}", f"a tuple of places among {', '.join(NORMS)}, or None")


def settings_of(projector: Any) -> dict[str, Any]:
    """What a projector has beyond sizes, where it differs from the default; JSON values. {} for a module of another kind."""
    found = {name: getattr(projector, name, default) for name, default in DEFAULTS.items()}
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in found.items() if value != DEFAULTS[name]}


def described_projector(projector: Any) -> dict[str, Any]:
    """What `Projector(**…)` takes to build it again, but for its start: sizes, and what differs from the default."""
    return {name: getattr(projector, name) for name in SIZES} | settings_of(projector)


def build_projector(where: str, described: Mapping[str, Any]) -> Projector:
    """The projector that `described_projector` told of, with new weights. Raises BadInput for settings unknown or missing."""
    if unknown := sorted(set(described) - {*SIZES, *DEFAULTS}):
        raise BadInput(where, f"a projector with {listing(unknown)!r:.100}", f"settings among {', '.join((*SIZES, *DEFAULTS))}",
                       "load it with the version of omni-adapters that saved it, or a newer one")
    if missing := [name for name in SIZES if name not in described]:
        raise BadInput(where, f"a projector without {listing(missing)}", f"the sizes {', '.join(SIZES)}",
                       "save it with OmniGPT.save_adapter")
    return Projector(**described)


def wording(settings: Mapping[str, Any]) -> str:
    """Settings as people read them, on one line: "num_layers 7, norm in mid, pool 16"."""
    listed = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in listed.items())
