"""What teaches an encoder of one's own to hear: what happens and in which order, and what is true of the whole clip.

    heads = AcousticHeads(encoder.d_model, num_events=110, tags={"style": 4, "language": 4})
    loss = heads.loss(encoder(inputs), events, tags)          # then loss.backward(); the heads are thrown away

Notable:
- both losses reach the encoder directly. Through a GPT's answers the same is learned from many times as many clips
- events have an order but no times: CTC (Graves et al. 2006, "Connectionist temporal classification")
- each tag listens where it is told, by a softmax over time of its own (Okabe et al. 2018, "Attentive statistics pooling for deep
  speaker embedding", the mean alone): a melody is at the end of a sentence, a language all over it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapters.features import Features, valid_steps
from omni_adapters.shapes import BadInput, shape

BLANK = 0     # CTC's class; event e is class e + 1
UNKNOWN = -1  # a tag that is not known of a clip


class AcousticHeads(nn.Module):
    """From features (B, T, width) to events in order, and to one of some values of each tag.

    num_events: kinds of events, 0 … num_events − 1.
    tags:       name → how many values it has.
    """

    def __init__(self, width: int, num_events: int, tags: Mapping[str, int]) -> None:
        super().__init__()
        if min([width, num_events, *tags.values()]) < 1:
            raise BadInput("AcousticHeads", f"width {width}, {num_events} events, tags {dict(tags)}", "positive numbers")
        self.tags = dict(tags)
        self.events = nn.Linear(width, num_events + 1)
        self.attention = nn.Linear(width, len(tags))
        self.values = nn.ModuleList(nn.Linear(width, size) for size in tags.values())

    def forward(self, features: Features) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities of CTC's classes (B, T, num_events + 1), and tag → logits (B, values)."""
        there = valid_steps(features).unsqueeze(-1)
        heard = torch.where(there, features.values, 0).to(self.events.weight.dtype)  # padding may hold anything
        scores = self.attention(heard)
        shares = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(dim=1)  # (B, T, tags), of no frames too
        means = torch.einsum("btk,btd->bkd", shares, heard)
        logits = {name: head(means[:, number]) for number, (name, head) in enumerate(zip(self.tags, self.values))}
        return self.events(heard).log_softmax(-1), logits

    def loss(self, features: Features, events: Sequence[Sequence[int]], tags: Mapping[str, Tensor],
             weights: Mapping[str, float] | None = None, tagging: float = 1.0) -> Tensor:
        """CTC's, nats an event, and `tagging` times the mean cross-entropy of the tags that are known, in nats.

        events:  of each clip, in order; a clip that is too short for its events counts as 0.
        tags:    name → (B,) integers, `UNKNOWN` where they are.
        weights: name → how much a tag counts, by default 1.

        Raises BadInput for others than `num_events` and `tags` allow: out of range, ctc_loss reads beyond its memory.
        """
        values, lens = features
        weights = weights or {}
        known = self.known(len(values), events, tags, weights)
        classes, logits = self(features)
        expected = torch.tensor([event + 1 for row in events for event in row], device=values.device)
        sizes = torch.tensor([len(row) for row in events])
        found = F.ctc_loss(classes.transpose(0, 1).float(), expected, lens, sizes, blank=BLANK, zero_infinity=True)
        counts = {name: weights.get(name, 1.0) * number for name, number in known.items()}
        total = sum(counts.values())
        losses = [counts[name] / total * F.cross_entropy(logits[name], tag.long(), ignore_index=UNKNOWN)
                  for name, tag in tags.items() if counts[name]]
        return found + tagging * torch.stack(losses).sum() if losses else found

    def known(self, num_clips: int, events: Sequence[Sequence[int]], tags: Mapping[str, Tensor],
              weights: Mapping[str, float]) -> dict[str, int]:
        """Name → of how many clips the tag is known; refuses what does not fit. Tags come from their device once."""
        unknown = [name for name in (*tags, *weights) if name not in self.tags]
        if unknown or len(events) != num_clips or any(tag.shape != (num_clips,) for tag in tags.values()):
            raise BadInput("AcousticHeads.loss", f"{len(events)} lists of events, tags " + ", ".join(
                [f"{name} {shape(tag.shape)}" for name, tag in tags.items()] + [f"{name}?" for name in unknown]),
                f"{num_clips} of each, tags of {list(self.tags)}")
        top = self.events.out_features - 1
        wrong = [event for row in events for event in row if not 0 <= event < top]
        if wrong:
            raise BadInput("AcousticHeads.loss", f"event {wrong[0]}", f"0 to {top - 1}")
        found = dict(zip(tags, torch.stack([*tags.values()]).tolist())) if tags else {}
        for name, values in found.items():
            if values and not UNKNOWN <= min(values) <= max(values) < self.tags[name]:
                raise BadInput("AcousticHeads.loss", f"tag {name} from {min(values)} to {max(values)}",
                               f"0 to {self.tags[name] - 1}, or {UNKNOWN} where it is not known")
        return {name: len(values) - values.count(UNKNOWN) for name, values in found.items()}
