"""A speech corpus from nothing, and a GPT that has only ever read: what stage 1 and stage 2 are tried on, on two CPU cores.

    python examples/synthetic.py --out runs/synthetic

1. Sentences in free word order: a few of 512 common words drawn at random, no grammar to guess from.
2. Each is spoken once by espeak-ng: twelve voices, rate and pitch varied, noise at 10–30 dB (a tenth without), some whispered.
3. A small GPT learns, from text alone, to repeat a sentence given in a stuttering, misspoken copy, in nanochat's chat form.

DIR holds train.jsonl, unseen.jsonl (sentences that are not in train), unseen_voices.jsonl (nor are their voices), their clips
in audio/, gpt/ (see `omni_adapters.training.hosts.save_reference`) and text.json: how well that GPT repeats clean text.
Equal options give equal bytes. A clip's file is named by what is said in it and how, and every file appears whole: started
again after a crash, the corpus goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from omni_adapters.data.audio import load_audio, save_audio
from omni_adapters.data.collate import collate
from omni_adapters.data.manifest import ManifestRow, write_manifest
from omni_adapters.data.speech import add_noise, speak
from omni_adapters.files import write_whole
from omni_adapters.processes import worker_pool
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.training.hosts import SPECIALS, WordTokenizer, save_reference

# No two of these are closer than two phonemes apart as espeak-ng says them in American English.
WORDS = """
    about account across active address advice afford afternoon airport album already always angry ankle answer argue arrive
    asleep attack attention august autumn avenue awake baby bachelor badly balance balcony banana bandage banker barrel
    basement bathroom beautiful bedroom before begin behind believe belong beneath benefit between beyond bicycle bishop
    blanket bodyguard boring borrow bottom boundary bracelet branch breathe brother buffalo builder burger business cabbage
    cabin campaign candle canyon carbon careful carrot castle casual century ceremony certain challenge champion chapter
    charity cheerful cherry chicken childhood chimney cinema citizen climate coconut coffee collar comedy comfort common
    company complain computer concert connect consider contain corner country couple courage cousin cradle crazy creature
    cricket crisis culture customer cycle damage danger daughter defend deliver desert design despite develop diamond
    different dinner direct disaster distance dolphin double dragon driver dusty eastern economy education effort election
    elephant emotion empire empty energy engine enough envelope evening event exactly exercise express factory faithful father
    female fence festival fiction fifteen fifty figure finger finish fireplace fisherman flavor flexible follow foolish
    forever forward fountain fragile freedom frequent friendly frighten frozen furniture galaxy gallery garden garlic general
    gentle giant giraffe glory golden gossip govern gravity grocery guitar habit halfway hallway happen harbor harvest heaven
    helpful hesitate highway himself history honest honey horrible hotel however hundred hungry hunter hurry husband ignore
    image improve include increase industry insect inside instead island jacket january jealous jewel journey junior justice
    kangaroo labor ladder language lantern laptop laundry leather lemon library license lightning limit liquid listen little
    lobster lonely lovely luggage magazine magic magnet mango manual marathon market master matter maximum meadow medicine
    medium memory mention middle military million mineral minute mission modern modest moment monday monkey monster morning
    mosquito museum music mustard napkin narrow nearby necklace negative nervous network newspaper noisy notebook nothing
    notice november nursery object obvious occupy ocean october olive onion online orbit ordinary original outside oven
    painter palace pancake panda panic parade parent parking passenger patient peaceful pencil penguin pepper perfect perhaps
    person physical piano picture pigeon pilot planet plastic pocket poem popcorn popular potato powder princess problem
    produce profit program proper proud provide pudding pumpkin punish purpose puzzle pyramid quality quantity quarter quickly
    quiet rapid reader reason recent recipe refuse relax remain remember remind remove repeat reply rescue respect result
    return rhythm ribbon river robot romantic rotten rubber safety sailor salad salmon sample satellite saturday sausage
    school scissors second secret select senior sentence september serious servant several shampoo shoulder signal silence
    similar single sister sixteen skeleton sleeve slender smooth snowman soccer social soldier someone spaghetti sparrow
    special spider spirit stable stadium standard station steady sticky storage strength success suggest sunshine support
    surprise swallow sweater symbol system taxi teacher telephone temple tennis thankful theater thirsty thousand thunder
    ticket tiger timber toaster today toilet tonight tortoise total tourist traffic transport travel tropical trouble trousers
    trumpet tuesday turkey twelve twice typical umbrella unhappy uniform universe until useful usually vacation valley
    valuable vanilla vegetable vehicle version video village vinegar violet violin visible visitor volume volunteer voyage
    wander warrior weekend welcome winter wisdom woman worker worry yesterday younger zebra zero
""".split()
TRAINING_VOICES = "f1 f2 f3 f4 m1 m2 m3 m4 m6 m7 john linda".split()
UNSEEN_VOICES = "f5 m5 max".split()
WHISPERS = ("whisper", "whisperf")  # variants without a voice
RATES = (160, 220)                  # words per minute
PITCHES = (25, 75)                  # of 0 … 99
SNR = (10.0, 30.0)                  # dB
CLEAN = 0.1                         # share of the training clips without noise, so that a quiet room is nothing new
SAMPLING_RATE = 16000               # Hz


class Clip(NamedTuple):
    text: str
    voice: str
    rate: int    # words per minute
    pitch: int   # 0 … 99
    snr: float   # dB, inf where there is no noise
    seed: int    # of the noise

    def name(self) -> str:
        """Of its file: 16 hex digits that stand for everything above."""
        return hashlib.sha256(repr(tuple(self)).encode()).hexdigest()[:16] + ".wav"

    def attributes(self) -> dict[str, Any]:
        """What a manifest row says beside the text."""
        return {"voice": self.voice, "rate": self.rate, "pitch": self.pitch,
                "style": "whisper" if self.voice in WHISPERS else "voiced",
                "snr": round(self.snr, 1) if math.isfinite(self.snr) else None}


# ---- sound ------------------------------------------------------------------------------------------------------------


def sentence(rng: random.Random, words: Sequence[str], lengths: tuple[int, int]) -> list[str]:
    """`lengths` words, least and most, in any order, none twice."""
    return rng.sample(words, rng.randint(*lengths))


def draw_clips(rng: random.Random, texts: Sequence[str], voices: Sequence[str], clean: float, whispered: float) -> list[Clip]:
    """A speaker, a manner and noise for each text; `clean` and `whispered` are shares."""
    clips = []
    for text in texts:
        voice = rng.choice(WHISPERS if rng.random() < whispered else voices)
        snr = math.inf if rng.random() < clean else rng.uniform(*SNR)
        clips.append(Clip(text, voice, rng.randint(*RATES), rng.randint(*PITCHES), snr, rng.randrange(2**31)))
    return clips


def draw_texts(rng: random.Random, count: int, words: Sequence[str], lengths: tuple[int, int], known: set[str]) -> list[str]:
    """`count` sentences, none of which is `known`; all of them are afterwards."""
    texts: list[str] = []
    while len(texts) < count:
        text = " ".join(sentence(rng, words, lengths))
        if text not in known:
            known.add(text)
            texts.append(text)
    return texts


def record(clip: Clip, folder: Path) -> float:
    """Speak a clip into its file, unless it is there; returns its seconds. Runs in a worker process."""
    path = folder / clip.name()
    if not path.is_file():
        sound = speak(clip.text, variant=clip.voice, rate=clip.rate, pitch=clip.pitch, sampling_rate=SAMPLING_RATE)
        noisy = add_noise(sound, clip.snr, clip.seed) if math.isfinite(clip.snr) else sound
        save_audio(path, np.clip(noisy, -1, 1), SAMPLING_RATE)
    return len(load_audio(path, SAMPLING_RATE)) / SAMPLING_RATE


def record_all(splits: dict[str, list[Clip]], out: Path, workers: int) -> None:
    """Every clip, then the manifests: one that is there has all its clips."""
    folder = out / "audio"
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(map(len, splits.values()))
    with worker_pool(workers) as pool, tqdm(total=total, desc="speak the corpus", unit="clip") as bar:
        for name, clips in splits.items():
            rows = []
            for clip, seconds in zip(clips, pool.map(partial(record, folder=folder), clips, chunksize=25)):
                rows.append(ManifestRow(str(folder.absolute() / clip.name()), clip.text, seconds, clip.attributes()))
                bar.update()
            write_manifest(out / f"{name}.jsonl", rows)


# ---- text -------------------------------------------------------------------------------------------------------------


def misspoken(text: Sequence[int], rng: random.Random, vocabulary: Sequence[int], hardness: float) -> list[int]:
    """The sentence as a poor listener writes it down, so that the GPT learns to take several guesses at a word for one.

    At `hardness` 1 a word is written one to five times, and in every second sentence a fifth or two fifths of what is
    written are other words; at 0 all is written once and right.
    """
    pace = rng.randint(1, 1 + round(3 * hardness))
    wrong = rng.choice((0.0, 0.0, 0.2, 0.4)) * hardness if pace > 1 else 0.0
    wavers = (-1, 0, 0, 1) if pace > 1 else (0,)
    repeated = [word for word in text for _ in range(pace + rng.choice(wavers))]
    return [rng.choice(vocabulary) if rng.random() < wrong else word for word in repeated]


def chat(tokenizer: WordTokenizer, heard: Sequence[int], said: Sequence[int]) -> tuple[list[int], int]:
    """<|bos|><|user_start|> heard <|user_end|><|assistant_start|> said <|assistant_end|>, and how much of it is prompt."""
    bos, user, user_end, assistant, end = (tokenizer.encode_special(special) for special in SPECIALS)
    prompt = [bos, user, *heard, user_end, assistant]
    return [*prompt, *said, end], len(prompt)


def batch_of(tokenizer: WordTokenizer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """idx and targets of (heard, said) pairs; only what the assistant says is graded."""
    rows = [chat(tokenizer, heard, said) for heard, said in pairs]
    return collate([row for row, _ in rows], num_prompt=[prompt for _, prompt in rows])


def build_gpt(vocab_size: int, n_layer: int, n_embd: int) -> GPT:
    """Heads of 32 channels. The head starts as a fiftieth of the embedding, which is half of how to copy a word."""
    heads = n_embd // 32
    gpt = GPT(GPTConfig(sequence_len=256, vocab_size=vocab_size, n_layer=n_layer, n_head=heads, n_kv_head=heads, n_embd=n_embd))
    with torch.no_grad():
        gpt.lm_head.weight.copy_(gpt.wte().weight / 50)
    return gpt


def pretrain(gpt: GPT, tokenizer: WordTokenizer, args: argparse.Namespace) -> list[float]:
    """Text only: copies are clean and written once at first, as hard as they get after two fifths of the steps."""
    rng = random.Random(args.seed)
    words = tokenizer.tokens[len(SPECIALS):]
    vocabulary = tokenizer.encode(" ".join(words))
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in (bar := tqdm(range(args.gpt_steps), desc="pre-train on text", unit="step")):
        hardness = min(1.0, step / (0.4 * args.gpt_steps))
        said = [tokenizer.encode(" ".join(sentence(rng, words, args.lengths))) for _ in range(args.rows)]
        idx, targets = batch_of(tokenizer, [(misspoken(text, rng, vocabulary, hardness), text) for text in said])
        losses.append(update(gpt(idx, targets), optimizer, args.lr, step / args.gpt_steps))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def update(loss: Tensor, optimizer: torch.optim.Optimizer, lr: float, progress: float) -> float:
    """One AdamW step: the rate warms up over the first 5 %, then falls as a cosine to a fiftieth."""
    scale = min(1.0, progress / 0.05 + 0.01) * max(0.02, 0.5 * (1 + math.cos(math.pi * progress)))
    for group in optimizer.param_groups:
        group["lr"] = lr * scale
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item()


@torch.inference_mode()
def repeat_clean(gpt: GPT, tokenizer: WordTokenizer, texts: Sequence[str]) -> dict[str, float]:
    """The text oracle: clean sentences, each written once. Exact match of greedy answers, and the loss in nats per token.

    All tokens right where the right ones came before is the same as a greedy answer that is right.
    """
    said = [tokenizer.encode(text) for text in texts]
    idx, targets = batch_of(tokenizer, list(zip(said, said)))
    logits = gpt(idx)
    exact = ((logits.argmax(-1) == targets) | (targets < 0)).all(dim=1).float().mean()
    return {"exact_match": exact.item(), "loss": F.cross_entropy(logits.mT, targets, ignore_index=-1).item()}


# ---- all of it ----------------------------------------------------------------------------------------------------------


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder, its own for each set of options")
    parser.add_argument("--clips", type=int, default=16000, help="spoken for training, a sentence each")
    parser.add_argument("--test-clips", type=int, default=300, help="spoken for each of the two test sets")
    parser.add_argument("--words", type=int, default=len(WORDS), help=f"how many of the {len(WORDS)} words, for quick tries")
    parser.add_argument("--lengths", type=int, nargs=2, default=(3, 4), metavar=("LEAST", "MOST"), help="words of a sentence")
    parser.add_argument("--whispered", type=float, default=0.05, help="share of clips that are whispered")
    parser.add_argument("--gpt-steps", type=int, default=1500, help="text-only steps of the GPT")
    parser.add_argument("--rows", type=int, default=32, help="sentences of a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate of the GPT")
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that speak")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be, and a folder that other options made; remember these."""
    least, most = args.lengths
    if not 1 <= least <= most <= args.words <= len(WORDS):
        parser.error(f"--lengths {least} {most} --words {args.words}: 1 ≤ least ≤ most ≤ words ≤ {len(WORDS)} is needed")
    positive = (args.clips, args.test_clips, args.gpt_steps, args.rows, args.n_layer, args.n_embd, args.workers)
    if min(positive) < 1 or args.n_embd % 32:
        parser.error("all numbers are at least 1, and --n-embd is a multiple of 32")
    wanted, most_there = args.clips + 2 * args.test_clips, sum(math.perm(args.words, n) for n in range(least, most + 1))
    if 2 * wanted > most_there:  # drawn at random, none twice: half of them come quickly, the last would take forever
        parser.error(f"{wanted} sentences of {most_there} that {args.words} words make: at most half of them can be drawn")
    own = {key: value for key, value in vars(args).items() if key not in ("out", "workers")}
    content = json.dumps(own, indent=1).encode() + b"\n"
    made_by = args.out / "options.json"
    if made_by.is_file() and made_by.read_bytes() != content:
        parser.error(f"--out {args.out}: made by other options, {made_by} has them; name another folder, or use those")
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole("synthetic", made_by, content)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options()
    args = parser.parse_args(arguments)
    check(parser, args)
    rng = random.Random(args.seed)
    words, known = random.Random(0).sample(WORDS, args.words), set[str]()
    count = {"train": args.clips, "unseen": args.test_clips, "unseen_voices": args.test_clips}
    texts = {name: draw_texts(rng, number, words, args.lengths, known) for name, number in count.items()}
    splits = {"train": draw_clips(rng, texts["train"], TRAINING_VOICES, CLEAN, args.whispered),
              "unseen": draw_clips(rng, texts["unseen"], TRAINING_VOICES, 0.0, args.whispered),
              "unseen_voices": draw_clips(rng, texts["unseen_voices"], UNSEEN_VOICES, 0.0, 0.0)}
    record_all(splits, args.out, args.workers)

    if not (args.out / "text.json").is_file():
        torch.manual_seed(args.seed)
        tokenizer = WordTokenizer(words)
        gpt = build_gpt(len(tokenizer.tokens), args.n_layer, args.n_embd)
        losses = pretrain(gpt, tokenizer, args)
        save_reference(args.out / "gpt", gpt, words)
        report = repeat_clean(gpt, tokenizer, texts["unseen"]) | {"training_losses": losses}
        write_whole("synthetic", args.out / "text.json", json.dumps(report).encode() + b"\n")
    oracle = json.loads((args.out / "text.json").read_text())
    print(f"{args.out}: {', '.join(f'{number} clips in {name}.jsonl' for name, number in count.items())}; given clean text, "
          f"the GPT repeats {oracle['exact_match']:.1%} of the unseen sentences (loss {oracle['loss']:.3f} nats per token)")


if __name__ == "__main__":
    main()
