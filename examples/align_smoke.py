"""Does anything flow? Five tones, five captions, fifty steps: the loss must fall by at least 0.5 nats a byte.

    python examples/align_smoke.py                      # a tiny random Whisper, nothing is downloaded
    python examples/align_smoke.py --whisper openai/whisper-base

Clips are 5 s long (220, 330, 440, 660, 880 Hz with a second harmonic and 1 % noise), text is bytes plus one <|bos|>, the
GPT is a random d6. Everything but the encoder trains: a fresh GPT has zero output projections, which no prefix gets
through while they are frozen. Exit code 1 when the loss did not fall.

This shows that gradients flow, not that the GPT listens: fifty steps suffice to learn the five captions by heart, and the
loss with each other's tones, printed beside it, is the same. `make demo` is where it listens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from tqdm import trange

from omni_adapters import Features, Projector, SoftTokenPrepender
from omni_adapters.data.collate import collate
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.reference_gpt import GPT, GPTConfig

BOS = 256                                  # bytes are ids 0 … 255
TONES = (220, 330, 440, 660, 880)          # Hz
SECONDS, SAMPLING_RATE = 5.0, 16_000


def tones() -> list[torch.Tensor]:
    """Five waveforms (80000,), the same every time."""
    t = torch.arange(int(SECONDS * SAMPLING_RATE)) / SAMPLING_RATE
    rng = torch.Generator().manual_seed(0)
    return [0.5 * (2 * torch.pi * hz * t).sin() + 0.2 * (4 * torch.pi * hz * t).sin()
            + 0.01 * torch.randn(t.shape, generator=rng) for hz in TONES]


def random_whisper(folder: str) -> str:
    """A Whisper checkpoint of random weights, 64 wide and 2 layers deep."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(0)
    config = WhisperConfig(d_model=64, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
                           decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128)
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whisper", help="a model id or a local directory; default: tiny random weights")
    parser.add_argument("--steps", type=int, default=50, help="AdamW steps")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--stack", type=int, default=8, help="50 Hz frames per soft token")
    parser.add_argument("--out", type=Path, default=Path("runs/align_smoke"), help="folder for metrics.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        encoder = WhisperEncoder(args.whisper or random_whisper(folder))
    heard: Features = encoder(encoder.preprocess(tones()))  # frozen, so once is enough
    rows = [[BOS, *f"a tone of {hz} hertz".encode()] for hz in TONES]
    idx, targets = collate(rows, pad_id=BOS)

    torch.manual_seed(0)
    gpt = GPT(GPTConfig(sequence_len=512, vocab_size=257, n_layer=6, n_head=3, n_kv_head=3, n_embd=384))
    prepender = SoftTokenPrepender(gpt)
    projector = Projector(encoder.d_model, gpt.config.n_embd, stack=args.stack)
    optimizer = torch.optim.AdamW([*gpt.parameters(), *projector.parameters()], lr=args.lr)
    losses = []
    for _ in (bar := trange(args.steps, desc="align", unit="step")):
        loss = prepender(idx, targets, projector(heard))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")

    with torch.no_grad():  # each caption under its neighbour's tone
        shuffled = prepender(idx, targets, projector(Features(heard.values.roll(1, 0), heard.lens.roll(1)))).item()
    drop = losses[0] - losses[-1]
    report = {"encoder": encoder.source if args.whisper else "random", "soft_tokens_per_clip": int(projector(heard).lens[0]),
              "first_loss": losses[0], "last_loss": losses[-1],
              "shuffled_loss": shuffled, "drop": drop, "passed": drop >= 0.5, "losses": losses}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f} nats per byte, {shuffled:.2f} with each other's tones: "
          f"{'passed' if report['passed'] else 'FAILED'}")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
