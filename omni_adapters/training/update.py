"""One optimizer step, however many ranks and micro-batches it is made of.

    loss = Σ over ranks and micro-batches of Σ over graded tokens of −log p(token)  /  number of graded tokens in the step

So a token weighs the same wherever it stands: neither a short row, nor a small last batch, nor another number of ranks
changes the gradient by more than rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omni_adapters.data.clips import ClipSource
from omni_adapters.data.epochs import Order
from omni_adapters.features import Features, features_to
from omni_adapters.model import OmniGPT
from omni_adapters.shapes import BadInput
from omni_adapters.training.ranks import Ranks, clip_gradients, finish_gradients, gradient_sync
from omni_adapters.training.turns import Turns


class MicroLoss(Protocol):
    """Σ of the losses of a micro-batch's graded tokens, a scalar with a gradient."""

    def __call__(self, sound: Features, rows: list[dict[str, Any]], idx: Tensor, targets: Tensor) -> Tensor: ...


def check_start(order: Order, sources: Sequence[ClipSource], turns: Turns, ranks: Ranks) -> None:
    """Refuse, before a run's folder is begun, what its first step would: a plan that the ranks cannot share, or sound,
    words, a question or a form that not even the first clip of each source goes with."""
    if order.num_groups % ranks.num_ranks:
        raise BadInput("options", f"--micro-batches {order.num_groups} for {ranks.num_ranks} ranks",
                       f"a multiple of {ranks.num_ranks}", "each rank gets equally many of a step's micro-batches")
    order.epoch(0)
    for source in sources:
        turns.batch(source.load_batch([0])[1])


def train_step(model: nn.Module, omni: OmniGPT, optimizer: torch.optim.Optimizer, turns: Turns, ranks: Ranks,
               batches: Sequence[tuple[Features, list[dict[str, Any]]]], micro_loss: MicroLoss, *, clip: float,
               bf16: bool = False) -> dict[str, float]:
    """One update from this rank's micro-batches (sound, rows). Every rank returns the same: {"loss" in nats a token,
    "tokens" graded, "grad_norm" before clipping to `clip`}.

    model: what `wrap` made of omni. Raises BadInput, weights untouched, where the gradient is not finite.
    """
    texts = [turns.batch(rows) for _, rows in batches]
    graded = torch.tensor(sum(int((targets != -1).sum()) for _, targets in texts), device=ranks.device)
    num_graded = ranks.sum(graded)
    total = torch.zeros((), device=ranks.device)
    for number, ((sound, rows), (idx, targets)) in enumerate(zip(batches, texts), start=1):
        sound, idx, targets = features_to(sound, ranks.device), idx.to(ranks.device), targets.to(ranks.device)
        with gradient_sync(model, number == len(batches)):
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
                       "start again from the last checkpoint with a lower rate, a longer warm-up, or without --bf16")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss_per_token, "tokens": int(num_graded), "grad_norm": norm}
