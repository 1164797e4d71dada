"""From a GPT that has only ever read to one that hears how something was said, on two CPU cores in half an hour.

    python examples/texture.py --out runs/texture           (--minutes 5 for a quick look, --minutes 60 for more)

1. Describe a corpus: thousands of clips of which everything is known, who speaks, how high, fast and loud, in which manner and
   language, before which background (`omni_adapters.data.texture`).
2. A small GPT learns from text alone. It reads screenplays of such clips, a word or a direction for each tenth of a second,
   `(silence) tiger (very-quiet) tiger (man) (pause) lemon`, repeats what is said, describes the sound and answers questions.
3. The clips are spoken at two speeds. A small encoder learns to hear them, words by CTC and texture by tags, without any GPT, and
   is frozen (`omni_adapters.encoders.conv`); --encoder names a pretrained one instead.
4. Stage 1: the GPT frozen, a projector learns to stand in for the screenplay.
5. Stage 2: LoRA on the GPT and the projector learn together.
6. AudioBench-mini: 200 questions about voices and sentences never heard, beside another clip's sound, silence, the transcript,
   and a speech recogniser in front of the same GPT.

Writes DIR/{gpt/, ears/, adapter.safetensors, loss.png, metrics.json, audiobench-mini.json, audiobench-mini.png}, and
layer_mix.png where the encoder gives several layers. The same options give the same GPT, clips and questions; --minutes decides
how much is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate, count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from omni_adapters import Features, OmniGPT, Projector, __version__
from omni_adapters.data.audio import resample
from omni_adapters.data.collate import collate
from omni_adapters.data.texture import DIGITS, VOICES, WORDS, Clip
from omni_adapters.data.texture_lessons import DIRECTIONS, TEXTURE, draw_evenly, events, notes, screenplay, truths
from omni_adapters.data.texture_questions import CATEGORIES, ask, vocabulary
from omni_adapters.data.texture_sound import render
from omni_adapters.encoders.conv import ConvEncoder
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.encoders.log_mel_pitch import LogMelPitchEncoder
from omni_adapters.encoders.protocol import AudioEncoder
from omni_adapters.eval import listening_gap
from omni_adapters.eval import suite as suites
from omni_adapters.eval.cascade import Cascade
from omni_adapters.eval.report import make_report, scoreboard, write_report
from omni_adapters.features import pad_rows
from omni_adapters.files import write_whole
from omni_adapters.fingerprints import digest
from omni_adapters.processes import worker_pool
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.training.acoustic import UNKNOWN, AcousticHeads
from omni_adapters.training.hosts import SPECIALS, WordTokenizer, save_reference
from omni_adapters.training.options import ENCODER_HELP, add_context_option, add_layer_option
from omni_adapters.training.pictures import draw_layer_mix, draw_stages
from omni_adapters.training.report import layer_mix
from omni_adapters.training.schedule import warmup_cosine
from omni_adapters.training.sources import open_encoder

TRANSCRIBE, DESCRIBE = "what is said", "describe the sound"
QUESTIONS_AT_ONCE = 4  # on one sound, one after the other
SLOW = {"contour": 3, "turns": 3, "speaker": 3, "style": 2, "language": 2, "pauses": 2}  # the last to be heard: asked more often
SHARES = {"contour": 2, "turns": 2, "speaker": 2, "style": 1.5, "language": 1.5}  # and spoken more often
TAGS = {name: CATEGORIES[name].values for name in TEXTURE}
EVENTS = {name: number for number, name in enumerate([*WORDS, *DIGITS, *DIRECTIONS])}
LEXICON = [*dict.fromkeys([*vocabulary(), *f"{TRANSCRIBE} {DESCRIBE}".split(), *CATEGORIES, *DIRECTIONS])]  # words it knows
MINUTES = 30.0  # what --minutes scales: sizes below are for that


class Sizes(NamedTuple):
    clips: int       # spoken for training
    read: int        # steps of the GPT on text
    hear: int        # steps of the encoder on sound
    align: int       # steps of stage 1
    instruct: int    # steps of stage 2

    @classmethod
    def for_minutes(cls, minutes: float) -> Sizes:
        share = minutes / MINUTES
        return cls(max(200, round(12_000 * share)), *(max(20, round(steps * share)) for steps in (1800, 2400, 300, 2600)))


# ---- what is taught ----------------------------------------------------------------------------------------------------


Drawn, Made = TypeVar("Drawn"), TypeVar("Made")


class Turn(NamedTuple):
    question: str
    answer: str


class Lesson(NamedTuple):
    """A clip and what is true of its sound, texture category → option."""

    clip: Clip
    notes: dict[str, str]

    @classmethod
    def of(cls, clip: Clip) -> Lesson:
        return cls(clip, truths(clip))

    def turns(self, category: str, rng: random.Random) -> list[Turn]:
        """What is asked of a clip at once: to describe it and to repeat what is said, or the category and others by chance."""
        if rng.random() < 0.5:
            return rng.sample([self.description(), self.turn(TRANSCRIBE, rng)], 2)
        others = [name for name in self.clip.labels if name != category]
        names = [category, *rng.sample(others, min(len(others), QUESTIONS_AT_ONCE - 1))]
        return [self.turn(name, rng) for name in rng.sample(names, len(names))]

    def description(self) -> Turn:
        return Turn(DESCRIBE, " ".join(f"{name} {self.notes[name]}" for name in TEXTURE if name in self.notes))

    def turn(self, name: str, rng: random.Random) -> Turn:
        if name == TRANSCRIBE:
            return Turn(TRANSCRIBE, self.clip.text)
        asked = ask(self.clip, name, rng)
        return Turn(asked.question, rng.choice(self.clip.text.split()) if name == "word" else asked.options[asked.answer])


class Drawing:
    """Lessons by chance, each category as often as any other, but for what is `SLOW`."""

    def __init__(self, lessons: Sequence[Lesson], rng: random.Random) -> None:
        self.rng = rng
        asked = {name: [number for number, lesson in enumerate(lessons) if name in lesson.clip.labels] for name in CATEGORIES}
        self.asked = {name: numbers for name, numbers in asked.items() if numbers}
        self.chances = list(accumulate(SLOW.get(name, 1) for name in self.asked))

    def __call__(self) -> tuple[int, str]:
        """A lesson's number and what to ask of it."""
        name = self.rng.choices(list(self.asked), cum_weights=self.chances)[0]
        return self.rng.choice(self.asked[name]), name


Row = tuple[list[int], list[bool]]  # tokens of a dialogue; which are graded


def dialogue(tokenizer: WordTokenizer, heard: Sequence[int], turns: Sequence[Turn]) -> Row:
    """<|bos|>, then <|user_start|> [heard] question <|user_end|><|assistant_start|> answer <|assistant_end|> for each turn;
    and for each token whether it is graded: answers and what ends them are. Sound stands where `heard` does."""
    bos, user, user_end, assistant, end = map(tokenizer.encode_special, SPECIALS)
    tokens, graded = [bos], [False]
    for number, turn in enumerate(turns):
        asked = [user, *(heard if number == 0 else []), *tokenizer.encode(turn.question), user_end, assistant]
        answer = [*tokenizer.encode(turn.answer), end]
        tokens += asked + answer
        graded += [False] * len(asked) + [True] * len(answer)
    return tokens, graded


def collate_dialogues(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """idx and targets (B, T) int64: targets[t] = token t + 1 where that is graded, else −1."""
    idx, targets = collate([tokens for tokens, _ in rows], pad_id=rows[0][0][0])
    counts = pad_sequence([torch.tensor(graded[1:]) for _, graded in rows], batch_first=True)
    return idx, targets.where(counts, -1)


def batches(draw: Callable[[], Drawn], length: Callable[[Drawn], int], rows: int, rng: random.Random) -> Iterator[list[Drawn]]:
    """What is drawn, eight batches at once, those of like length together."""
    while True:
        drawn = sorted((draw() for _ in range(8 * rows)), key=length)
        eight = [drawn[first : first + rows] for first in range(0, len(drawn), rows)]
        rng.shuffle(eight)
        yield from eight


def train(parameters: Sequence[Tensor], loss_at: Callable[[int], Tensor], steps: int, lr: float, name: str,
          tables: Sequence[Tensor] = ()) -> list[float]:
    """Muon for matrices, AdamW at 0.15 of its rate for all else: what has a side of at most 8, and `tables` of words, which are
    matrices too, but of rows that are looked up. The rate warms up over a twentieth of the steps and falls as a cosine to a
    fiftieth.

    Muon: Jordan et al. 2024, its updates scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982)."""
    apart = {id(table) for table in tables}
    matrices = [p for p in parameters if p.ndim == 2 and min(p.shape) > 8 and id(p) not in apart]
    others = [p for p in parameters if p.ndim != 2 or min(p.shape) <= 8 or id(p) in apart]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=0.15 * lr, betas=(0.9, 0.98), weight_decay=0.01))
    peaks, losses = [optimizer.param_groups[0]["lr"] for optimizer in optimizers], list[float]()
    for step in (bar := tqdm(range(steps), desc=name, unit="step")):
        rate = warmup_cosine(step, steps, math.ceil(0.05 * steps), 0.02)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.zero_grad()
        loss = loss_at(step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


# ---- the GPT, on text alone ----------------------------------------------------------------------------------------------


def misspoken(text: Sequence[int], rng: random.Random, vocabulary: Sequence[int], hardness: float) -> list[int]:
    """The sentence as a poor listener writes it down: words up to five times, up to a fifth of what is written wrong."""
    pace = rng.randint(1, 1 + round(3 * hardness))
    wrong = rng.choice((0.0, 0.0, 0.2)) * hardness if pace > 1 else 0.0
    wavers = (-1, 0, 0, 1) if pace > 1 else (0,)
    repeated = [word for word in text for _ in range(pace + rng.choice(wavers))]
    return [rng.choice(vocabulary) if rng.random() < wrong else word for word in repeated]


def reading(tokenizer: WordTokenizer, lesson: Lesson, category: str, words: Sequence[int], rng: random.Random,
            progress: float) -> Row:
    """A dialogue on a transcript, clean at first, then stuttering; after some 8 % of the steps mostly on notes or, more and more,
    on a screenplay."""
    if rng.random() < max(0.1, 1 - progress / 0.08):
        heard = misspoken(tokenizer.encode(lesson.clip.text), rng, words, min(1.0, progress / 0.15))
        about = [name for name in lesson.clip.labels if name not in TEXTURE]
        name = rng.choice(about) if about and rng.random() < 0.3 else TRANSCRIBE
        return dialogue(tokenizer, heard, [lesson.turn(name, rng)])
    told = notes if rng.random() < 0.3 * (1 - progress) else screenplay
    return dialogue(tokenizer, tokenizer.encode(" ".join(told(lesson.clip, rng))), lesson.turns(category, rng))


def build_gpt(vocab_size: int, n_layer: int, n_embd: int) -> GPT:
    """Heads of 32 channels. The head starts as a sixth of the embedding: whoever finds a word can say it, rare ones too."""
    heads = n_embd // 32
    gpt = GPT(GPTConfig(sequence_len=512, vocab_size=vocab_size, n_layer=n_layer, n_head=heads, n_kv_head=heads, n_embd=n_embd))
    with torch.no_grad():
        gpt.lm_head.weight.copy_(gpt.wte().weight / 6)
    return gpt


def pretrain(gpt: GPT, tokenizer: WordTokenizer, lessons: Sequence[Lesson], steps: int, rows: int, lr: float,
             seed: int) -> list[float]:
    rng, words = random.Random(seed), tokenizer.encode(" ".join([*WORDS, *DIGITS]))
    drawing, drawn = Drawing(lessons, rng), count()

    def row() -> Row:
        number, category = drawing()
        return reading(tokenizer, lessons[number], category, words, rng, next(drawn) / (steps * rows))

    numbers = batches(row, lambda dialogue: len(dialogue[0]), rows, rng)

    def loss(step: int) -> Tensor:
        return gpt(*collate_dialogues(next(numbers)))

    tables = [gpt.wte().weight, gpt.lm_head.weight, *(table.weight for table in gpt.value_embeds.values())]
    return train(list(gpt.parameters()), loss, steps, lr, "read", tables)


# ---- sound ---------------------------------------------------------------------------------------------------------------


def spoken(clips: list[Clip]) -> list[np.ndarray]:
    """(T,) int16 at 16 kHz each; runs in a worker process. What is quietest keeps some 30 steps of amplitude."""
    return [np.round(render(clip) * 32767).astype(np.int16) for clip in clips]


def sped(wave: np.ndarray, rng: random.Random) -> np.ndarray:
    """Played up to 8 % faster or slower, and as much higher or lower: a voice that nobody has, in the bins it was in.

    Speed perturbation: Ko et al. 2015, "Audio augmentation for speech recognition"."""
    rate = 100 * round(160 * rng.uniform(0.92, 1.08))  # Hz; a multiple of 100 keeps the resampler's filter short
    played = resample(waveform(wave).numpy(), rate, 16_000)
    return np.round(played * 32767).clip(-32767, 32767).astype(np.int16)


def twice(clips: list[Clip]) -> list[tuple[np.ndarray, ...]]:
    """Each as it is and at another speed, which its words decide; runs in a worker process."""
    return [(wave, sped(wave, random.Random(clip.text))) for clip, wave in zip(clips, spoken(clips))]


def framed(clips: list[Clip]) -> list[tuple[np.ndarray, ...]]:
    """Both as log-mel and pitch frames (T, 117) float16; runs in a worker process."""
    torch.set_num_threads(1)
    frontend = LogMelPitchEncoder()
    return [tuple(frontend.frames(waveform(wave)).T.half().numpy() for wave in waves) for waves in twice(clips)]


def waveform(wave: np.ndarray) -> Tensor:
    return torch.from_numpy(wave.astype(np.float32) / 32768)


def speak_all(clips: Sequence[Clip], workers: int, make: Callable[[list[Clip]], list[Made]]) -> list[Made]:
    """What `make` (`spoken`, `twice`, `framed`) makes of each clip, in worker processes."""
    chunks, found = [list(clips[first : first + 25]) for first in range(0, len(clips), 25)], list[Made]()
    with worker_pool(workers) as pool, tqdm(total=len(clips), desc="speak", unit="clip") as bar:
        for chunk in pool.map(make, chunks):
            found += chunk
            bar.update(len(chunk))
    return found


@torch.no_grad()
def hear_all(encoder: AudioEncoder, sounds: Sequence[Tensor], prepare: Callable[[list[Tensor]], Features],
             at_once: int = 32) -> list[Tensor]:
    """Each clip's features (T, d) float16. `prepare` makes an encoder's inputs of several clips: its own `preprocess` of
    waveforms, or `padded` of frames that are made already.

    Clips of like length are heard together, whatever their order."""
    features: list[Tensor] = [torch.empty(0)] * len(sounds)
    order = sorted(range(len(sounds)), key=lambda number: len(sounds[number]))
    for first in (bar := tqdm(range(0, len(order), at_once), desc="hear", unit="batch")):
        numbers = order[first : first + at_once]
        values, lens = encoder(prepare([sounds[number] for number in numbers]))
        for number, row, length in zip(numbers, values, lens.tolist()):
            features[number] = row[:length].half()
        bar.set_postfix(length=len(sounds[numbers[0]]))
    return features


def padded(frames: Sequence[Tensor]) -> Features:
    """Frames (T, d) as a frontend gives them: values (B, d, T), lens."""
    values, lens = pad_rows([row.float() for row in frames])
    return Features(values.transpose(1, 2), lens)


def learn_to_hear(encoder: ConvEncoder, lessons: Sequence[Lesson], heard: Sequence[Sequence[Tensor]], steps: int, rows: int,
                  lr: float, seed: int) -> list[float]:
    """Words, beeps and changes of voice by CTC, and each category of texture as a tag. heard: frames at each speed."""
    rng = random.Random(seed)
    encoder.frontend.fit_statistics(padded([row]) for row in heard[0][:500])
    heads = AcousticHeads(encoder.d_model, len(EVENTS), {name: len(values) for name, values in TAGS.items()})
    order = [[EVENTS[name] for name in events(lesson.clip)] for lesson in lessons]
    tags = {name: torch.tensor([values.index(lesson.clip.labels[name]) if name in lesson.clip.labels else UNKNOWN
                                for lesson in lessons]) for name, values in TAGS.items()}
    drawing = Drawing(lessons, rng)
    drawn = batches(lambda: drawing()[0], lambda number: len(heard[0][number]), rows, rng)

    def loss(step: int) -> Tensor:
        numbers = next(drawn)
        features = encoder(padded([rng.choice(heard)[number] for number in numbers]))
        return heads.loss(features, [order[number] for number in numbers], {name: tag[numbers] for name, tag in tags.items()},
                          SLOW, tagging=2.0)

    parameters = [*encoder.parameters(), *heads.parameters()]
    return train(parameters, loss, steps, lr, "hear", [parameter for parameter in heads.parameters() if parameter.ndim == 2])


def listening(omni: OmniGPT, tokenizer: WordTokenizer, lessons: Sequence[Lesson], heard: Sequence[Sequence[Tensor]], rows: int,
              seed: int) -> Callable[[int], dict[str, Any]]:
    """step → a batch for OmniGPT: sounds, and a dialogue on each. heard: features of all clips, once or more."""
    rng = random.Random(seed)
    drawing = Drawing(lessons, rng)

    def row() -> tuple[Tensor, Row]:
        number, category = drawing()
        return rng.choice(heard)[number], dialogue(tokenizer, [], lessons[number].turns(category, rng))

    def soft_and_text(drawn: tuple[Tensor, Row]) -> int:
        return omni.projector.num_soft_tokens(len(drawn[0])) + len(drawn[1][0])

    drawn = batches(row, soft_and_text, rows, rng)

    def batch(step: int) -> dict[str, Any]:
        chosen = next(drawn)
        idx, targets = collate_dialogues([row for _, row in chosen])
        return {"idx": idx, "targets": targets, "audio_features": pad_rows([features.float() for features, _ in chosen])}

    return batch


# ---- all of it -----------------------------------------------------------------------------------------------------------


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of everything written")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="how long about on two cores; it scales "
                        "clips and steps, not how long the suite takes (default %(default)g)")
    parser.add_argument("--encoder", help=f"instead of a small one that is trained here: {ENCODER_HELP}")
    add_context_option(parser)
    add_layer_option(parser)
    parser.add_argument("--width", type=int, default=128, help="of the small encoder (default %(default)s)")
    parser.add_argument("--stack", type=int, help="frames joined into one soft token (default: 0.12 s)")
    parser.add_argument("--hidden", type=int, default=384, help="width of the projector's hidden layer (default %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="of LoRA (default %(default)s)")
    parser.add_argument("--n-layer", type=int, default=4, help="of the GPT (default %(default)s)")
    parser.add_argument("--n-embd", type=int, default=128, help="a multiple of 32 (default %(default)s)")
    parser.add_argument("--rows", type=int, default=32, help="of a batch (default %(default)s)")
    parser.add_argument("--read-lr", type=float, default=0.02, help="highest rate of Muon on text (default %(default)s)")
    parser.add_argument("--hear-lr", type=float, default=0.02, help="of the encoder (default %(default)s)")
    parser.add_argument("--align-lr", type=float, default=0.02, help="of stage 1 (default %(default)s)")
    parser.add_argument("--instruct-lr", type=float, default=0.005, help="of stage 2 (default %(default)s)")
    parser.add_argument("--no-cascade", action="store_true", help="without the speech recogniser, the slowest part of the suite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that speak")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.encoder is None and (args.context != "full" or args.layer is not None):
        parser.error("--context and --layer are of a pretrained encoder: name it with --encoder")
    sizes = args.n_embd, args.n_layer, args.width, args.hidden, args.rank, args.rows, args.workers, args.stack or 1
    if not 0.5 <= args.minutes <= 10_000 or args.n_embd % 32 or min(sizes) < 1:
        parser.error("--minutes is from 0.5 to 10,000, --n-embd a multiple of 32, all other numbers at least 1")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options()
    args = parser.parse_args(arguments)
    check(parser, args)
    began, sizes = time.perf_counter(), Sizes.for_minutes(args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    given = None if args.encoder is None else open_encoder(args.encoder, context=args.context, layer=args.layer)

    clips = draw_evenly(sizes.clips, rng, VOICES["train"], shares=SHARES)
    lessons = [Lesson.of(clip) for clip in clips]
    tokenizer = WordTokenizer(LEXICON)
    gpt = build_gpt(len(tokenizer.tokens), args.n_layer, args.n_embd)
    losses = {"the GPT, on text only": pretrain(gpt, tokenizer, lessons, sizes.read, args.rows, args.read_lr, args.seed)}
    save_reference(args.out / "gpt", gpt, LEXICON)
    before = digest(gpt.state_dict())

    if given is None:
        made = speak_all(clips, args.workers, framed)
        frames = [[torch.from_numpy(each[speed]) for each in made] for speed in (0, 1)]
        ears = ConvEncoder(args.width)
        losses["the encoder, without any GPT"] = learn_to_hear(ears, lessons, frames, sizes.hear, args.rows, args.hear_lr,
                                                               args.seed)
        ears.save(args.out / "ears")
        encoder: AudioEncoder = ConvEncoder.load(args.out / "ears")
        heard = [hear_all(encoder, each, padded) for each in frames]
    else:
        encoder, waves = given, speak_all(clips, args.workers, twice)
        sounds = [[waveform(each[speed]) for each in waves] for speed in (0, 1)]
        if isinstance(encoder, LogMelEncoder):
            encoder.fit_statistics(encoder.preprocess(sounds[0][:500]))
        heard = [hear_all(encoder, each, encoder.preprocess) for each in sounds]
    stack = args.stack or max(1, round(0.12 * encoder.frame_rate))
    projector = Projector(encoder.d_model, args.n_embd, args.hidden, stack=stack, zero_init=False,
                          num_layers=getattr(encoder, "num_layers", 1))
    omni = OmniGPT(gpt, (encoder, projector), insert_at=2)
    batch = listening(omni, tokenizer, lessons, heard, args.rows, args.seed)
    losses["stage 1: the projector"] = train(list(projector.parameters()), lambda step: omni(**batch(step)), sizes.align,
                                             args.align_lr, "align")
    gap_1 = listening_gap(omni, batch(0)).as_dict()
    omni.add_lora(args.rank, 2.0 * args.rank, seed=args.seed)
    learning = [parameter for group in omni.trainable_parameters() for parameter in group["params"]]
    losses["stage 2: LoRA and the projector"] = train(learning, lambda step: omni(**batch(step)), sizes.instruct,
                                                      args.instruct_lr, "instruct")
    gap_2 = listening_gap(omni, batch(0)).as_dict()
    omni.eval()
    adapter = args.out / "adapter.safetensors"
    omni.save_adapter(adapter)
    trained_for = time.perf_counter() - began

    suite = suites.open_suite("audiobench-mini")
    with nullcontext() if args.no_cascade else Cascade() as cascade:
        answers = suites.ask(omni, suites.turns_of(omni, tokenizer), suite.questions, cascade,
                             say=lambda line: print(line, end="\r", file=sys.stderr))
    command = shlex.join(["python", "examples/texture.py", *(arguments if arguments is not None else sys.argv[1:])])
    report = make_report(suite, answers, command=command, seconds=round(time.perf_counter() - began, 1),
                         training_seconds=round(trained_for, 1), adapter_sha256=digest(omni.trained()))
    print(f"\n{scoreboard(report)}", flush=True)
    write_report(args.out / "audiobench-mini.json", report)
    draw_stages(losses, args.out / "loss.png", "nats")
    mix = layer_mix(omni)
    if mix is not None:
        draw_layer_mix(mix, args.out / "layer_mix.png", getattr(encoder, "layers", None))
    omni.remove()
    metrics = {"listening_gap": {"stage 1": gap_1, "stage 2": gap_2}, "losses": losses, "sizes": sizes._asdict(),
               "layer_mix": mix, "trained_parameters": sum(tensor.numel() for tensor in omni.trained().values()),
               "lm_unchanged": digest(gpt.state_dict()) == before, "seconds": time.perf_counter() - began,
               "options": {name: str(value) for name, value in vars(args).items()}, "omni_adapters": __version__,
               "torch": torch.__version__}
    write_whole("texture", args.out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    print(f"\n{time.perf_counter() - began:.0f} s, {trained_for:.0f} s of it training. Look at "
          f"{args.out}/audiobench-mini.png and {args.out}/loss.png. Ask again:\n    omni-adapters eval --suite audiobench-mini "
          f"--reference {args.out}/gpt --adapter {adapter}")


if __name__ == "__main__":
    main()
