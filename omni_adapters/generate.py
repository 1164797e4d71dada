"""Many prompts at once: rows whose fused lengths agree share one KV cache, the others wait their turn.

A GPT without an attention mask cannot decode rows of different lengths side by side (nanochat's cache keeps one position
for all rows), and padding between prompt and answer would be heard.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapters import layout
from omni_adapters.decoding import Decoder, check_sampling, stream
from omni_adapters.features import Features, full, select
from omni_adapters.prepender import SoftTokenPrepender, as_row
from omni_adapters.shapes import BadInput


def generate_batch(prepender: SoftTokenPrepender, prompts: Sequence[list[int]],
                   soft_tokens: Tensor | Features | None = None, *, max_tokens: int, stop_ids: Sequence[int] = (),
                   temperature: float = 0.0, top_k: int | None = None, seed: int = 42) -> list[list[int]]:
    """One answer per prompt, without its stop id: what `prepender.generate` would stream for each row alone.

    soft_tokens: one clip per prompt, (B, T_soft, n_embd) or ragged Features, put before text position `insert_at`.
    Greedy by default; above temperature 0 the groups are sampled one after another from the same seed. A group ends
    when all its rows have met a stop id.
    """
    where = "generate_batch"
    check_sampling(where, max_tokens, temperature, top_k)
    clips = full(soft_tokens) if isinstance(soft_tokens, Tensor) else soft_tokens
    if clips is not None and clips.values.size(0) != len(prompts):
        raise BadInput(where, f"{clips.values.size(0)} clips for {len(prompts)} prompts", "one clip per prompt",
                       "give a prompt without sound a clip of length 0")
    rows = [as_row(where, prompt, prepender.device())[0] for prompt in prompts]
    soft_lens = [0] * len(rows) if clips is None else clips.lens.tolist()
    answers: list[list[int]] = [[] for _ in rows]
    for group in layout.groups([len(row) + soft for row, soft in zip(rows, soft_lens)]):
        text_lens = torch.tensor([len(rows[i]) for i in group], device=prepender.device())
        longest = int(text_lens.max())
        idx = torch.stack([F.pad(rows[i], (0, longest - len(rows[i]))) for i in group])
        heard = None if clips is None else select(clips, group)
        room = prepender.room(where, idx, heard, max_tokens, text_lens)
        open_rows = set(range(len(group)))
        for ids in stream(Decoder(prepender, idx, heard, room, text_lens), max_tokens, temperature, top_k, seed):
            for row in sorted(open_rows):
                token = int(ids[row])
                if token in stop_ids:
                    open_rows.discard(row)
                else:
                    answers[group[row]].append(token)
            if not open_rows:
                break
    return answers
