"""Which samples are trained on together, in plain integers: steps → groups (micro-batches) → sample numbers.

    order = Order(source.lens, max_tokens=30_000, seed=1, num_groups=8)
    for epoch, step, groups in order.steps(*where_the_run_stopped):       # endless; (0, 0) for a new run
        own = deal(groups, rank, num_ranks)                               # 8 / num_ranks micro-batches

Notable:
- A step's groups follow from the lengths, (seed, epoch) and num_groups alone. Ranks only share them out, so the same
  global batches are trained on with any number of ranks that divides num_groups, and two integers resume a run.
- Every sample comes exactly once an epoch, and every step has exactly num_groups groups, of similar length.
- The same on every machine: integers, numpy's raw random bits, stable sorts.
"""

from __future__ import annotations

import heapq
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from omni_adapters.shapes import BadInput, listing, shape

MAX_LEN = 1 << 42  # frames; `_roughly_by_length` multiplies by 1.1 · 2²⁰ in int64


class Step(NamedTuple):
    """One optimizer step's samples: `groups` are the micro-batches of all ranks together, each a list of sample numbers."""

    epoch: int
    step_in_epoch: int
    groups: list[list[int]]

    def checksum(self) -> int:
        """crc32 of the samples and how they are grouped: a log that has it tells which samples a step saw."""
        return zlib.crc32(json.dumps(self.groups).encode())


class Order:
    """The steps of all epochs. One epoch is kept in memory at a time; what is handed out is not to be changed.

    lens:       (num_samples,) integers ≥ 0, the feature frames of each sample, or a stand-in for them.
    max_tokens: a group's B × its longest sample, in frames, stays within this; a longer sample is a group of its own.
    seed:       with the epoch's number, decides the order.
    num_groups: groups of a step.

    Refused with `BadInput`: arguments out of range now, samples that no division can make into steps when an epoch is
    asked for (see `plan_epoch`).
    """

    def __init__(self, lens: npt.ArrayLike, *, max_tokens: int, seed: int, num_groups: int) -> None:
        self.lens = _check_order("Order", lens, max_tokens, seed, num_groups).copy()
        self.max_tokens, self.seed, self.num_groups = max_tokens, seed, num_groups
        self._planned: tuple[int, list[list[list[int]]]] | None = None

    def epoch(self, epoch: int) -> list[list[list[int]]]:
        """The steps of an epoch, as `plan_epoch` gives them."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = None  # before the next one is made: two at once would take twice the memory
            self._planned = epoch, plan_epoch(self.lens, max_tokens=self.max_tokens, seed=self.seed, epoch=epoch,
                                              num_groups=self.num_groups)
        return self._planned[1]

    def steps(self, start_epoch: int = 0, start_step: int = 0) -> Iterator[Step]:
        """Every step from `start_step` of `start_epoch` on, without end.

        To resume, pass the epoch and the number of its steps that are done: `step.epoch, step.step_in_epoch + 1` of the
        last one. All of an epoch's steps done is the start of the next epoch.
        """
        num_steps = len(self.epoch(start_epoch))
        if not (isinstance(start_step, int) and 0 <= start_step <= num_steps):
            raise BadInput("Order.steps", f"start_step {start_step!r}", f"0 ≤ start_step ≤ {num_steps}, the steps of epoch "
                           f"{start_epoch}", "resume with the lengths, max_tokens and num_groups of the run")
        return self._steps(start_epoch, start_step)

    def _steps(self, epoch: int, start: int) -> Iterator[Step]:
        while True:
            for number, groups in enumerate(self.epoch(epoch)[start:], start):
                yield Step(epoch, number, groups)
            epoch, start = epoch + 1, 0


def plan_epoch(lens: npt.ArrayLike, *, max_tokens: int, seed: int, epoch: int, num_groups: int) -> list[list[list[int]]]:
    """The steps of an epoch: each a list of `num_groups` groups, each a list of sample numbers.

    A group's B × its longest sample is at most `max_tokens`; a longer sample is a group of its own. Lengths in a group
    differ by about 10 %, and groups of one step are of similar length. Every sample comes exactly once.

    Where the number of groups does not divide by `num_groups`, the largest are halved until it does. Where no division of
    the samples can do that within max_tokens (fewer samples than num_groups; or nearly all groups of one sample, in a
    number that does not divide) the call is refused, for every seed and epoch alike. `BadInput` too for arguments out of
    range. lens, max_tokens, seed and num_groups are those of `Order`.
    """
    costs = np.maximum(_check_order("plan_epoch", lens, max_tokens, seed, num_groups), 1)  # no frames still take a row
    if not (isinstance(epoch, int) and epoch >= 0):
        raise BadInput("plan_epoch", f"epoch {epoch!r}", "an integer ≥ 0")
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))  # raw bits: numpy may change its shuffle, not these
    noise = bits.random_raw(len(costs))
    groups = fill(_roughly_by_length(costs, noise).tolist(), costs.tolist(), max_tokens)
    if _next_multiple(len(groups), num_groups) > len(costs):
        # Strict order of length gives the fewest groups there can be: what fails now fails in every epoch.
        groups = fill(np.lexsort((noise, costs)).tolist(), costs.tolist(), max_tokens)
    groups = _even(groups, num_groups)
    steps = np.argsort(bits.random_raw(len(groups) // num_groups), kind="stable").tolist()
    return [groups[step * num_groups:(step + 1) * num_groups] for step in steps]


def deal(groups: Sequence[list[int]], rank: int, num_ranks: int) -> list[list[int]]:
    """A step's groups that `rank` trains on: rank, rank + num_ranks, … Every rank gets equally many, or the call is refused."""
    check_rank("deal", rank, num_ranks)
    if len(groups) % num_ranks:
        raise BadInput("deal", f"{len(groups)} groups for {num_ranks} ranks", "equally many groups for every rank",
                       f"make num_groups a multiple of {num_ranks}, or take a number of ranks that divides {len(groups)}")
    return list(groups[rank::num_ranks])


def evenly(num_samples: int, most: int) -> list[int]:
    """Up to `most` of the numbers 0 … num_samples − 1, spread evenly, ascending."""
    count = min(num_samples, most)
    return [place * num_samples // count for place in range(count)]


def check_rank(where: str, rank: int, num_ranks: int) -> None:
    if not (isinstance(rank, int) and isinstance(num_ranks, int) and 0 <= rank < num_ranks):
        raise BadInput(where, f"rank {rank} of {num_ranks}", "0 ≤ rank < num_ranks")


def fill(order: Sequence[int], costs: Sequence[float] | Mapping[int, float], budget: float) -> list[list[int]]:
    """`order` cut into runs of at most `budget`, number × largest cost; what costs more than that stands alone."""
    runs: list[list[int]] = []
    largest = 0.0
    for item in order:
        largest = max(largest, costs[item])
        if runs and (len(runs[-1]) + 1) * largest <= budget:
            runs[-1].append(item)
        else:
            runs.append([item])
            largest = costs[item]
    return runs


def _even(groups: list[list[int]], of: int) -> list[list[int]]:
    """The groups, the largest of them halved until `of` divides their number; the halves stay neighbours."""
    num_samples = sum(map(len, groups))
    if _next_multiple(len(groups), of) > num_samples:
        raise BadInput("plan_epoch", f"{num_samples} samples in at least {len(groups)} groups, {of} to a step",
                       "equally many groups in every step", "raise max_tokens so that groups of two can be halved, or take "
                       f"a num_groups that divides {num_samples}")
    heap, position = [], 0
    for group in groups:
        heap.append((-len(group), position, group))  # equal sizes: the first one
        position += len(group)
    heapq.heapify(heap)
    while len(heap) % of:
        _, position, group = heapq.heappop(heap)
        half = len(group) // 2
        heapq.heappush(heap, (-half, position, group[:half]))
        heapq.heappush(heap, (half - len(group), position + half, group[half:]))
    return [group for _, _, group in sorted(heap, key=lambda entry: entry[1])]


def _roughly_by_length(lens: npt.NDArray[np.int64], noise: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """The order of lens × (1 + noise in [0, 0.1)): neighbours are of similar length, and others in every epoch.

    In integers, because rounding may differ between machines.
    """
    return np.lexsort((noise, (lens << 20) + (noise >> 44).astype(np.int64) * lens // 10))


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _check_order(where: str, lens: npt.ArrayLike, max_tokens: int, seed: int, num_groups: int) -> npt.NDArray[np.int64]:
    """The lengths as int64; refused unless all is in range."""
    values = np.asarray(lens)
    if values.ndim != 1 or values.dtype.kind not in "iu" or not values.size:
        raise BadInput(where, f"lens {shape(values.shape)} of {values.dtype}", "integers (num_samples,), at least one")
    wrong = np.flatnonzero((values < 0) | (values > MAX_LEN)).tolist()
    if wrong:
        raise BadInput(where, f"lengths outside that range for samples {listing(wrong)}", f"0 ≤ lens ≤ {MAX_LEN} frames")
    if not max_tokens >= 1:
        raise BadInput(where, f"max_tokens {max_tokens}", "at least 1")
    if not (isinstance(seed, int) and seed >= 0):
        raise BadInput(where, f"seed {seed!r}", "an integer ≥ 0")
    if isinstance(num_groups, bool) or not (isinstance(num_groups, int) and num_groups >= 1):
        raise BadInput(where, f"num_groups {num_groups!r}", "an integer ≥ 1")
    return values.astype(np.int64)
