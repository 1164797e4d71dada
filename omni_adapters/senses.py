"""One sense of an OmniGPT: a frozen encoder, the projector behind it, and the forms in which a signal may enter.

    clips ─preprocess─► inputs ─encoder─► features ─projector─► soft tokens

Notable:
- the projector runs in every forward, also where nothing is heard or seen: processes that share its weights meet in it
- a sense without a signal still gets a gradient, of zero: its soft tokens ride behind those of another, where nobody looks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omni_adapters.encoders.protocol import AudioEncoder, Encoder
from omni_adapters.features import Features, check_form, features_to
from omni_adapters.projector import Projector
from omni_adapters.shapes import BadInput

PROTOCOLS: dict[str, tuple[type, str]] = {
    "audio": (AudioEncoder, "an AudioEncoder: sampling_rate, d_model, frame_rate, preprocess and a call"),
    "image": (Encoder, "an Encoder: d_model, preprocess and a call"),
}


class Signal(NamedTuple):
    """What a caller gives to one sense, in at most one form."""

    clips: Sequence[Any] | None = None   # as encoder.preprocess takes them; None for a row without
    inputs: Features | None = None       # what encoder.preprocess returned
    features: Features | None = None     # what the encoder returned


class Sense(NamedTuple):
    """name: "audio" or "image"; projector.in_dim is encoder.d_model."""

    name: str
    encoder: Encoder
    projector: Projector

    def check(self, n_embd: int) -> None:
        """Refuse an encoder of another protocol, and widths that do not meet."""
        protocol, words = PROTOCOLS[self.name]
        if not isinstance(self.encoder, protocol):
            raise BadInput("OmniGPT", f"an encoder of type {type(self.encoder).__name__}", words)
        if not all(hasattr(self.projector, name) for name in ("in_dim", "out_dim", "fc1")):
            raise BadInput("OmniGPT", f"a projector of type {type(self.projector).__name__}", "a Projector")
        if self.projector.in_dim != self.encoder.d_model:
            raise BadInput("OmniGPT", f"a projector for features {self.projector.in_dim} wide",
                           f"{self.encoder.d_model}, encoder.d_model")
        if self.projector.out_dim != n_embd:
            raise BadInput("OmniGPT", f"a projector to {self.projector.out_dim}", f"{n_embd}, the GPT's n_embd")

    def freeze(self) -> None:
        if isinstance(self.encoder, nn.Module):
            self.encoder.requires_grad_(False).eval()

    def features(self, signal: Signal, num_rows: int | None) -> Features | None:
        """A signal in any form → features (B, T, d_model), one row a clip; None where there is not one frame.

        num_rows: of idx, where each row has one clip or None; None where clips stand at placeholders.
        """
        forms = (self.name, f"{self.name}_inputs", f"{self.name}_features")
        given = [form for form, value in zip(forms, signal) if value is not None]
        if len(given) > 1:
            raise BadInput("OmniGPT", " and ".join(given), f"one form of {self.name}")
        if signal.clips is not None and num_rows is not None and len(signal.clips) != num_rows:
            raise BadInput("OmniGPT", f"{len(signal.clips)} clips for {num_rows} rows of idx", "one per row, or None for silence")
        features = signal.features
        if signal.clips is not None:
            features = self.encode(signal.clips, at_placeholders=num_rows is None)
        elif signal.inputs is not None:
            features = self.encoder(signal.inputs)
        if features is None or features.values.numel():
            return features
        check_form("OmniGPT", features, self.encoder.d_model)
        if num_rows is not None and features.lens.size(0) != num_rows:
            raise BadInput("OmniGPT", f"{features.lens.size(0)} rows of features for {num_rows} rows of idx", "one per row")
        return None

    def encode(self, clips: Sequence[Any], at_placeholders: bool) -> Features | None:
        """Clips → features (B, T, d_model); rows of None get length 0. None where every row is None."""
        given = [row for row, clip in enumerate(clips) if clip is not None]
        if not given:
            return None
        if len(given) < len(clips) and at_placeholders:
            raise BadInput("OmniGPT", f"{len(clips) - len(given)} clips that are None", "a clip for each placeholder",
                           "leave the placeholder out of a row without one")
        values, lens = self.encoder(self.encoder.preprocess([clip for clip in clips if clip is not None]))
        rows = torch.tensor(given, device=values.device)
        every = values.new_zeros(len(clips), *values.shape[1:]).index_copy(0, rows, values)
        return Features(every, lens.new_zeros(len(clips)).index_copy(0, rows, lens))

    def soft_tokens(self, features: Features | None, num_rows: int, device: torch.device) -> Features:
        """Features → soft tokens (B, ceil(T / stack), n_embd); nothing → one of length 0 for each of `num_rows`.

        float16 is for storing: gradients of soft tokens near zero, where the GPT's norm is steepest, pass its 65,504."""
        if features is None:
            nothing = torch.zeros(num_rows, 1, self.encoder.d_model, device=device)
            features = Features(nothing, torch.zeros(num_rows, dtype=torch.int64, device=device))
        dtype = self.projector.fc1.weight.dtype if features.values.dtype is torch.float16 else features.values.dtype
        return self.projector(features_to(features, device, dtype))


def carrying(soft: Features, riders: Sequence[Features]) -> Features:
    """`soft` with one step of each rider behind its padding: never gathered, but part of the graph."""
    steps = [values[:1, :1].expand(soft.values.size(0), 1, -1) for values, _ in riders]
    return Features(torch.cat([soft.values, *steps], dim=1), soft.lens) if steps else soft


def no_clips(soft: Features) -> Features:
    """What stands for a sense whose placeholder must not occur."""
    return Features(soft.values[:0], soft.lens[:0])


def encoder_statistics(encoder: Encoder) -> dict[str, Tensor]:
    """What an encoder without weights was fitted to (a log-mel's mean and deviation), which an adapter then holds."""
    fitted = isinstance(encoder, nn.Module) and not list(encoder.parameters())
    return dict(encoder.state_dict()) if fitted and isinstance(encoder, nn.Module) else {}
