"""Generating behind 30 s of sound: the first token's latency, and many tokens, with a KV cache and without.

The hand-patched forward has no cache: each token runs sound and text again, and the vocabulary matmul over all of them. The
prepender without its cache reads the head at text positions only. `generate` fills a cache with sound and prompt, then runs one
slot a token. 30 s are 188 soft tokens (Whisper's 50 Hz stacked by 8) or 1500 (not stacked). Greedy, one row, batch 1, as a chat.

Errors are those of the last position's logits against the hand-patched forward in fp64, at the prompt and, through the cache,
one by one behind it; in fp32 the greedy tokens must be the same as well.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.group import Device, Group, Suite, Variant
from benchmarks.step import DTYPE, FLOOR, build_gpt, view_of
from omni_adapters import SoftTokenPrepender
from omni_adapters.decoding import Decoder
from omni_adapters.reference_gpt import GPT

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hand_patched import hand_patched_logits  # baselines live with the tests

PROMPT = 16  # text tokens
FORCED = 4   # tokens behind the prompt at which logits are compared
NEW = {("quick", "cpu"): 4, ("full", "cpu"): 8, ("quick", "cuda"): 16, ("full", "cuda"): 64}
NAMES = ("hand-patched, no cache", "prepender, no cache", "generate")

Generate = Callable[[int], list[int]]   # greedy: number of tokens → tokens
Forced = Callable[[list[int]], Tensor]  # n tokens behind the prompt → logits (1 + n, vocab_size) from its last position on


def groups(suite: Suite, device: Device) -> Iterator[Group]:
    for depth in (6,) if suite == "quick" else (6, 12):
        for T_soft in (188, 1500):
            yield from groups_of(depth, T_soft, NEW[suite, device], device)


def groups_of(depth: int, T_soft: int, num_new: int, device: Device) -> Iterator[Group]:
    speaker = Speaker(depth, T_soft, device)
    expected = speaker.expected()
    found = {name: (generate, speaker.error(forced, expected)) for name, generate, forced in speaker.ways()}
    bound = max(FLOOR[DTYPE[device]], 3 * found[NAMES[0]][1])
    said = {name: generate(num_new) for name, (generate, _) in found.items()}
    same = {name: DTYPE[device] is not torch.float32 or tokens == said[NAMES[0]] for name, tokens in said.items()}
    size = f"d{depth}, {T_soft} soft + {PROMPT} text tokens, {'fp32' if DTYPE[device] is torch.float32 else 'bf16'}"
    for num, case in ((1, f"{size}: first token"), (num_new, f"{size}: {num_new} new tokens")):
        variants = [Variant(name, partial(generate, num), error=error if same[name] else float("inf"),
                            flops=speaker.flops(generate, num), bytes=speaker.least_bytes(num))
                    for name, (generate, error) in found.items()]
        yield Group("decode", case, NAMES[0], variants, bound)


class Speaker:
    """A GPT with soft tokens and a prompt, and the ways to go on from there."""

    def __init__(self, depth: int, T_soft: int, device: Device) -> None:
        torch.manual_seed(0)
        self.dtype = DTYPE[device]
        self.gpt = build_gpt(depth, device).requires_grad_(False)
        self.gpt.wte().to(self.dtype)
        self.gpt.value_embeds.to(self.dtype)
        self.twin = copy.deepcopy(self.gpt).double()  # before hooks
        self.prepender = SoftTokenPrepender(self.gpt, value_embeds="placeholder")  # what the hand-patched forward computes
        tokens = torch.randint(self.gpt.config.vocab_size, (PROMPT + FORCED,)).tolist()
        self.prompt, self.behind = tokens[:PROMPT], tokens[PROMPT:]
        self.soft = torch.randn(1, T_soft, self.gpt.config.n_embd, device=device, dtype=self.dtype)
        self.view = view_of(self.gpt, self.dtype)

    def ways(self) -> Iterator[tuple[str, Generate, Forced]]:
        yield NAMES[0], *recomputing(self.prompt, lambda idx: hand_patched_logits(self.view, idx, self.soft)[0, -1], self.gpt)
        yield NAMES[1], *recomputing(self.prompt, lambda idx: self.prepender(idx, None, self.soft)[0, -1], self.gpt)
        yield NAMES[2], self.generate, self.cached

    def generate(self, num: int) -> list[int]:
        return list(self.prepender.generate(self.prompt, self.soft, max_tokens=num, temperature=0.0))

    @torch.inference_mode()
    def cached(self, behind: list[int]) -> Tensor:
        idx = torch.tensor([self.prompt], device=self.soft.device)
        decoder = Decoder(self.prepender, idx, self.soft, self.soft.size(1) + PROMPT + len(behind))
        return torch.cat([decoder.start(), *(decoder.step(idx.new_tensor([[token]])) for token in behind)])

    @torch.inference_mode()
    def expected(self) -> Tensor:
        idx = torch.tensor([self.prompt + self.behind], device=self.soft.device)
        logits = hand_patched_logits(self.twin, idx, self.soft.double())[0, -1 - FORCED :]
        del self.twin
        return logits

    def error(self, forced: Forced, expected: Tensor) -> float:
        """Relative to the largest logit."""
        return float((forced(self.behind).double() - expected).abs().max() / expected.abs().max())

    def flops(self, generate: Generate, num: int) -> float:
        with FlopCounterMode(display=False) as counter:
            generate(num)
        return float(counter.get_total_flops())

    def least_bytes(self, num: int) -> float:
        """Each token reads every matmul's weight."""
        return float(num * sum(m.weight.nbytes for m in self.gpt.modules() if isinstance(m, nn.Linear)))


def recomputing(prompt: list[int], logits_of: Callable[[Tensor], Tensor], gpt: GPT) -> tuple[Generate, Forced]:
    """Both ways to ask a forward without a cache; logits_of: idx (1, T) → those of the last position (vocab_size,)."""
    start = torch.tensor([prompt], device=gpt.get_device())

    @torch.inference_mode()
    def generate(num: int) -> list[int]:
        idx = start
        for _ in range(num):
            idx = torch.cat([idx, logits_of(idx).argmax().view(1, 1)], dim=1)
        return idx[0, len(prompt):].tolist()

    @torch.inference_mode()
    def forced(behind: list[int]) -> Tensor:
        whole = torch.cat([start, start.new_tensor([behind])], dim=1)
        return torch.stack([logits_of(whole[:, : len(prompt) + number]) for number in range(len(behind) + 1)])

    return generate, forced
