"""One optimizer step, however many ranks and micro-batches it is made of.

    loss = Σ over ranks and micro-batches of Σ over graded tokens of −log p(token)  /  number of graded tokens in the step

So a token weighs the same wherever it stands: neither a short row, nor a small last batch, nor another number of ranks
changes the gradient by more than rounding.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import tee
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from omni_adapters.data.buckets import to_bucket
from omni_adapters.data.clips import Batch, ClipSource, loader
from omni_adapters.data.epochs import Order, Step, deal, evenly
from omni_adapters.features import Features, features_to
from omni_adapters.model import OmniGPT
from omni_adapters.shapes import BadInput
from omni_adapters.training.pictures import plotting
from omni_adapters.training.ranks import Ranks, clip_gradients, finish_gradients, gradient_sync
from omni_adapters.training.turns import Turns
from omni_adapters.training.validation import hear

MAX_ROWS = 200_000  # some ten seconds of looking


class MicroLoss(Protocol):
    """Σ of the losses of a micro-batch's graded tokens, a scalar with a gradient."""

    def __call__(self, sound: Features, rows: list[dict[str, Any]], idx: Tensor, targets: Tensor) -> Tensor: ...


def check_start(order: Order, sources: Sequence[ClipSource], turns: Turns, ranks: Ranks, omni: OmniGPT) -> int:
    """Refuse, before a run's folder is begun, what a step would in the middle of it: a plan that the ranks cannot share, rows
    whose words the tokenizer does not know or that outgrow the GPT's positions, validation on the training data, no
    matplotlib for the report. Rank 0 looks at the rows, at `MAX_ROWS` of a source at most.

    Returns a checksum of how the first rows are written: it tells a tokenizer, a question or a form from another.
    """
    if order.num_groups % ranks.num_ranks:
        raise BadInput("options", f"--micro-batches {order.num_groups} for {ranks.num_ranks} ranks",
                       f"a multiple of {ranks.num_ranks}", "each rank gets equally many of a step's micro-batches")
    order.epoch(0)
    manifests = [source.identity.get("manifest_sha256", number) for number, source in enumerate(sources)]
    if len(set(manifests)) < len(manifests):
        raise BadInput("options", "the same manifest as --train and --valid", "clips that are never trained on",
                       "split them: what was trained on says nothing about hearing")
    plotting("finish_run")
    first = [turns.batch(source.load_batch([0])[1])[0].tolist() for source in sources]
    for source in sources if ranks.is_first else ():
        check_rows(source, turns, omni.projector.num_soft_tokens, omni.prepender.anatomy.position_limit)
    return zlib.crc32(json.dumps(first).encode())


def check_rows(source: ClipSource, turns: Turns, soft_tokens: Callable[[int], int], position_limit: int | None) -> None:
    """Up to MAX_ROWS rows, spread evenly: each has words, and room for them beside its sound and, read, beside its transcript.

    soft_tokens: how many so many frames become, `Projector.num_soft_tokens`.
    """
    for number in evenly(len(source), MAX_ROWS):
        row = source.row(number)
        soft = soft_tokens(int(source.lens[number]))
        (asked, answer), (read, _) = turns.parts(row, False), turns.parts(row, True)
        longest = max(soft + len(asked), len(read)) + len(answer) - 1  # the last token is only ever a target
        if position_limit is not None and longest > position_limit:
            raise BadInput("check_rows", f"{row['audio']} with {longest} positions, {soft} of them sound",
                           f"at most {position_limit}, which the GPT has", "cut the clip, or raise --stack, or lower --pool")


def planned_batches(order: Order, source: ClipSource, ranks: Ranks, epoch: int, step_in_epoch: int, *,
                    num_workers: int = 0) -> Iterator[tuple[Step, list[Batch]]]:
    """Every step from `step_in_epoch` of `epoch` on, without end, and this rank's micro-batches of it, loaded ahead."""
    plan, ahead = tee(order.steps(epoch, step_in_epoch))
    shares = (deal(step.groups, ranks.rank, ranks.num_ranks) for step in ahead)
    yield from zip(plan, loader(source, shares, num_workers=num_workers))


def given_sound(omni: OmniGPT, source: ClipSource, sound: Features, idx: Tensor, targets: Tensor,
                bucketed: bool) -> tuple[Tensor, Tensor, dict[str, Features]]:
    """idx, targets and the keyword that hands `sound` to an OmniGPT. `bucketed`, for one that is compiled: of few shapes, and
    encoded beforehand, since encoders' inputs have shapes of their own."""
    if not bucketed:
        return idx, targets, {source.kind: sound}
    features, idx, targets = to_bucket(hear(omni, source, sound), idx, targets, soft_tokens=omni.projector.num_soft_tokens,
                                       room=omni.prepender.anatomy.position_limit)
    return idx, targets, {"audio_features": features}


def train_step(model: nn.Module, omni: OmniGPT, optimizer: torch.optim.Optimizer, turns: Turns, ranks: Ranks,
               batches: Sequence[Batch], micro_loss: MicroLoss, *, seeds: tuple[int, int],
               clip: float, bf16: bool = False) -> dict[str, float]:
    """One update from this rank's micro-batches (sound, rows). Every rank returns the same: {"loss" in nats a token,
    "tokens" graded, "grad_norm" before clipping to `clip`}.

    model: what `wrap` made of omni. seeds: (run, step); with the micro-batch's number among all ranks' they seed its dropout,
    which is then the same on any number of ranks. Raises BadInput, weights untouched, where the gradient is not finite.
    """
    texts = [turns.batch(rows) for _, rows in batches]
    graded = torch.tensor(sum(int((targets != -1).sum()) for _, targets in texts), device=ranks.device)
    num_graded = ranks.sum(graded)
    total = torch.zeros((), device=ranks.device)
    for number, ((sound, rows), (idx, targets)) in enumerate(zip(batches, texts)):
        among_all = number * ranks.num_ranks + ranks.rank  # as `deal` deals
        torch.manual_seed(int(np.random.SeedSequence([*seeds, among_all]).generate_state(1)[0]))
        sound, idx, targets = features_to(sound, ranks.device), idx.to(ranks.device), targets.to(ranks.device)
        with gradient_sync(model, number == len(batches) - 1):
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
                loss = micro_loss(sound, rows, idx, targets)
            (loss / num_graded).backward()
        total += loss.detach()
    finish_gradients(omni, ranks)
    norm = clip_gradients([p for group in optimizer.param_groups for p in group["params"]], clip)
    loss_per_token = float(ranks.sum(total) / num_graded)
    if not norm < float("inf") or loss_per_token != loss_per_token:
        optimizer.zero_grad(set_to_none=True)
        raise BadInput("train_step", f"a loss of {loss_per_token} with a gradient of norm {norm}", "finite numbers",
                       "begin another run (--out) with a lower rate, a longer warm-up, or without --bf16")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss_per_token, "tokens": int(num_graded), "grad_norm": norm}
