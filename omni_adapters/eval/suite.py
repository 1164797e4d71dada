"""The same questions to five systems, of which one hears what it is asked about.

    overall       its own sound: the GPT with its ears, which a score is about
    shuffled      another question's sound: who answers as well has not listened, who hears it all gets next to nothing right
    blank         silence, as long, through the encoder
    text_oracle   no sound, LoRA off, what is said written in its place: the most that words can tell this GPT
    cascade       the same GPT reading what a recogniser makes of the sound (`cascade`)

Notable:
- `shuffled` exchanges sounds within a category, so that what is heard is of the kind that is asked about, and gives as many
  questions as possible a sound whose right answer is another. It is fixed by the questions, nothing is drawn.
- Questions without a transcript are not put to the text oracle. Transcriptions are not either, since it would be handed the
  answer; there the cascade is the recogniser's own text.
- All texts are tokenized, and all files looked for, before the first sound is heard: what is refused is refused at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from omni_adapters.data.audio import Waveform
from omni_adapters.data.questions import Question, Suite, file_sha256, read_questions
from omni_adapters.eval.cascade import RECOGNISER_RATE, Cascade, readable
from omni_adapters.eval.public import read_audiobench, read_mmau
from omni_adapters.eval.scoring import Soft, best, hear, option_scores, row_of, transcribe, word_errors
from omni_adapters.model import OmniGPT
from omni_adapters.shapes import BadInput, listing
from omni_adapters.training.hosts import Tokenizer
from omni_adapters.training.turns import Turns
from omni_adapters.undisturbed import lora_off, undisturbed

System = Literal["overall", "shuffled", "blank", "text_oracle", "cascade"]
SYSTEMS: tuple[System, ...] = ("overall", "shuffled", "blank", "text_oracle", "cascade")
READERS = {"mmau": read_mmau, "audiobench": read_audiobench}
CLIPS_AT_ONCE = 8  # heard in one batch


class Graded(NamedTuple):
    """One answer: `points` of `out_of`. Of a choice 1 or 0 of 1 and the option's index, of a transcription the words that are
    wrong, of how many, and the text."""

    points: int
    out_of: int
    said: int | str


class Answers(NamedTuple):
    """graded: per system that was asked, a list like the questions, None where a question was not put to it. transcripts: what
    the recogniser heard, none without a cascade. num_dropped: words of transcripts that the tokenizer cannot write."""

    graded: dict[System, list[Graded | None]]
    transcripts: list[str]
    num_dropped: dict[str, int]


class Heard(NamedTuple):
    """Per question: soft tokens (T_soft, n_embd) of its sound and of a silence as long, and the recogniser's transcript."""

    soft: list[Tensor]
    blank: list[Tensor]
    transcripts: list[str]


def open_suite(name: str) -> Suite:
    """`audiobench-mini`, the path of a question file (`questions`), `mmau:PATH` or `audiobench:PATH` (`public`).

    Raises BadInput for a file that its reader refuses, and for an audiobench-mini that is not the one published.
    """
    kind, colon, path = name.partition(":")
    if colon and kind in READERS:
        return Suite(f"{kind}-{Path(path).stem}", tuple(READERS[kind](path)), file_sha256(path))
    if name != "audiobench-mini":
        return Suite(Path(name).stem, tuple(read_questions(name)), file_sha256(name))
    from omni_adapters.data.texture_questions import AUDIOBENCH_MINI_SHA256, audiobench_mini_path

    source = audiobench_mini_path()
    if file_sha256(source) != AUDIOBENCH_MINI_SHA256:
        raise BadInput("open_suite", f"{source} of another sha256", AUDIOBENCH_MINI_SHA256, "install the package again")
    return Suite(name, tuple(read_questions(source)), AUDIOBENCH_MINI_SHA256)


def turns_of(omni: OmniGPT, tokenizer: Tokenizer) -> Turns:
    """The form of turns whose sound stands where this adapter hears it: chat or plain. BadInput where neither does."""
    forms: dict[int, Literal["chat", "plain"]] = {2: "chat", 1: "plain"}  # by `Turns.insert_at`
    if omni.placeholders is not None or omni.prepender.insert_at not in forms:
        came = f"sound at {omni.prepender.insert_at}" if omni.placeholders is None else "placeholders"
        raise BadInput("turns_of", f"an adapter with {came}", "sound before text position 2 (chat) or 1 (plain), as Turns put it")
    return Turns(tokenizer, forms[omni.prepender.insert_at])


def ask(omni: OmniGPT, turns: Turns, questions: Sequence[Question], cascade: Cascade | None = None, *,
        max_slots: int = 8192, max_answer: int = 128, say: Callable[[str], object] = str) -> Answers:
    """What each system answers. Without a `cascade` that system is left out.

    max_slots: text and soft tokens in a batch of the GPT's, padding included. max_answer: tokens of a transcription. say: gets a
    line after each batch of sounds, which take most of the time where there is a recogniser. Raises BadInput for one question
    alone, choices mixed with transcriptions, texts that the tokenizer refuses, options that it writes alike, missing audio
    files, an adapter whose clips stand at placeholders or elsewhere than `turns` puts them: all of these before anything is
    heard. The GPT is then as before.
    """
    check_questions(omni, turns, questions)
    with undisturbed(omni):
        heard = hear_all(omni, questions, cascade, say)
        other = [heard.soft[number] for number in exchange(questions)]
        sounds: dict[System, Soft] = {"overall": heard.soft, "shuffled": other, "blank": heard.blank}
        if not questions[0].is_choice:
            return transcriptions(omni, turns, questions, sounds, heard.transcripts, max_slots, max_answer)
        graded: dict[System, list[Graded | None]] = {
            system: choices(questions, option_scores(omni, turns, questions, soft, max_slots=max_slots))
            for system, soft in sounds.items()}
        texts: dict[System, list[str | None]] = {"text_oracle": [question.text for question in questions]}
        if cascade is not None:
            texts["cascade"] = list(heard.transcripts)
        dropped: dict[str, int] = {}
        with lora_off(omni):
            for system, written in texts.items():
                graded[system], dropped[system] = read(omni, turns, questions, written, max_slots)
        return Answers(graded, heard.transcripts, dropped)


def check_questions(omni: OmniGPT, turns: Turns, questions: Sequence[Question]) -> None:
    if len(questions) < 2:
        raise BadInput("ask", f"{len(questions)} questions", "at least two", "the sound of one is exchanged with another's")
    if len({question.is_choice for question in questions}) > 1:
        raise BadInput("ask", "choices and transcriptions together", "one or the other", "divide the suite")
    if omni.placeholders is not None or omni.prepender.insert_at != turns.insert_at:
        raise BadInput("ask", f"{turns.form} turns for an adapter that hears elsewhere", "the turns it was trained with",
                       "take turns_of(omni, tokenizer)")
    for question in questions:
        check_texts(turns, question)
    missing = [question.audio for question in questions if question.audio is not None and not Path(question.audio).is_file()]
    if missing:
        raise BadInput("ask", f"{len(missing)} audio files that are not there, {missing[0]} the first", "a file for each")


def check_texts(turns: Turns, question: Question) -> None:
    written = [tuple(turns.parts(row_of(question, option), False)[1]) for option in range(len(question.options))]
    if len(set(written)) < len(written):
        alike = [option for option, tokens in zip(question.options, written) if written.count(tokens) > 1]
        raise BadInput("ask", f"the options {listing(alike)} of {question.id}, which the tokenizer writes alike",
                       "options that differ in their tokens", "no score could tell them apart")
    if not question.is_choice and not word_errors(question.right, "")[1]:
        raise BadInput("ask", f"the transcription {question.id}, whose answer {question.right!r:.80} has no words", "words")


def hear_all(omni: OmniGPT, questions: Sequence[Question], cascade: Cascade | None, say: Callable[[str], object]) -> Heard:
    """Every sound once, a few at a time: waveforms are not kept."""
    heard, silences, rate = Heard([], [], []), dict[int, Tensor](), omni.encoder.sampling_rate
    for start in range(0, len(questions), CLIPS_AT_ONCE):
        some = questions[start:start + CLIPS_AT_ONCE]
        waveforms = [question.waveform(rate) for question in some]
        heard.soft.extend(hear(omni, [torch.from_numpy(waveform) for waveform in waveforms]))
        lens = [len(waveform) for waveform in waveforms]
        new = sorted(set(lens) - set(silences))
        silences |= dict(zip(new, hear(omni, [torch.zeros(length) for length in new]))) if new else {}
        heard.blank.extend(silences[length] for length in lens)
        if cascade is not None:
            heard.transcripts.extend(cascade(waveforms if rate == RECOGNISER_RATE else at_recogniser_rate(some)))
        say(f"{len(heard.soft)} of {len(questions)} sounds heard")
    return heard


def at_recogniser_rate(questions: Sequence[Question]) -> list[Waveform]:
    return [question.waveform(RECOGNISER_RATE) for question in questions]


def choices(questions: Sequence[Question], scores: Sequence[Sequence[float]]) -> list[Graded | None]:
    said = [best(each) for each in scores]
    return [Graded(int(option == question.answer), 1, option) for question, option in zip(questions, said)]


def read(omni: OmniGPT, turns: Turns, questions: Sequence[Question], texts: Sequence[str | None],
         max_slots: int) -> tuple[list[Graded | None], int]:
    """Choices by those who read, None where there is no text; and how many words the tokenizer cannot write."""
    numbers = [number for number, text in enumerate(texts) if text is not None]
    written = [readable(turns.tokenizer, texts[number] or "") for number in numbers]
    asked = [questions[number] for number in numbers]
    scores = option_scores(omni, turns, asked, None, [text for text, _ in written], max_slots=max_slots)
    found: list[Graded | None] = [None] * len(questions)
    for number, answer in zip(numbers, choices(asked, scores)):
        found[number] = answer
    return found, sum(dropped for _, dropped in written)


def transcriptions(omni: OmniGPT, turns: Turns, questions: Sequence[Question], sounds: dict[System, Soft],
                   transcripts: list[str], max_slots: int, max_answer: int) -> Answers:
    texts: dict[System, list[str]] = {
        system: transcribe(omni, turns, questions, soft, max_answer=max_answer, max_slots=max_slots)
        for system, soft in sounds.items()}
    if transcripts:
        texts["cascade"] = transcripts
    graded: dict[System, list[Graded | None]] = {
        system: [Graded(*word_errors(question.right, text), text) for question, text in zip(questions, said)]
        for system, said in texts.items()}
    return Answers(graded, transcripts, {})


def exchange(questions: Sequence[Question]) -> list[int]:
    """Per question the number of another, whose sound it gets: a permutation within each category of two or more.

    Questions of a category are sorted by their right answers and the sounds moved on by as many places as the commonest answer
    has: then none keeps its answer, or as few as can be. Where that leaves a question with the same sound (one that two
    questions share) other distances are tried. A question alone in its category gets the sound of the next one in the suite
    with another answer, which is then heard twice.
    """
    found = [0] * len(questions)
    for group in grouped([question.category for question in questions]).values():
        if len(group) == 1:
            found[group[0]] = stranger(questions, group[0])
            continue
        group = sorted(group, key=lambda number: (questions[number].right, number))
        for number, other in zip(group, moved_on(questions, group)):
            found[number] = other
    return found


def grouped(names: Sequence[str]) -> dict[str, list[int]]:
    """Name → the places where it stands, in the order of first places."""
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        found.setdefault(name, []).append(number)
    return found


def moved_on(questions: Sequence[Question], group: Sequence[int]) -> list[int]:
    """The group, sorted by answer, rotated so that the fewest get their own sound or their own answer again."""
    rights = [questions[number].right for number in group]
    commonest = max(Counter(rights).values())
    least = (0, max(0, 2 * commonest - len(group)))  # no exchange does better
    best_cost, best_moved = (len(group) + 1, 0), list(group)
    for shift in sorted(range(1, len(group)), key=lambda shift: abs(shift - commonest)):
        moved = [*group[shift:], *group[:shift]]
        cost = clashes(questions, group, moved)
        if cost < best_cost:
            best_cost, best_moved = cost, moved
        if best_cost == least:
            break
    return best_moved


def clashes(questions: Sequence[Question], group: Sequence[int], moved: Sequence[int]) -> tuple[int, int]:
    """How many would hear the same sound, and how many one with the same right answer."""
    pairs = [(questions[number], questions[other]) for number, other in zip(group, moved)]
    return (sum((one.audio, one.clip) == (other.audio, other.clip) for one, other in pairs),
            sum(one.right == other.right for one, other in pairs))


def stranger(questions: Sequence[Question], number: int) -> int:
    """The next question round the suite with another right answer; without one, the next."""
    after = [(number + step) % len(questions) for step in range(1, len(questions))]
    return next((other for other in after if questions[other].right != questions[number].right), after[0])
