"""The command `omni-adapters`.

    omni-adapters extract --manifest train.jsonl --encoder openai/whisper-base --out shards/train
    torchrun --nproc_per_node=8 -m omni_adapters.cli extract …         # ranks share the work
    omni-adapters speak --out texture                                  # a corpus of how speech sounds, from nothing
    omni-adapters cost --depth 12 --soft 188 --text 256 --batch 16 --gpu h200 --stage 1
    omni-adapters doctor                                              # what works here, and what to do where it does not
    omni-adapters eval --suite audiobench-mini --reference runs/gpt --adapter runs/instruct/adapter.safetensors

Notable: only the command that is asked for adds its options and imports what it needs, so the doctor runs where torch does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from omni_adapters.shapes import BadInput, MissingExtra


class Command(NamedTuple):
    """A word behind `omni-adapters`: `add(options)` says what may follow it, `run(args)` does it and returns an exit code, or
    None for 0."""

    help: str
    description: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one message on stderr for input that cannot be used: a line, and one for each bad clip. Of the
    doctor, 1 if something that the library needs is broken."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser(next((word for word in given if not word.startswith("-")), "")).parse_args(given)
    args.typed = shlex.join(["omni-adapters", *given])
    try:
        code: int | None = args.run(args)
    except (BadInput, MissingExtra, OSError) as error:  # WeightsUnavailable is an OSError
        print(f"omni-adapters {args.command}: {error}", file=sys.stderr)
        return 2
    return code or 0


def parser(command: str) -> argparse.ArgumentParser:
    """Every command by its name, and the options of this one."""
    top = argparse.ArgumentParser(prog="omni-adapters", description="Give any nanochat-style GPT ears, without editing it")
    commands = top.add_subparsers(dest="command", required=True)
    for name, (told, description, add, run) in COMMANDS.items():
        options = commands.add_parser(name, help=told, description=description)
        options.set_defaults(run=run)
        if name == command:
            add(options)
    return top


def add_extract(options: argparse.ArgumentParser) -> None:
    from omni_adapters.data.shard_format import DTYPES
    from omni_adapters.training.options import ENCODER_HELP, add_context_option, add_layer_option

    options.add_argument("--manifest", type=Path, required=True, help='JSON Lines: {"audio": path, "text": …, "seconds": …}')
    options.add_argument("--encoder", required=True, help=ENCODER_HELP)
    add_context_option(options)
    add_layer_option(options)
    options.add_argument("--out", type=Path, required=True, help="folder of the shards")
    options.add_argument("--samples-per-shard", type=int, default=256, help="clips in a tar file (default %(default)s)")
    options.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of the features (default %(default)s)")
    options.add_argument("--batch-seconds", type=float, default=240.0, help="sound in an encoder batch (default %(default)s)")
    options.add_argument("--max-seconds", type=float, default=600.0, help="longest clip to decode (default %(default)s)")
    options.add_argument("--skip-bad", action="store_true", help="store clips that cannot be encoded as skipped, with the "
                         "reason, and go on; a folder begun without this keeps what is finished")
    options.add_argument("--device", default="cpu", help="where the encoder runs (default %(default)s); cuda is cuda:LOCAL_RANK")


def add_doctor(options: argparse.ArgumentParser) -> None:
    options.add_argument("--timeout", type=float, default=10.0, help="seconds that all looks take at most (default %(default)s)")
    options.add_argument("--json", action="store_true", help="for programs")


def add_speak(options: argparse.ArgumentParser) -> None:
    options.add_argument("--spec", type=Path, help="JSON: seed, splits, ranges (default: what --print-spec prints)")
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder of the corpus, its own for each specification")
    what.add_argument("--print-spec", action="store_true", help="print the specification and speak nothing")
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that speak (default %(default)s)")


def add_cost(options: argparse.ArgumentParser) -> None:
    from omni_adapters.cost import MACHINES
    from omni_adapters.step_counts import ENCODERS

    options.add_argument("--depth", type=int, default=12, help="layers of a nanochat (default %(default)s)")
    options.add_argument("--soft", type=int, default=188, help="soft tokens of a row (default %(default)s, 30 s of sound)")
    options.add_argument("--text", type=int, default=256, help="text tokens of a row (default %(default)s)")
    options.add_argument("--batch", type=int, default=16, help="rows on each GPU (default %(default)s)")
    options.add_argument("--gpu", default="h200", help=f"one of {', '.join(MACHINES)} (default %(default)s)")
    options.add_argument("--stage", choices=("1", "2", "full"), default="1", help="what trains: the projector, LoRA with it, or "
                         "everything (default %(default)s)")
    options.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 1000], help="how many (default 1 8 64 1000)")
    options.add_argument("--engine", choices=("ddp", "fsdp2"), default="ddp", help="default %(default)s")
    options.add_argument("--overlap", action="store_true", help="traffic beside the work, not after it; not in stage 1 under DDP")
    options.add_argument("--price", type=float, default=3.0, help="USD for a GPU and hour: an assumption (default %(default).2f)")
    options.add_argument("--rank", type=int, default=16, help="of LoRA (default %(default)s)")
    options.add_argument("--stack", type=int, default=8, help="features that make a soft token (default %(default)s)")
    options.add_argument("--frame-rate", type=float, help="features a second (default: the encoder's)")
    options.add_argument("--vocab", type=int, default=32768, help="rows of the vocabulary (default %(default)s)")
    options.add_argument("--encoder", default="whisper-base", help=f"one of {', '.join(ENCODERS)} (default %(default)s)")
    options.add_argument("--online", action="store_true", help="the encoder runs in each step; without, shards")
    options.add_argument("--json", action="store_true", help="for programs: seconds and bytes")


def add_eval(options: argparse.ArgumentParser) -> None:
    from omni_adapters.training.options import ENCODER_HELP, add_context_option, add_host_options, add_layer_option

    options.add_argument("--suite", required=True, help="audiobench-mini, a file of questions (JSON Lines), mmau:PATH or "
                         "audiobench:PATH of a local copy")
    add_host_options(options)
    options.add_argument("--adapter", type=Path, required=True, help="what a training run saved")
    options.add_argument("--encoder", help=f"{ENCODER_HELP} (default: the one that the adapter names, from where it names it)")
    add_context_option(options)
    add_layer_option(options)
    options.add_argument("--device", default="cpu", help="default %(default)s")
    options.add_argument("--no-cascade", action="store_true", help="leave the recogniser out, which takes about as long as the "
                         "sound lasts")
    options.add_argument("--max-slots", type=int, default=8192, help="text and soft tokens in a batch (default %(default)s)")
    options.add_argument("--max-answer", type=int, default=128, help="tokens of a transcription (default %(default)s)")
    options.add_argument("--out", type=Path, help="the report, FILE.json; a picture, FILE.png, lies beside it (default "
                         "runs/SUITE.json)")


def run_extract(args: argparse.Namespace) -> None:
    from omni_adapters.data.extract import write_shards
    from omni_adapters.data.manifest import read_manifest
    from omni_adapters.data.shard_format import DTYPES
    from omni_adapters.training.sources import identity, open_encoder

    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rows = read_manifest(args.manifest)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    encoder = open_encoder(args.encoder, device, args.context, args.layer)
    out = write_shards(rows, encoder, args.out, description=identity(encoder), samples_per_shard=args.samples_per_shard,
                       dtype=DTYPES[args.dtype], batch_seconds=args.batch_seconds, max_seconds=args.max_seconds,
                       on_bad="skip" if args.skip_bad else "refuse", rank=rank, num_ranks=num_ranks)
    if rank == 0:
        print(out)


def run_speak(args: argparse.Namespace) -> None:
    from omni_adapters.data.texture_corpus import DEFAULT_SPEC, read_spec, speak_corpus

    spec = read_spec(args.spec) if args.spec else DEFAULT_SPEC
    if args.print_spec:
        print(json.dumps(spec, indent=1))
    else:
        for manifest in speak_corpus(spec, args.out, args.workers).values():
            print(manifest)


def run_cost(args: argparse.Namespace) -> None:
    from omni_adapters.cost import as_json, cost, describe

    found = cost(gpu=args.gpu, depth=args.depth, soft=args.soft, text=args.text, batch=args.batch, stage=args.stage,
                 gpus=args.gpus, engine=args.engine, price=args.price, rank=args.rank, stack=args.stack,
                 frame_rate=args.frame_rate, vocab_size=args.vocab, encoder=args.encoder, online=args.online,
                 overlap=args.overlap)
    print(json.dumps(as_json(found, args.gpu, args.price), indent=1) if args.json
          else describe(found, args.gpu, args.price, args.overlap))


def run_doctor(args: argparse.Namespace) -> int:
    from omni_adapters import doctor

    findings = doctor.examine(args.timeout)
    text = json.dumps(doctor.as_json(findings), indent=1) if args.json else doctor.describe(findings)
    print(doctor.in_encoding(text, sys.stdout.encoding))
    return 0 if doctor.healthy(findings) else 1


def run_eval(args: argparse.Namespace) -> None:
    from contextlib import nullcontext

    from torch import nn

    from omni_adapters.eval.cascade import Cascade
    from omni_adapters.eval.report import check_target, make_report, scoreboard, write_report
    from omni_adapters.eval.suite import ask, open_suite, turns_of
    from omni_adapters.fingerprints import digest
    from omni_adapters.model import OmniGPT
    from omni_adapters.training.hosts import open_host
    from omni_adapters.training.options import host_of
    from omni_adapters.training.sources import open_encoder

    began = time.perf_counter()
    suite = open_suite(args.suite)
    out = check_target(args.out or Path("runs") / f"{suite.name}.json")
    if args.encoder is None and (args.context != "full" or args.layer is not None):
        came, wanted = (f"--context {args.context}", "context") if args.layer is None else (f"--layer {args.layer}", "layer")
        raise BadInput("eval", f"{came} without --encoder", f"the {wanted} that the adapter names",
                       "leave it out, or name the encoder")
    gpt, tokenizer = open_host(*host_of(args), args.device)
    encoder = None if args.encoder is None else open_encoder(args.encoder, args.device, args.context, args.layer)
    omni = OmniGPT.load_adapter(args.adapter, gpt, encoder=encoder)
    if isinstance(omni.encoder, nn.Module):
        omni.encoder.to(args.device)
    with nullcontext() if args.no_cascade else Cascade() as cascade:
        answers = ask(omni, turns_of(omni, tokenizer), suite.questions, cascade, max_slots=args.max_slots,
                      max_answer=args.max_answer, say=lambda line: print(line, file=sys.stderr, flush=True))
    report = make_report(suite, answers, command=args.typed, seconds=round(time.perf_counter() - began, 3),
                         adapter_sha256=digest(omni.trained()))
    print(scoreboard(report), flush=True)  # before a disk may be full
    print(*write_report(out, report), sep="\n")


COMMANDS = {
    "extract": Command("run a frozen encoder once over a manifest, into feature shards",
                       "Run again, it goes on where it was stopped. Under torchrun ranks share the work.",
                       add_extract, run_extract),
    "cost": Command("what a training step takes: time, memory, price; computed, nothing runs",
                    "Computed from counted FLOPs and bytes, for one micro-batch on each GPU.", add_cost, run_cost),
    "doctor": Command("what works here: packages, sources, cache, devices; and what to do",
                      "Exit code 1 if a required package is missing or fails to import.", add_doctor, run_doctor),
    "eval": Command("questions about sound, and whether the answers come from hearing it",
                    "Asks with its own sound, another's, silence, the transcript, and a recogniser's.", add_eval, run_eval),
    "speak": Command("speak a corpus of textures: who, how high, how fast, in what manner and noise",
                     "Run again, it goes on where it was stopped. Manifests: OUT/SPLIT.jsonl.", add_speak, run_speak),
}


if __name__ == "__main__":
    sys.exit(main())
