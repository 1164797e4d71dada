"""A text-only GPT grows ears: everything from nothing, on a laptop, in minutes.

    make demo        (or: python examples/demo.py --help)

1. Speak a corpus: household commands by many synthetic voices, rate and pitch varied, noise at 10–30 dB.
2. Pre-train a small GPT on text alone: repeat a sentence given in a stuttering, misspoken copy. Then freeze it for good.
3. Train a projector, and nothing else, from log-mel frames to soft tokens the frozen GPT understands.
4. Ask what it hears: sentences never trained on, voices never trained on, beside shuffled audio, blank audio, and the
   sentence given as text. An ear that the GPT ignores scores like shuffled audio.
5. Speak one new sentence aloud and print what the GPT heard, token by token.

Writes runs/demo/{metrics.json, loss.png, spectrogram_to_text.png, hello.wav, adapter.safetensors}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from omni_adapters import Features, OmniGPT, Projector, __version__
from omni_adapters.data.audio import load_audio, save_audio
from omni_adapters.data.collate import collate
from omni_adapters.data.speech import add_noise, speak
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.features import pad_rows, select
from omni_adapters.fingerprints import digest
from omni_adapters.generate import generate_batch
from omni_adapters.processes import worker_pool
from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.training.pictures import draw_stages, plotting
from omni_adapters.training.validation import edits

SLOTS = {
    "verb": "open close lock clean move paint find check".split(),
    "colour": "red green blue yellow white black orange purple".split(),
    "thing": "lamp door window chair box table curtain bottle towel radio".split(),
    "room": "kitchen garage bedroom hallway garden office attic cellar".split(),
    "time": "now today tonight tomorrow later soon".split(),
}
BOS, HEARD, END = "<bos>", "<heard>", "<end>"
WORDS = [BOS, HEARD, END, "the", "in", *(word for words in SLOTS.values() for word in words)]
ID = {word: number for number, word in enumerate(WORDS)}
TRAINING_VOICES = "f1 f2 f3 f4 m1 m2 m3 m4 m6 m7 john linda".split()
UNSEEN_VOICES = "f5 m5 max".split()
SNR = (10.0, 30.0)  # dB
CLEAN = 0.1         # share of the training clips without noise, so that a quiet room is nothing new


class Clip(NamedTuple):
    sentence: str
    voice: str
    rate: int     # words per minute
    pitch: int    # 0 … 99
    snr: float    # dB, inf where there is no noise
    seed: int     # of the noise


# ---- text -------------------------------------------------------------------------------------------------------------


def sentence(rng: random.Random) -> str:
    """One of 30,720: open the red lamp in the kitchen tonight."""
    verb, colour, thing, room, when = (rng.choice(words) for words in SLOTS.values())
    return f"{verb} the {colour} {thing} in the {room} {when}"


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def misspoken(text: str, rng: random.Random) -> str:
    """The sentence as a poor listener writes it down: words repeated, up to a fifth of what is written wrong."""
    pace, wrong = rng.randint(1, 4), rng.choice((0.0, 0.0, 0.2))
    wavers = (-1, 0, 0, 1) if pace > 1 else (0,)
    repeated = [word for word in text.split() for _ in range(pace + rng.choice(wavers))]
    return " ".join(rng.choice(WORDS[3:]) if rng.random() < wrong else word for word in repeated)


def pretrain(gpt: GPT, steps: int, rows: int, lr: float, seed: int) -> list[float]:
    """Text only: <bos> misspoken copy <heard> sentence <end>, graded after <heard>."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in (bar := tqdm(range(steps), desc="pre-train on text", unit="step")):
        texts = [sentence(rng) for _ in range(rows)]
        prompts = [ids(f"{BOS} {misspoken(text, rng)} {HEARD}") for text in texts]
        idx, targets = collate([prompt + ids(f"{text} {END}") for prompt, text in zip(prompts, texts)],
                               num_prompt=[len(prompt) for prompt in prompts])
        losses.append(update(gpt(idx, targets), optimizer, lr, step, steps))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def update(loss: Tensor, optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> float:
    """One AdamW step: warm-up over the first 5 %, then a cosine down to a fiftieth."""
    progress = step / steps
    scale = min(1.0, (step + 1) / (0.05 * steps)) * max(0.02, 0.5 * (1 + math.cos(math.pi * progress)))
    for group in optimizer.param_groups:
        group["lr"] = lr * scale
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item()


# ---- sound ------------------------------------------------------------------------------------------------------------


def clips(rng: random.Random, voices: list[str], count: int, known: set[str], clean: float = 0.0) -> list[Clip]:
    """`count` clips to be spoken, none of a known sentence; `clean` is the share without noise."""
    found: list[Clip] = []
    while len(found) < count:
        text = sentence(rng)
        if text not in known:
            snr = math.inf if rng.random() < clean else rng.uniform(*SNR)
            found.append(Clip(text, rng.choice(voices), rng.randint(140, 200), rng.randint(25, 75), snr, rng.randrange(2**31)))
    return found


def spoken(clip: Clip) -> Tensor:
    """A clip as 16 kHz sound (T,), noise included."""
    clean = speak(clip.sentence, variant=clip.voice, rate=clip.rate, pitch=clip.pitch)
    return torch.from_numpy(add_noise(clean, clip.snr, clip.seed) if math.isfinite(clip.snr) else clean)


def mel_frames(batch: list[Clip]) -> list[Tensor]:
    """Log-mel frames (T_mel, 80) of each clip. Runs in a worker process with one thread."""
    torch.set_num_threads(1)
    mel, lens = LogMelEncoder().preprocess([spoken(clip) for clip in batch])
    return [row[:, :length].T.half() for row, length in zip(mel, lens.tolist())]


def speak_all(corpus: list[Clip], workers: int) -> list[Tensor]:
    chunks = [corpus[i : i + 50] for i in range(0, len(corpus), 50)]
    frames: list[Tensor] = []
    with worker_pool(workers) as pool, tqdm(total=len(corpus), desc="speak the corpus", unit="clip") as bar:
        for chunk in pool.map(mel_frames, chunks):
            frames += [row.float() for row in chunk]
            bar.update(len(chunk))
    return frames


# ---- ears -------------------------------------------------------------------------------------------------------------


def inputs(frames: list[Tensor]) -> Features:
    """Log-mel frames of several clips as encoder inputs (B, 80, T_mel)."""
    padded = pad_rows(frames)
    return Features(padded.values.transpose(1, 2), padded.lens)


def train_projector(omni: OmniGPT, frames: list[Tensor], texts: list[str], steps: int, rows: int, lr: float,
                    seed: int) -> list[float]:
    """Stage 1: the projector learns, the GPT does not. Epochs are shuffled whole, so every clip counts alike."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(omni.projector.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)

    def order() -> Iterator[int]:
        while True:
            yield from rng.sample(range(len(frames)), len(frames))

    picks, losses = order(), []
    for step in (bar := tqdm(range(steps), desc="train the projector", unit="step")):
        chosen = [next(picks) for _ in range(rows)]
        idx, targets = collate([ids(f"{BOS} {HEARD} {texts[i]} {END}") for i in chosen], num_prompt=2)
        loss = omni(idx, targets, audio_inputs=inputs([frames[i] for i in chosen]))
        losses.append(update(loss, optimizer, lr, step, steps))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.inference_mode()
def score(omni: OmniGPT, prompts: list[list[int]], texts: list[str], frames: list[Tensor] | None = None) -> dict[str, float]:
    """Greedy answers and the loss of the true ones, over one set."""
    heard, losses = [], []
    soft = None if frames is None else omni.projector(omni.encoder(inputs(frames)))
    for first in range(0, len(texts), 100):
        part = slice(first, first + 100)
        sound = None if soft is None else select(soft, range(len(texts))[part])
        answers = generate_batch(omni.prepender, prompts[part], sound, max_tokens=12, stop_ids=[ID[END]])
        heard += [[WORDS[token] for token in answer] for answer in answers]
        rows = [prompt + ids(f"{text} {END}") for prompt, text in zip(prompts[part], texts[part])]
        idx, targets = collate(rows, num_prompt=[len(prompt) for prompt in prompts[part]])
        losses += [omni.prepender(idx, targets, sound).item()] * len(rows)
    said = [text.split() for text in texts]
    return {
        "exact_match": sum(a == b for a, b in zip(heard, said)) / len(said),
        "word_accuracy": max(0.0, 1 - sum(edits(a, b) for a, b in zip(heard, said)) / sum(map(len, said))),
        "loss": sum(losses) / len(losses),
    }


@torch.inference_mode()
def evaluate(omni: OmniGPT, sets: dict[str, tuple[list[Tensor], list[str]]]) -> dict[str, dict[str, float]]:
    """Every row of the table; shuffled, blank and text oracle use the unseen sentences."""
    results = {}
    for name, (frames, texts) in sets.items():
        prompt = [ids(f"{BOS} {HEARD}")] * len(texts)
        results[name] = score(omni, prompt, texts, frames)
    frames, texts = sets["unseen_sentences"]
    prompt = [ids(f"{BOS} {HEARD}")] * len(texts)
    results["shuffled"] = score(omni, prompt, texts, frames[1:] + frames[:1])
    silence = [LogMelEncoder().preprocess([torch.zeros(160 * len(row))]).values[0].T for row in frames]
    results["blank"] = score(omni, prompt, texts, silence)
    results["text_oracle"] = score(omni, [ids(f"{BOS} {text} {HEARD}") for text in texts], texts)
    return results


# ---- one new sentence -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def listen(omni: OmniGPT, frames: Tensor, stack: int) -> tuple[list[str], Tensor, Tensor]:
    """What the GPT heard in one clip: words, their probabilities (W,), and what each moment was worth to each word.

    Worth (W, T_soft): the fall of the word's log-probability, in nats, where a soft token's moment and its neighbours are
    silenced. A word that its neighbours give away, such as "the", is worth little anywhere.
    """
    words = omni.generate(ids(f"{BOS} {HEARD}"), audio_inputs=inputs([frames]), max_tokens=12, temperature=0)
    answer = list(itertools.takewhile(lambda token: token != ID[END], words))
    silenced = [frames]
    for first in range(0, len(frames), stack):
        silenced.append(frames.clone())
        silenced[-1][max(0, first - stack) : first + 2 * stack] = frames.min()
    idx = torch.tensor([ids(f"{BOS} {HEARD}") + answer] * len(silenced))
    log_p = omni(idx, audio_inputs=inputs(silenced))[:, 1:-1].log_softmax(-1)
    log_p = log_p.gather(-1, torch.tensor(answer).expand(len(silenced), -1).unsqueeze(-1)).squeeze(-1)
    return [WORDS[token] for token in answer], log_p[0].exp(), (log_p[0] - log_p[1:]).clamp(min=0).T


def draw_hearing(mel: Tensor, heard: tuple[list[str], Tensor, Tensor], said: str, stack: int, path: Path) -> None:
    """The spectrogram, and below it which moment of sound each word came from."""
    words, probabilities, worth = heard
    seconds = mel.size(0) / 100
    figure, (top, low) = plotting("demo").subplots(2, 1, figsize=(9, 5.6), sharex=True, layout="constrained",
                                                   height_ratios=(1, 1.25))
    top.imshow(mel.T, origin="lower", aspect="auto", extent=(0, seconds, 0, 80), cmap="magma")
    top.set(ylabel="mel band", title=f"said: “{said}”")
    picture = low.imshow(worth, aspect="auto", cmap="Blues", extent=(0, worth.size(1) * stack / 100, len(words) - 0.5, -0.5))
    low.set_yticks(range(len(words)), [f"{word}  {p:.0%}" for word, p in zip(words, probabilities.tolist())])
    low.set(xlabel="seconds", ylabel="heard", xlim=(0, seconds))
    figure.colorbar(picture, ax=low, label="nats lost when silenced")
    figure.savefig(path, dpi=130)


# ---- all of it ----------------------------------------------------------------------------------------------------------

ROWS = {"unseen_sentences": "unseen sentences", "unseen_voices": "unseen voices", "shuffled": "shuffled audio",
        "blank": "blank audio", "text_oracle": "given as text"}


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':18} {'exact match':>12} {'word accuracy':>14} {'loss':>7}"]
    for key, label in ROWS.items():
        row = results[key]
        lines.append(f"{label:18} {row['exact_match']:12.3f} {row['word_accuracy']:14.3f} {row['loss']:7.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=7000, help="spoken for training")
    parser.add_argument("--test-clips", type=int, default=300, help="spoken for each of the two test sets")
    parser.add_argument("--lm-steps", type=int, default=600, help="text-only steps of the GPT")
    parser.add_argument("--steps", type=int, default=1200, help="steps of the projector")
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch")
    parser.add_argument("--lm-lr", type=float, default=2e-3, help="learning rate of the GPT on text")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the projector")
    parser.add_argument("--stack", type=int, default=12, help="10 ms frames per soft token")
    parser.add_argument("--hidden", type=int, default=768, help="width of the projector's hidden layer")
    parser.add_argument("--say", default="close the purple curtain in the attic tonight", help="the sentence spoken last")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that speak")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    unknown = [word for word in args.say.split() if word not in ID]
    if unknown:
        parser.error(f"--say: the GPT knows {len(WORDS)} words, {', '.join(unknown)} not among them: {' '.join(WORDS[3:])}")
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)

    training = clips(rng, TRAINING_VOICES, args.clips, {args.say}, CLEAN)
    known = {clip.sentence for clip in training} | {args.say}
    tests = {"unseen_sentences": clips(rng, TRAINING_VOICES, args.test_clips, known),
             "unseen_voices": clips(rng, UNSEEN_VOICES, args.test_clips, known)}
    corpus = training + [clip for test in tests.values() for clip in test]
    frames = speak_all(corpus, args.workers)
    texts = [clip.sentence for clip in corpus]
    count = len(training)

    gpt = GPT(GPTConfig(sequence_len=256, vocab_size=len(WORDS), n_layer=4, n_head=4, n_kv_head=4, n_embd=128))
    pretraining = pretrain(gpt, args.lm_steps, args.rows, args.lm_lr, args.seed)
    gpt.eval()
    before = digest(gpt.state_dict())

    encoder = LogMelEncoder()
    encoder.fit_statistics(inputs(frames[:500]))
    projector = Projector(encoder.d_model, gpt.config.n_embd, args.hidden, stack=args.stack)
    omni = OmniGPT(gpt, (encoder, projector), insert_at=1)
    losses = train_projector(omni, frames[:count], texts[:count], args.steps, args.rows, args.lr, args.seed)

    first, sets = count, {}
    for name, test in tests.items():
        sets[name] = (frames[first : first + len(test)], texts[first : first + len(test)])
        first += len(test)
    results = evaluate(omni, sets)

    hello = args.out / "hello.wav"
    save_audio(hello, speak(args.say, variant="f2", rate=165), encoder.sampling_rate)
    mel = encoder.preprocess([load_audio(hello, encoder.sampling_rate)]).values[0].T
    heard = listen(omni, mel, args.stack)
    draw_hearing(mel, heard, args.say, args.stack, args.out / "spectrogram_to_text.png")
    draw_stages({"the GPT, on text only": pretraining, "the projector, the GPT frozen": losses}, args.out / "loss.png",
                "nats per word")
    omni.save_adapter(args.out / "adapter.safetensors")

    unchanged = digest(gpt.state_dict()) == before
    metrics = results | {
        "trainable_parameters": sum(p.numel() for p in projector.parameters()),
        "frozen_parameters": sum(p.numel() for p in gpt.parameters()), "lm_unchanged": unchanged,
        "seconds": time.perf_counter() - start,
        "said": args.say, "heard": [{"word": word, "probability": p} for word, p in zip(heard[0], heard[1].tolist())],
        "training_clips": count, "training_voices": TRAINING_VOICES, "unseen_voices_names": UNSEEN_VOICES,
        "options": {key: str(value) for key, value in vars(args).items()}, "omni_adapters": __version__,
        "torch": torch.__version__,
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")

    print(f"\n{table(results)}\n")
    print(f"trained {metrics['trainable_parameters']:,} parameters of the projector; the GPT's "
          f"{metrics['frozen_parameters']:,} are {'the same bit for bit' if unchanged else 'CHANGED'}")
    print(f"\n{hello} says:  {args.say}\nthe GPT heard:")
    for word, p in zip(heard[0], heard[1].tolist()):
        print(f"    {word:10} {p:6.1%}")
    print(f"\n{metrics['seconds']:.0f} s. Look at {args.out}/spectrogram_to_text.png and {args.out}/loss.png")
    if not unchanged:
        raise SystemExit("the frozen GPT has changed")


if __name__ == "__main__":
    main()
