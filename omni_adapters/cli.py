"""The command `omni-adapters`.

    omni-adapters extract --manifest train.jsonl --encoder openai/whisper-base --out shards/train
    torchrun --nproc_per_node=8 -m omni_adapters.cli extract …         # ranks share the work
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from omni_adapters.data.extract import write_shards
from omni_adapters.data.manifest import read_manifest
from omni_adapters.data.shard_format import DTYPES
from omni_adapters.encoders.weights import WeightsUnavailable
from omni_adapters.shapes import BadInput, MissingExtra
from omni_adapters.training.options import add_context_option
from omni_adapters.training.sources import identity, open_encoder


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one message on stderr for input that cannot be used: a line, and one for each bad clip."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except (BadInput, MissingExtra, WeightsUnavailable, OSError) as error:
        print(f"omni-adapters {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="omni-adapters", description="Give any nanochat-style GPT ears, without editing it")
    commands = top.add_subparsers(dest="command", required=True)
    extract = commands.add_parser("extract", help="run a frozen encoder once over a manifest, into feature shards",
                                  description="Run again, it goes on where it was stopped. Under torchrun ranks share the work.")
    extract.add_argument("--manifest", type=Path, required=True, help='JSON Lines: {"audio": path, "text": …, "seconds": …}')
    extract.add_argument("--encoder", required=True, help="log_mel, or a Whisper: a directory, an id, hf:id or ms:id")
    add_context_option(extract)
    extract.add_argument("--out", type=Path, required=True, help="folder of the shards")
    extract.add_argument("--samples-per-shard", type=int, default=256, help="clips in a tar file (default %(default)s)")
    extract.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of the features (default %(default)s)")
    extract.add_argument("--batch-seconds", type=float, default=240.0, help="sound in an encoder batch (default %(default)s)")
    extract.add_argument("--max-seconds", type=float, default=600.0, help="longest clip to decode (default %(default)s)")
    extract.add_argument("--skip-bad", action="store_true", help="store clips that cannot be encoded as skipped, with the "
                         "reason, and go on; a folder begun without this keeps what is finished")
    extract.add_argument("--device", default="cpu", help="where Whisper runs (default %(default)s); cuda is cuda:LOCAL_RANK")
    extract.set_defaults(run=run_extract)
    return top


def run_extract(args: argparse.Namespace) -> None:
    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rows = read_manifest(args.manifest)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    encoder = open_encoder(args.encoder, device, args.context)
    out = write_shards(rows, encoder, args.out, description=identity(encoder), samples_per_shard=args.samples_per_shard,
                       dtype=DTYPES[args.dtype], batch_seconds=args.batch_seconds, max_seconds=args.max_seconds,
                       on_bad="skip" if args.skip_bad else "refuse", rank=rank, num_ranks=num_ranks)
    if rank == 0:
        print(out)


if __name__ == "__main__":
    sys.exit(main())
