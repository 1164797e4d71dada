"""Does it listen? The same questions with the right sound, another's, silence, and the transcript.

    right         loss and answers with each row's own sound
    shuffled      with another row's: a GPT that ignores its ears scores as with its own
    blank         with the encoder's features of silence, as long
    text_oracle   no sound, LoRA off, the transcript in its place: what this GPT can do at best

`gap` = shuffled − right loss, in nats a token, is the number to watch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from omni_adapters.anatomy import loss_of
from omni_adapters.data.clips import ClipSource
from omni_adapters.data.epochs import Order, evenly
from omni_adapters.eval.listening import exchange, silence
from omni_adapters.features import Features, features_to, select
from omni_adapters.generate import generate_batch
from omni_adapters.model import OmniGPT
from omni_adapters.shapes import BadInput
from omni_adapters.training.turns import Row, Turns, answer_of
from omni_adapters.undisturbed import lora_off, undisturbed

Column = Literal["right", "shuffled", "blank", "text_oracle"]
COLUMNS: tuple[Column, ...] = ("right", "shuffled", "blank", "text_oracle")


def validate(omni: OmniGPT, source: ClipSource, turns: Turns, *, max_tokens: int, max_rows: int = 256,
             max_answer: int = 64, columns: Sequence[Column] = COLUMNS,
             answered: Sequence[Column] = COLUMNS, known: Mapping[Column, dict[str, float]] | None = None) -> dict[str, Any]:
    """Scores of up to `max_rows` samples, the same ones at every call.

    Returns {column: {"loss" (nats a graded token), "exact_match", "word_accuracy"}, "gap", "samples": [what was said and
    heard]}. `max_tokens` is feature frames a batch; `max_answer` tokens an answer. Only the columns in `answered` generate
    answers, which takes by far the most time; scores that are `known` already are taken over.
    Under several ranks each does all of it: with sharded weights they must go in step.
    """
    if len(source) < 2:
        raise BadInput("validate", f"{len(source)} samples", "at least two", "the sound of one is exchanged with another's")
    known = known or {}
    with undisturbed(omni):
        totals = {column: Tally() for column in columns if column not in known}
        for numbers in batches(source, max_tokens, max_rows):
            sound, rows = source.load_batch(numbers)
            features = hear(omni, source, sound)
            for column in totals:
                totals[column].add(*grade(omni, column, features, rows, turns, max_answer if column in answered else 0))
    result: dict[str, Any] = {column: known.get(column) or totals[column].scores() for column in columns}
    if "right" in result and "shuffled" in result:
        result["gap"] = result["shuffled"]["loss"] - result["right"]["loss"]
    result["samples"] = totals["right"].samples[:8] if "right" in totals else []
    return result


class Tally:
    """Sums over batches."""

    def __init__(self) -> None:
        self.loss, self.num_graded, self.num_rows, self.exact = 0.0, 0, 0, 0
        self.words, self.edits = 0, 0
        self.samples: list[dict[str, str]] = []

    def add(self, loss: float, num_graded: int, said: list[str], heard: list[str] | None) -> None:
        self.loss, self.num_graded = self.loss + loss * num_graded, self.num_graded + num_graded
        if heard is None:
            return
        self.num_rows += len(said)
        for one, other in zip(said, heard):
            self.exact += one.split() == other.split()
            self.words += len(one.split())
            self.edits += edits(other.split(), one.split())
            self.samples.append({"said": one, "heard": other})

    def scores(self) -> dict[str, float]:
        scores = {"loss": self.loss / max(1, self.num_graded)}
        if self.num_rows:
            scores["exact_match"] = self.exact / self.num_rows
            scores["word_accuracy"] = max(0.0, 1 - self.edits / max(1, self.words))
        return scores


def batches(source: ClipSource, max_tokens: int, max_rows: int) -> list[list[int]]:
    """Up to max_rows samples, spread evenly over the source, in batches of two or more: one alone has nobody to swap with,
    so a neighbour lends it a clip. Only two or three long clips together exceed max_tokens."""
    chosen = evenly(len(source), max_rows)
    order = Order(source.lens[chosen], max_tokens=max_tokens, seed=0, num_groups=1)
    found: list[list[int]] = []
    for step in order.epoch(0):
        numbers = [chosen[number] for number in step[0]]
        if found and len(found[-1]) == 1:
            found[-1].append(numbers.pop())
        if numbers:
            found.append(numbers)
    if len(found) > 1 and len(found[-1]) == 1:
        last = found.pop()
        if len(found[-1]) > 2:
            found.append([found[-1].pop(), *last])
        else:
            found[-1] += last
    return found


def hear(omni: OmniGPT, source: ClipSource, sound: Features) -> Features:
    """Cached features as they are, encoder inputs through the encoder; on the GPT's device."""
    here = features_to(sound, omni.prepender.device())
    return here if source.kind == "audio_features" else omni.encoder(here)


def grade(omni: OmniGPT, column: Column, features: Features, rows: Sequence[Row], turns: Turns,
          max_answer: int) -> tuple[float, int, list[str], list[str] | None]:
    """Mean loss, graded tokens, what was said, and (max_answer > 0) what was heard greedily."""
    if column == "text_oracle":
        with lora_off(omni):
            return ask(omni, None, rows, turns, max_answer)
    if column == "shuffled":
        features = select(features, exchange(features))
    elif column == "blank":
        features = silence(omni, features)
    return ask(omni, omni.project(features, len(rows)), rows, turns, max_answer)


def ask(omni: OmniGPT, soft: Any, rows: Sequence[Row], turns: Turns,
        max_answer: int) -> tuple[float, int, list[str], list[str] | None]:
    idx, targets = (t.to(omni.prepender.device()) for t in turns.batch(rows, read=soft is None))
    result = omni.prepender(idx, targets, soft)
    heard = None
    if max_answer:
        prompts = [turns.reading(row) if soft is None else turns.prompt(row) for row in rows]
        found = generate_batch(omni.prepender, prompts, soft, max_tokens=max_answer, stop_ids=[turns.end])
        heard = [turns.tokenizer.decode(answer) for answer in found]
    return float(loss_of(result)), int((targets != -1).sum()), [answer_of(row) for row in rows], heard


def edits(heard: Sequence[str], said: Sequence[str]) -> int:
    """Levenshtein distance in words."""
    row = list(range(len(said) + 1))
    for i, word in enumerate(heard, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(said, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]
