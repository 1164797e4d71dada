"""Command-line options that every training recipe shares: which GPT, which sound, how the run goes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from omni_adapters.encoders.pretrained import Layer
from omni_adapters.encoders.whisper import Context
from omni_adapters.head_loss import FORMS
from omni_adapters.projector import DOWNSAMPLES, NORMS
from omni_adapters.projector_parts import ACTIVATIONS
from omni_adapters.shapes import BadInput
from omni_adapters.training.trackers import OPENERS

ENCODER_HELP = ("log_mel, log_mel_pitch, or a Whisper, wav2vec2, HuBERT, WavLM, w2v-BERT 2.0 or ConvEncoder: a directory, an id, "
                "hf:id or ms:id")
# Options that may change when a run is resumed: they decide where and how fast it goes, not what comes out.
FREE = {"out", "device", "engine", "workers", "track", "save_every", "keep", "push", "adapter"}
# Options that decide nothing at these values: a run's record leaves them out, so one made without them can go on.
NEUTRAL: dict[str, Any] = {"activation": "gelu", "norm": [], "normalize_layers": False, "downsample": "stack", "pool": None}


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "", []) else super()._get_help_string(action)


def add_host_options(parser: argparse.ArgumentParser) -> None:
    host = parser.add_argument_group("the GPT").add_mutually_exclusive_group(required=True)
    host.add_argument("--reference", metavar="DIR", help="a folder that save_reference wrote (examples/synthetic.py does)")
    host.add_argument("--nanochat", metavar="DIR", help="a nanochat checkpoint folder, with nanochat importable")
    host.add_argument("--transformers", metavar="DIR", help="a folder or Hub id of a causal LM, such as a NanoChatForCausalLM")
    host.add_argument("--loader", metavar="MODULE:FUNCTION[=CHECKPOINT]",
                      help="your own function(checkpoint, device) -> (gpt, tokenizer)")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("sound")
    data.add_argument("--train", type=Path, required=True, help="feature shards (a folder) or a manifest (JSON Lines)")
    data.add_argument("--valid", type=Path, required=True, help="the same, of clips never trained on")
    data.add_argument("--encoder", default="log_mel", help=ENCODER_HELP)
    add_context_option(data)
    add_layer_option(data)
    data.add_argument("--form", choices=("chat", "plain"), default="chat", help="how a row is written (training/turns.py)")
    data.add_argument("--question", default="", help="asked after the sound where a row has no question of its own")
    data.add_argument("--max-tokens", type=int, default=12_000, help="feature frames in a micro-batch, padding included")
    data.add_argument("--micro-batches", type=int, default=1, help="micro-batches in a step, over all ranks together")


def add_context_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--context", choices=get_args(Context), default="full", help="what Whisper hears: clips padded to 30 s "
                        "(full), or as long as they are, those over 30 s in chunks (clip)")


def add_layer_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--layer", type=parse_layer, help="hidden states of the encoder: 7, -1 for the last one, 3,7,11 or all "
                        "side by side; without, its output")


def parse_layer(text: str) -> Layer:
    """"7" → 7, "3,7,11" → (3, 7, 11), "all" → "all"; an error of argparse for anything else."""
    if text == "all":
        return "all"
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no layer: a number, several with commas between, or all") from error
    return numbers[0] if len(numbers) == 1 else numbers


def add_projector_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--stack", type=int, default=8, help="feature frames joined into one soft token")
    parser.add_argument("--hidden", type=int, help="width of the hidden layer, by default 4 × the GPT's n_embd")
    parser.add_argument("--activation", choices=list(ACTIVATIONS), default="gelu", help="of the hidden layer")
    parser.add_argument("--norm", nargs="*", default=[], choices=NORMS,
                        help="RMSNorms before fc1 (in), before fc2 (mid), after it (out)")
    parser.add_argument("--downsample", choices=DOWNSAMPLES, default="stack",
                        help="frames side by side, or a strided convolution")
    parser.add_argument("--pool", type=int, metavar="N", help="N soft tokens of every clip, by attention over its steps")
    parser.add_argument("--normalize-layers", action="store_true",
                        help="where an encoder gives several: each has variance 1 when they are mixed")
    parser.add_argument("--no-zero-init", action="store_true", help="start the projector's last layer from noise, not from zero")


def projector_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of a Projector, from what `add_projector_options` added."""
    return {"hidden_dim": args.hidden, "stack": args.stack, "zero_init": not args.no_zero_init, "activation": args.activation,
            "norm": args.norm, "downsample": args.downsample, "pool": args.pool, "normalize_layers": args.normalize_layers}


def add_run_options(parser: argparse.ArgumentParser, *, steps: int) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, required=True, help="its folder; run again with the same options, it goes on")
    run.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    run.add_argument("--warmup", type=float, default=0.03, help="share of the steps in which rates rise from zero")
    run.add_argument("--clip", type=float, default=1.0, help="largest norm of the whole gradient")
    run.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW")
    run.add_argument("--seed", type=int, default=0, help="of initial weights, order and dropout")
    run.add_argument("--bf16", action="store_true", help="autocast to bfloat16; not for nanochat, which casts by itself")
    run.add_argument("--loss", choices=FORMS, default="auto",
                     help="the host's own, or head and loss in one; auto: the faster")
    run.add_argument("--compile", action="store_true", help="one graph for each shape, of which there are few; not with fsdp2")
    run.add_argument("--validate-every", type=int, default=200, help="steps between validations")
    run.add_argument("--validate-rows", type=int, default=256, help="clips in a validation, which every rank does whole")
    run.add_argument("--max-answer", type=int, default=64, help="tokens of a generated answer")
    run.add_argument("--save-every", type=int, default=100, help="steps between checkpoints: what kill -9 can cost")
    run.add_argument("--keep", type=int, default=2, help="checkpoints kept")
    run.add_argument("--engine", choices=("ddp", "fsdp2"), default="ddp", help="under torchrun: replicate or shard the GPT")
    run.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    run.add_argument("--workers", type=int, default=0, help="processes that read data ahead, per rank")
    run.add_argument("--track", nargs="*", default=[], choices=list(OPENERS), help="trackers beside log.jsonl")
    run.add_argument("--push", metavar="REPO_ID", help="publish the adapter on the Hub when the run is done")


def host_of(args: argparse.Namespace) -> tuple[str, str]:
    """(kind, checkpoint) as `open_host` takes them."""
    for kind in ("reference", "nanochat", "transformers"):
        if getattr(args, kind):
            return kind, getattr(args, kind)
    kind, _, checkpoint = args.loader.partition("=")
    return kind, checkpoint


def deciding(args: argparse.Namespace, **identities: Any) -> dict[str, Any]:
    """What a run's result follows from, as JSON values: the options that decide, and `identities` of GPT, encoder and data.

    Paths are left out, since the same data may lie elsewhere tomorrow; the identities stand for them, and for the encoder's
    context and layer.
    """
    identified = {"train", "valid", "reference", "nanochat", "transformers", "loader", "encoder", "context", "layer"}
    options = {name: value for name, value in vars(args).items()
               if name not in FREE | identified and not (name in NEUTRAL and value == NEUTRAL[name])}
    return {"options": options, **identities}


def check_ranges(args: argparse.Namespace) -> None:
    counts = ("steps", "max_tokens", "micro_batches", "validate_every", "validate_rows", "save_every", "keep", "max_answer")
    fits = {**{name: getattr(args, name) >= 1 for name in counts}, "validate_rows": args.validate_rows >= 2,
            "weight_decay": args.weight_decay >= 0, "workers": args.workers >= 0,
            "warmup": 0 <= args.warmup < 1, "clip": args.clip > 0,
            "lr": args.lr > 0, "projector_lr": getattr(args, "projector_lr", 0) >= 0,
            "distill": 0 <= getattr(args, "distill", 0) <= 1}
    if args.engine == "fsdp2" and (args.compile or args.loss == "fused"):
        raise BadInput("options", f"{'--compile' if args.compile else '--loss fused'} with --engine fsdp2",
                       "weights that are whole in each process", "use --engine ddp, or leave it out")
    if args.loss == "fused" and getattr(args, "distill", 0):
        raise BadInput("options", "--loss fused with --distill", "--loss auto or host", "distillation reads logits")
    wrong = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name, fit in fits.items() if not fit]
    if wrong:
        raise BadInput("options", ", ".join(wrong), "counts ≥ 1 (rows of a validation ≥ 2), a warm-up in [0, 1), "
                       "rates and a clip > 0 (a projector's rate ≥ 0), a share of distillation in [0, 1]")
