"""How likely a GPT finds each option, having heard: no answer is generated, nothing is drawn, equal input scores equally.

    score(option) = Σ_t log p(token_t | prompt with sound, token_1 … token_{t−1}),   t over the option's tokens and the end token

Notable:
- A sum, not a mean: with the end token each score is the log-probability of one whole answer, these exclude one another, and
  the largest is the answer that the GPT would give if it had to give one of them. A mean per token favours long options, whose
  later tokens follow from their first ones; it is no probability of anything.
- The end token counts: without it "high" could never score below "high and loud", whose beginning it is.
- What remains of a length bias is the GPT's own: one that never saw such answers finds all long ones unlikely. Options of one
  form, which a suite should have, or training on such answers, are the remedy, not a correction of the score.
- Options are not listed in the prompt, so their order cannot matter; of equal scores the first option counts.
- Rows are sorted by length and batched. Each stands as if alone (the prepender's guarantee), so a batch changes no score
  beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from omni_adapters.anatomy import logits_of
from omni_adapters.data.questions import Question
from omni_adapters.features import Features, features_to, pad_rows
from omni_adapters.generate import generate_batch
from omni_adapters.model import OmniGPT
from omni_adapters.shapes import BadInput, MissingExtra
from omni_adapters.training.distill import graded
from omni_adapters.training.turns import Row, Turns

Soft = Sequence[Tensor]  # per question (T_soft, n_embd), on any device


def row_of(question: Question, option: int, text: str = "") -> dict[str, str]:
    """The question with one of its options as its answer, as `Turns` takes it; `text` is what a reader gets for the sound."""
    return {"audio": question.id, "question": question.question, "answer": question.options[option], "text": text}


@torch.no_grad()
def hear(omni: OmniGPT, waveforms: Sequence[Tensor]) -> list[Tensor]:
    """Waveforms (samples,) at the encoder's rate → what the GPT gets of each, soft tokens (T_soft, n_embd), on the CPU."""
    inputs = omni.encoder.preprocess(waveforms)
    values, lens = omni.project(omni.encoder(features_to(inputs, omni.prepender.device())), len(waveforms))
    return [row[:length].cpu() for row, length in zip(values, lens.tolist())]


@torch.no_grad()
def option_scores(omni: OmniGPT, turns: Turns, questions: Sequence[Question], soft: Soft | None,
                  texts: Sequence[str] | None = None, *, max_slots: int = 8192) -> list[list[float]]:
    """Per question, the score of each option in nats: by its soft tokens, or (soft None) by `texts` read in their place.

    max_slots: text and soft tokens in a batch, padding included. Raises BadInput as the prepender does, and for NaN, which would
    make an answer of whatever option comes first; the caller decides about LoRA and evaluation mode.
    """
    rows = [(number, option) for number, question in enumerate(questions) for option in range(len(question.options))]
    asked = [row_of(questions[number], option, texts[number] if texts is not None else "") for number, option in rows]
    lens = [slots(turns, row, None if soft is None else soft[number]) for row, (number, _) in zip(asked, rows)]
    scores = [[0.0] * len(question.options) for question in questions]
    for batch in batches(lens, max_slots):
        heard = None if soft is None else [soft[rows[place][0]] for place in batch]
        for place, score in zip(batch, log_likelihoods(omni, turns, [asked[place] for place in batch], heard)):
            number, option = rows[place]
            if math.isnan(score):
                raise BadInput("option_scores", f"NaN for an option of {questions[number].id}", "log-probabilities",
                               "look at the GPT's weights and its dtype: float16 overflows where bfloat16 does not")
            scores[number][option] = score
    return scores


def log_likelihoods(omni: OmniGPT, turns: Turns, rows: Sequence[Row], soft: Soft | None) -> list[float]:
    """Σ log p of each row's answer and end token, in nats; log-softmax in fp32, sums in fp64."""
    idx, targets = (t.to(omni.prepender.device()) for t in turns.batch(rows, read=soft is None))
    logits = logits_of(omni.prepender(idx, soft_tokens=None if soft is None else on_device(omni, soft)))
    wanted = targets[targets != -1]  # (num_graded,)
    log_p = graded(logits, targets).float().log_softmax(dim=-1).gather(1, wanted.unsqueeze(1)).squeeze(1)
    row_of_target = (targets != -1).nonzero()[:, 0].cpu()
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add(0, row_of_target, log_p.cpu().double())  # MPS has no fp64
    return [float(score) for score in sums.tolist()]


@torch.no_grad()
def transcribe(omni: OmniGPT, turns: Turns, questions: Sequence[Question], soft: Soft, *, max_answer: int,
               max_slots: int = 8192) -> list[str]:
    """Per question, what the GPT answers greedily: for transcriptions, which offer nothing to choose from."""
    answers = [""] * len(questions)
    lens = [slots(turns, row_of(question, 0), heard) + max_answer for question, heard in zip(questions, soft)]
    for batch in batches(lens, max_slots):
        prompts = [turns.prompt(row_of(questions[number], 0)) for number in batch]
        found = generate_batch(omni.prepender, prompts, on_device(omni, [soft[number] for number in batch]),
                               max_tokens=max_answer, stop_ids=[turns.end])
        for number, tokens in zip(batch, found):
            answers[number] = turns.tokenizer.decode(tokens)
    return answers


def best(scores: Sequence[float]) -> int:
    """The index of the largest; of equal ones the lowest."""
    return max(range(len(scores)), key=scores.__getitem__)


def slots(turns: Turns, row: Row, soft: Tensor | None) -> int:
    prompt, answer = turns.parts(row, read=soft is None)
    return len(prompt) + len(answer) + (0 if soft is None else soft.size(0))


def batches(lens: Sequence[int], max_slots: int) -> Iterator[list[int]]:
    """All indices once, shortest first, rows × longest ≤ max_slots; one row alone may be longer."""
    if max_slots < 1:
        raise BadInput("batches", f"max_slots = {max_slots}", "at least 1")
    batch: list[int] = []
    for place in sorted(range(len(lens)), key=lens.__getitem__):
        if batch and (len(batch) + 1) * lens[place] > max_slots:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def on_device(omni: OmniGPT, soft: Soft) -> Features:
    return features_to(pad_rows(soft), omni.prepender.device())


def word_errors(reference: str, said: str) -> tuple[int, int]:
    """Words wrong (substituted, left out, put in) and words of the reference: their sums' ratio is the word error rate.

    jiwer's alignment, after lower case, no punctuation and single blanks; numbers and contractions as they are written. Raises
    MissingExtra.
    """
    try:
        import jiwer
    except ImportError as error:
        raise MissingExtra("word_errors", "jiwer", "eval") from error
    normal = jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip(),
                            jiwer.ReduceToListOfListOfWords()])
    found = jiwer.process_words(reference, said, reference_transform=normal, hypothesis_transform=normal)
    return found.substitutions + found.deletions + found.insertions, found.hits + found.substitutions + found.deletions
