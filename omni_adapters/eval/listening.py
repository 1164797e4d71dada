"""Does it listen? One batch heard four times: as it is, with another row's sound, in silence, and backwards.

    right      each row's own sound
    shuffled   another row's: a GPT that ignores its ears has the same loss as with its own
    blank      what the encoder makes of silence, as long
    reversed   its own, played backwards: a GPT that hears a timbre but no order has the same loss

`gap` = shuffled − right, in nats a graded token, is what the ear is worth. Losses are kept by row, so that one batch also says
how sure that is: differences are paired, and a gap within two of their standard errors counts as nil.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapters.anatomy import logits_of, loss_of, unwrap
from omni_adapters.features import Features, features_to, select, valid_steps
from omni_adapters.model import OmniGPT
from omni_adapters.senses import Signal
from omni_adapters.shapes import BadInput, listing
from omni_adapters.undisturbed import undisturbed

WHERE = "listening_gap"
IGNORE = -1  # nanochat's ignore_index
SOUND = ("audio", "audio_inputs", "audio_features")
IMAGE = ("image", "image_inputs", "image_features")
MOST_ERRORS = 2.0  # standard errors: a gap within them is nil. Of many rows without a gap 2.3 % exceed them by chance


class NotListening(UserWarning):
    """The right sound is not worth more than another's: the GPT ignores its ears, or the rows are too few to tell."""


class ListeningGap(NamedTuple):
    """Mean losses over the graded tokens of rows with sound, in nats a token, and how sure their main difference is.

    right, shuffled, blank, reversed: what the row heard.
    standard_error: of `gap`, from the differences paired by row.
    num_rows, num_graded: rows with sound and a graded token, and those tokens.
    """

    right: float
    shuffled: float
    blank: float
    reversed: float
    standard_error: float
    num_rows: int
    num_graded: int

    @property
    def gap(self) -> float:
        return self.shuffled - self.right

    @property
    def gaps(self) -> dict[str, float]:
        """Each loss without the right sound − that with it."""
        return {"shuffled": self.gap, "blank": self.blank - self.right, "reversed": self.reversed - self.right}

    @property
    def is_nil(self) -> bool:
        """gap ≤ 0, or ≤ 2 standard errors. NaN is nil too."""
        return not self.gap > max(0.0, MOST_ERRORS * self.standard_error)

    def as_dict(self) -> dict[str, float]:
        """Flat, for a log: the four losses, gap, gap_blank, gap_reversed, standard_error, num_rows, num_graded."""
        return self._asdict() | {"gap": self.gap, "gap_blank": self.gaps["blank"], "gap_reversed": self.gaps["reversed"]}


def listening_gap(omni: OmniGPT, batch: Mapping[str, Any]) -> ListeningGap:
    """What the sound of `batch` is worth to `omni`, at any moment of any training loop.

    batch: what `OmniGPT.forward` takes, by name: idx (B, T), targets (B, T), and one of audio, audio_inputs, audio_features;
           before each row or at placeholders. Images (image, image_inputs, image_features) are seen as they are in all four,
           so that the gap is that of sound alone. Rows without sound may be there; they do not count.

    Shuffled, every row with sound gets that of the row half of them further on, or of the nearest other that sounds different:
    the same clip twice in a batch is not taken for another's. Reversed, waveforms and encoder inputs (time is their last axis)
    go through the encoder again; cached features are reversed themselves, each frame as it was.

    With S_r, R_r a row's summed losses, shuffled and right, and n_r its graded tokens, N in all, over K rows:

        gap = Σ (S_r − R_r) / N        standard_error = √(K / (K − 1) · Σ (S_r − R_r − gap · n_r)²) / N

    which for equal n_r is the standard error of the mean of paired differences (a ratio estimate: Cochran, Sampling Techniques,
    chapter 6). Warns `NotListening` where gap ≤ 0 or gap ≤ 2 standard errors. Two rows say little: chance passes them one time
    in seven, eight rows one in twenty-three (Student's t).

    No gradient, evaluation mode inside; each module's training flag and torch's random state are as before, also after an
    error. Nothing is communicated: under DDP (give it `ddp.module`) each rank asks its own batch, or one rank alone does;
    with sharded weights all ranks have to call. Runs uncompiled around blocks that may be compiled.

    Raises BadInput for what forward refuses, fewer than two rows that have both sound and a graded token, and sounds that
    are all the same.
    """
    omni, sound, image = checked(omni, batch)
    with undisturbed(omni):
        device = omni.prepender.device()
        idx, targets = batch["idx"].to(device), batch["targets"].to(device)
        features = omni.features(idx.size(0), sound, image)
        if features["audio"] is None:
            raise too_few(0)
        heard = features["audio"] = features_to(features["audio"], device)
        right = token_losses(omni, idx, targets, features)
        rows = rows_of(omni, idx)
        graded = graded_tokens(omni, idx, targets, rows[heard.lens > 0])
        num_rows = int(graded.any(dim=1).sum())
        if num_rows < 2:
            raise too_few(num_rows)
        other = exchange(heard, rows)
        if bool(same_sound(heard, other).all()):
            raise BadInput(WHERE, f"{len(other)} clips that are all the same", "at least two that differ",
                           "another's sound says nothing where it is the same")
        wrong = {"shuffled": select(heard, other), "blank": silence(omni, heard), "reversed": backwards(omni, sound, idx.size(0))}
        sums = {name: torch.where(graded, token_losses(omni, idx, targets, features | {"audio": one}), 0.0).sum(dim=1)
                for name, one in wrong.items()}
        result = gap_of({"right": torch.where(graded, right, 0.0).sum(dim=1)} | sums, graded.sum(dim=1))
    if result.is_nil:
        warnings.warn(f"{WHERE}: another's sound costs {result.gap:.4f} ± {result.standard_error:.4f} nats a token over "
                      f"{result.num_rows} rows: nil. The GPT does not listen, or not yet, or the rows are too few to tell",
                      NotListening, stacklevel=2)
    return result


def checked(omni: Any, batch: Mapping[str, Any]) -> tuple[OmniGPT, Signal, Signal]:
    """The module that torch.compile was given, sound and image; what cannot be asked is refused."""
    omni = unwrap(omni)
    if not isinstance(omni, OmniGPT):
        raise BadInput(WHERE, f"a {type(omni).__name__}", "an OmniGPT", "of a wrapper such as DDP give its .module")
    unknown = sorted(set(batch) - {"idx", "targets", *SOUND, *IMAGE})
    if unknown:
        raise BadInput(WHERE, f"{listing(unknown)} in batch", f"idx, targets, one of {', '.join(SOUND)}, and images")
    missing = [name for name in ("idx", "targets") if batch.get(name) is None]
    if missing or all(batch.get(name) is None for name in SOUND):
        raise BadInput(WHERE, f"a batch of {listing(sorted(batch)) or 'nothing'}", f"idx, targets and one of {', '.join(SOUND)}")
    return omni, Signal(*map(batch.get, SOUND)), Signal(*map(batch.get, IMAGE))


def too_few(num_rows: int) -> BadInput:
    return BadInput(WHERE, f"{num_rows} rows with sound and a graded token", "at least two",
                    "the sound of one is exchanged with another's")


# ---- losses --------------------------------------------------------------------------------------------------------------


def token_losses(omni: OmniGPT, idx: Tensor, targets: Tensor, features: Mapping[str, Features | None]) -> Tensor:
    """The loss (B, T) of each target, in fp32 or better, 0 where none is graded.

    By the host's own code or the fused loss where they give it by token, else from the logits.
    """
    soft = omni.placed(features, {name: omni.project(found, idx.size(0), name) for name, found in features.items()})
    by_token = "loss_reduction" in inspect.signature(unwrap(omni.gpt).forward).parameters
    if by_token or omni.prepender.loss == "fused":
        losses = loss_of(omni.prepender(idx, targets, soft, loss_reduction="none")).view(targets.shape)
    else:
        alone = omni.prepender.anatomy.output == "tensor"  # others have logits beside their loss; nanoGPT only there all of them
        logits = logits_of(omni.prepender(idx, None if alone else targets, soft)).float()  # (B, T, vocab_size)
        targets = omni.prepender.graded(WHERE, idx, targets, soft, "none")
        losses = F.cross_entropy(logits.mT, targets, ignore_index=IGNORE, reduction="none")
    return losses if losses.dtype == torch.float64 else losses.float()


def rows_of(omni: OmniGPT, idx: Tensor) -> Tensor:
    """(num_clips,) the row of idx that each clip belongs to: its own, or where its placeholder stands."""
    if omni.placeholders is None:
        return torch.arange(idx.size(0), device=idx.device)
    return (idx == omni.placeholders["audio"]).nonzero()[:, 0]


def graded_tokens(omni: OmniGPT, idx: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """(B, T) bool: targets that count, in the given rows. Placeholders are never graded."""
    ours = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    ours[rows] = True
    graded = (targets != IGNORE) & ours.unsqueeze(1)
    for placeholder in (omni.placeholders or {}).values():
        graded &= targets != placeholder
    return graded


def gap_of(sums: Mapping[str, Tensor], counts: Tensor) -> ListeningGap:
    """Each row's summed loss (B,) by what it heard, and its graded tokens (B,) → the means, as `listening_gap` writes them."""
    counted = counts > 0
    n = counts[counted].double()
    rows = {name: total[counted].double() for name, total in sums.items()}
    differences = rows["shuffled"] - rows["right"]
    spread = differences - differences.sum() / n.sum() * n
    error = (len(n) / (len(n) - 1) * spread.square().sum()).sqrt() / n.sum()
    means = {name: float(total.sum() / n.sum()) for name, total in rows.items()}
    return ListeningGap(**means, standard_error=float(error), num_rows=len(n), num_graded=int(n.sum()))


# ---- other sounds --------------------------------------------------------------------------------------------------------


def exchange(features: Features, rows: Tensor | None = None) -> Tensor:
    """(num_clips,) whose sound each clip is given: that of the clip half of them further on. Clips of length 0 keep theirs.

    Where that is the same sound or, for several clips a row, the same row, another distance may do better; of equally good
    ones the nearest to half is taken. rows (num_clips,): where each clip stands; None where each has a row of its own.
    """
    own = torch.arange(len(features.lens), device=features.lens.device)
    rows = own if rows is None else rows
    sounding = own[features.lens > 0]
    half = max(1, len(sounding) // 2)
    best, fewest = own, len(own) + 1
    for distance in sorted(range(1, max(2, len(sounding))), key=lambda distance: abs(distance - half)):
        other = own.clone()
        other[sounding] = sounding.roll(distance)
        idle = int(((same_sound(features, other) | (rows[other] == rows)) & (features.lens > 0)).sum())
        if idle < fewest:
            best, fewest = other, idle
        if not idle:
            break
    return best


def same_sound(features: Features, other: Tensor) -> Tensor:
    """(num_clips,) bool: whether a clip is, frame for frame, the one whose number stands in `other`."""
    values = torch.where(valid_steps(features).unsqueeze(-1), features.values, 0)
    return (features.lens == features.lens[other]) & (values == values[other]).flatten(1).all(dim=1)


def silence(omni: OmniGPT, features: Features) -> Features:
    """What the encoder makes of a silence as long as the longest row, cut to each row's length.

    Convolutions without padding make of n frames' worth of samples one frame less: silence then goes on as it ended, so that
    no row gives itself away by being shorter. Where clips are shorter than some encoders take, 0.1 s is made and cut.
    """
    longest, encoder = int(features.lens.max()), omni.encoder
    samples = max(round(longest / encoder.frame_rate * encoder.sampling_rate), encoder.sampling_rate // 10)
    heard = encoder(features_to(encoder.preprocess([torch.zeros(samples)]), features.values.device))
    steps = torch.arange(longest, device=heard.values.device).clamp(max=int(heard.lens) - 1)
    values = heard.values.to(features.values.dtype)[:, steps].expand(len(features.lens), -1, -1)
    return Features(values, features.lens)


def backwards(omni: OmniGPT, sound: Signal, num_rows: int) -> Features:
    """Features of the sound played backwards, in the form in which it came."""
    if sound.clips is not None:
        flipped = [None if clip is None else clip[::-1].copy() if isinstance(clip, np.ndarray) else clip.flip(0)
                   for clip in sound.clips]
        sound = Signal(flipped)
    elif sound.inputs is not None:
        frames = backwards_in_time(Features(sound.inputs.values.transpose(1, -1), sound.inputs.lens))
        sound = Signal(inputs=Features(frames.values.transpose(1, -1), frames.lens))
    else:
        assert sound.features is not None
        return features_to(backwards_in_time(sound.features), omni.prepender.device())
    found = omni.senses()["audio"].features(sound, num_rows if omni.placeholders is None else None)
    assert found is not None  # since it was not, played forwards
    return features_to(found, omni.prepender.device())


def backwards_in_time(features: Features) -> Features:
    """values (B, T, …): each row's valid steps in reverse, what lies beyond as it was."""
    steps = torch.arange(features.values.size(1), device=features.values.device).expand(len(features.lens), -1)
    source = torch.where(valid_steps(features), features.lens.unsqueeze(1) - 1 - steps, steps)
    rows = torch.arange(len(features.lens), device=source.device).unsqueeze(1)
    return Features(features.values[rows, source], features.lens)
