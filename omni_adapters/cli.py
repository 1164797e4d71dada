"""The command `omni-adapters`.

    omni-adapters extract --manifest train.jsonl --encoder openai/whisper-base --out shards/train
    torchrun --nproc_per_node=8 -m omni_adapters.cli extract …         # ranks share the work
    omni-adapters speak --out texture                                  # a corpus of how speech sounds, from nothing
    omni-adapters cost --depth 12 --soft 188 --text 256 --batch 16 --gpu h200 --stage 1
    omni-adapters doctor                                              # what works here, and what to do where it does not
    omni-adapters eval --suite audiobench-mini --reference runs/gpt --adapter runs/instruct/adapter.safetensors
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from omni_adapters import doctor
from omni_adapters.cost import MACHINES, as_json, cost, describe
from omni_adapters.data.extract import write_shards
from omni_adapters.data.manifest import read_manifest
from omni_adapters.data.shard_format import DTYPES
from omni_adapters.data.texture_corpus import DEFAULT_SPEC, read_spec, speak_corpus
from omni_adapters.encoders.weights import WeightsUnavailable
from omni_adapters.shapes import BadInput, MissingExtra
from omni_adapters.step_counts import ENCODERS
from omni_adapters.training.options import ENCODER_HELP, add_context_option, add_host_options, add_layer_option, host_of
from omni_adapters.training.sources import identity, open_encoder


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one message on stderr for input that cannot be used: a line, and one for each bad clip. Of the
    doctor, 1 if something that the library needs is broken."""
    args = parser().parse_args(arguments)
    args.typed = shlex.join(["omni-adapters", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        code: int | None = args.run(args)
    except (BadInput, MissingExtra, WeightsUnavailable, OSError) as error:
        print(f"omni-adapters {args.command}: {error}", file=sys.stderr)
        return 2
    return code or 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="omni-adapters", description="Give any nanochat-style GPT ears, without editing it")
    commands = top.add_subparsers(dest="command", required=True)
    extract = commands.add_parser("extract", help="run a frozen encoder once over a manifest, into feature shards",
                                  description="Run again, it goes on where it was stopped. Under torchrun ranks share the work.")
    extract.add_argument("--manifest", type=Path, required=True, help='JSON Lines: {"audio": path, "text": …, "seconds": …}')
    extract.add_argument("--encoder", required=True, help=ENCODER_HELP)
    add_context_option(extract)
    add_layer_option(extract)
    extract.add_argument("--out", type=Path, required=True, help="folder of the shards")
    extract.add_argument("--samples-per-shard", type=int, default=256, help="clips in a tar file (default %(default)s)")
    extract.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of the features (default %(default)s)")
    extract.add_argument("--batch-seconds", type=float, default=240.0, help="sound in an encoder batch (default %(default)s)")
    extract.add_argument("--max-seconds", type=float, default=600.0, help="longest clip to decode (default %(default)s)")
    extract.add_argument("--skip-bad", action="store_true", help="store clips that cannot be encoded as skipped, with the "
                         "reason, and go on; a folder begun without this keeps what is finished")
    extract.add_argument("--device", default="cpu", help="where the encoder runs (default %(default)s); cuda is cuda:LOCAL_RANK")
    extract.set_defaults(run=run_extract)
    add_cost(commands.add_parser("cost", help="what a training step takes: time, memory, price; computed, nothing runs",
                                 description="Computed from counted FLOPs and bytes, for one micro-batch on each GPU."))
    look = commands.add_parser("doctor", help="what works here: packages, sources, cache, devices; and what to do",
                                 description="Exit code 1 if a required package is missing or fails to import.")
    look.add_argument("--timeout", type=float, default=5.0, help="seconds that all looks take at most (default %(default)s)")
    look.add_argument("--json", action="store_true", help="for programs")
    look.set_defaults(run=run_doctor)
    add_eval(commands.add_parser("eval", help="questions about sound, and whether the answers come from hearing it",
                                 description="Asks with its own sound, another's, silence, the transcript, and a recogniser's."))
    add_speak(commands.add_parser("speak", help="speak a corpus of textures: who, how high, how fast, in what manner and noise",
                                  description="Run again, it goes on where it was stopped. Manifests: OUT/SPLIT.jsonl."))
    return top


def add_speak(options: argparse.ArgumentParser) -> None:
    options.add_argument("--spec", type=Path, help="JSON: seed, splits, ranges (default: what --print-spec prints)")
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder of the corpus, its own for each specification")
    what.add_argument("--print-spec", action="store_true", help="print the specification and speak nothing")
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that speak (default %(default)s)")
    options.set_defaults(run=run_speak)


def add_cost(options: argparse.ArgumentParser) -> None:
    options.add_argument("--depth", type=int, default=12, help="layers of a nanochat (default %(default)s)")
    options.add_argument("--soft", type=int, default=188, help="soft tokens of a row (default %(default)s, 30 s of sound)")
    options.add_argument("--text", type=int, default=256, help="text tokens of a row (default %(default)s)")
    options.add_argument("--batch", type=int, default=16, help="rows on each GPU (default %(default)s)")
    options.add_argument("--gpu", default="h200", help=f"one of {', '.join(MACHINES)} (default %(default)s)")
    options.add_argument("--stage", choices=("1", "2", "full"), default="1", help="what trains: the projector, LoRA with it, or "
                         "everything (default %(default)s)")
    options.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 1000], help="how many (default 1 8 64 1000)")
    options.add_argument("--engine", choices=("ddp", "fsdp2"), default="ddp", help="default %(default)s")
    options.add_argument("--overlap", action="store_true", help="traffic beside the work, not after it")
    options.add_argument("--price", type=float, default=3.0, help="USD for a GPU and hour: an assumption (default %(default).2f)")
    options.add_argument("--rank", type=int, default=16, help="of LoRA (default %(default)s)")
    options.add_argument("--stack", type=int, default=8, help="features that make a soft token (default %(default)s)")
    options.add_argument("--frame-rate", type=float, help="features a second (default: the encoder's)")
    options.add_argument("--vocab", type=int, default=32768, help="rows of the vocabulary (default %(default)s)")
    options.add_argument("--encoder", default="whisper-base", help=f"one of {', '.join(ENCODERS)} (default %(default)s)")
    options.add_argument("--online", action="store_true", help="the encoder runs in each step; without, shards")
    options.add_argument("--json", action="store_true", help="for programs: seconds and bytes")
    options.set_defaults(run=run_cost)


def add_eval(options: argparse.ArgumentParser) -> None:
    options.add_argument("--suite", required=True, help="audiobench-mini, a file of questions (JSON Lines), mmau:PATH or "
                         "audiobench:PATH of a local copy")
    add_host_options(options)
    options.add_argument("--adapter", type=Path, required=True, help="what a training run saved")
    options.add_argument("--encoder", help="log_mel, or a Whisper: a directory, an id, hf:id or ms:id (default: the one that the "
                         "adapter names, from where it names it)")
    add_context_option(options)
    options.add_argument("--device", default="cpu", help="default %(default)s")
    options.add_argument("--no-cascade", action="store_true", help="leave the recogniser out, which takes about as long as the "
                         "sound lasts")
    options.add_argument("--max-slots", type=int, default=8192, help="text and soft tokens in a batch (default %(default)s)")
    options.add_argument("--max-answer", type=int, default=128, help="tokens of a transcription (default %(default)s)")
    options.add_argument("--out", type=Path, help="the report, FILE.json; a picture, FILE.png, lies beside it (default "
                         "runs/SUITE.json)")
    options.set_defaults(run=run_eval)


def run_extract(args: argparse.Namespace) -> None:
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
    spec = read_spec(args.spec) if args.spec else DEFAULT_SPEC
    if args.print_spec:
        print(json.dumps(spec, indent=1))
    else:
        for manifest in speak_corpus(spec, args.out, args.workers).values():
            print(manifest)


def run_cost(args: argparse.Namespace) -> None:
    found = cost(gpu=args.gpu, depth=args.depth, soft=args.soft, text=args.text, batch=args.batch, stage=args.stage,
                 gpus=args.gpus, engine=args.engine, price=args.price, rank=args.rank, stack=args.stack,
                 frame_rate=args.frame_rate, vocab_size=args.vocab, encoder=args.encoder, online=args.online,
                 overlap=args.overlap)
    print(json.dumps(as_json(found, args.gpu, args.price), indent=1) if args.json
          else describe(found, args.gpu, args.price, args.overlap))


def run_doctor(args: argparse.Namespace) -> int:
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

    began = time.perf_counter()
    suite = open_suite(args.suite)
    out = check_target(args.out or Path("runs") / f"{suite.name}.json")
    if args.encoder is None and args.context != "full":
        raise BadInput("eval", f"--context {args.context} without --encoder", "the context that the adapter names",
                       "leave it out, or name the encoder")
    gpt, tokenizer = open_host(*host_of(args), args.device)
    encoder = None if args.encoder is None else open_encoder(args.encoder, args.device, args.context)
    omni = OmniGPT.load_adapter(args.adapter, gpt, encoder=encoder)
    if isinstance(omni.encoder, nn.Module):
        omni.encoder.to(args.device)
    with nullcontext() if args.no_cascade else Cascade() as cascade:
        answers = ask(omni, turns_of(omni, tokenizer), suite.questions, cascade, max_slots=args.max_slots,
                      max_answer=args.max_answer, say=lambda line: print(line, file=sys.stderr, flush=True))
    report = make_report(suite, answers, command=args.typed, seconds=round(time.perf_counter() - began, 3),
                         adapter_sha256=digest(omni.trained()))
    written = write_report(out, report)
    print(scoreboard(report))
    print(*written, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
