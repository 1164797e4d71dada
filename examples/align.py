"""Stage 1: a projector learns to speak a GPT's language. The GPT and the encoder stay frozen, bit for bit.

    python examples/synthetic.py --out runs/synthetic                 # a corpus and a text-only GPT, if you have neither
    omni-adapters extract --manifest runs/synthetic/train.jsonl --encoder log_mel --out runs/synthetic/train
    python examples/align.py --reference runs/synthetic/gpt --train runs/synthetic/train \\
        --valid runs/synthetic/unseen.jsonl --out runs/align
    torchrun --nproc_per_node=8 examples/align.py --nanochat ~/.cache/nanochat/chatsft_checkpoints/d20 --micro-batches 8 …

A step is `--micro-batches` batches of similar length, dealt over the ranks; its loss is the mean over all graded tokens,
however many ranks there are. The rate warms up, then falls as half a cosine (LLaVA's stage 1, arXiv:2304.08485: 1e-3, 3 %).

The run's folder holds log.jsonl, checkpoints, adapter.safetensors, metrics.json, loss.png, pca.png, and layer_mix.png where an
encoder gives several layers. Killed at any moment and started again with the same options, the run goes on from its newest
checkpoint and ends the same.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from omni_adapters import Features, OmniGPT, Projector
from omni_adapters.anatomy import discover_anatomy, loss_of
from omni_adapters.data.epochs import Order
from omni_adapters.encoders.weights import WeightsUnavailable
from omni_adapters.fingerprints import describe_host
from omni_adapters.shapes import BadInput, MissingExtra
from omni_adapters.training.hosts import open_host
from omni_adapters.training.optimizer_state import gather_state, restore_state
from omni_adapters.training.options import (
    Defaults,
    add_data_options,
    add_host_options,
    add_projector_options,
    add_run_options,
    check_ranges,
    deciding,
    host_of,
    projector_settings,
)
from omni_adapters.training.ranks import Ranks, join_ranks, wrap
from omni_adapters.training.report import finish_run, scoreboard
from omni_adapters.training.run_folder import RunFolder
from omni_adapters.training.schedule import warmup_cosine
from omni_adapters.training.sources import fit_encoder, identity, open_encoder, open_source
from omni_adapters.training.trackers import open_trackers
from omni_adapters.training.turns import Turns
from omni_adapters.training.update import check_start, given_sound, planned_batches, train_step
from omni_adapters.training.validation import COLUMNS, Column, validate


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=Defaults)
    add_host_options(parser)
    add_data_options(parser)
    add_run_options(parser, steps=2000)
    ears = parser.add_argument_group("the projector")
    add_projector_options(ears)
    ears.add_argument("--value-embeds", choices=("zero", "placeholder", "learned"), default="zero", help="rows at soft tokens")
    ears.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    return parser


def build(args: argparse.Namespace, device: torch.device) -> tuple[OmniGPT, Turns]:
    """The frozen GPT with a new projector before it, and how its rows are written."""
    gpt, tokenizer = open_host(*host_of(args), device)
    turns = Turns(tokenizer, args.form, args.question)
    encoder = open_encoder(args.encoder, device, args.context, args.layer)
    torch.manual_seed(args.seed)
    projector = Projector(encoder.d_model, discover_anatomy(gpt).n_embd, num_layers=getattr(encoder, "num_layers", 1),
                          **projector_settings(args)).to(device)
    omni = OmniGPT(gpt, (encoder, projector), value_embeds=args.value_embeds, insert_at=turns.insert_at, loss=args.loss)
    return omni, turns


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    check_ranges(args)
    omni, turns = build(args, ranks.device)
    source, unseen = open_source(args.train, omni.encoder), open_source(args.valid, omni.encoder)
    config = deciding(args, host=describe_host(omni.prepender, omni.host_digest), encoder=identity(omni.encoder),
                      train=source.identity, valid=unseen.identity)
    order = Order(source.lens, max_tokens=args.max_tokens, seed=args.seed, num_groups=args.micro_batches)
    config["tokens"] = check_start(order, (source, unseen), turns, ranks, omni)
    folder = RunFolder(args.out, config, keep=args.keep)
    newest = ranks.share(folder.recover() if ranks.is_first else None)
    if newest is None:
        fit_encoder(omni.encoder, source)
    if ranks.is_first:
        print(omni.describe())
        print(f"run        {args.out} {'begins' if newest is None else f'goes on after step {newest}'}", flush=True)
    model = wrap(omni, ranks, args.engine, compiled=args.compile).train()
    groups = [group | {"peak": args.lr} for group in omni.trainable_parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    place = {"step": 0, "epoch": 0, "step_in_epoch": 0}  # where the next step begins
    if newest is not None:
        checkpoint = folder.read(newest)
        restore_state(omni.trained(), optimizer, checkpoint.tensors)
        place = checkpoint.state

    def micro_loss(sound: Features, rows: Sequence[dict[str, Any]], idx: Tensor, targets: Tensor) -> Tensor:
        idx, targets, given = given_sound(omni, source, sound, idx, targets, args.compile)
        return loss_of(model(idx, targets, **given)) * (targets != -1).sum()

    with open_trackers(args.track if ranks.is_first else [], args.out, config) as track:
        def log(row: dict[str, Any]) -> None:
            if ranks.is_first:
                folder.log(row)
                track(row, row["step"])

        oracle: dict[Column, dict[str, float]] = {}

        def check(step: int) -> None:
            answered = COLUMNS if step in (0, args.steps) else ("right", "text_oracle")  # answers are what takes time
            result = validate(omni, unseen, turns, max_tokens=args.max_tokens, max_rows=args.validate_rows,
                              max_answer=args.max_answer, answered=answered, known=oracle)
            oracle["text_oracle"] = result["text_oracle"]  # the frozen GPT reads the same every time
            log({"step": step, "validation": result})
            if ranks.is_first:
                tqdm.write(f"step {step}\n{scoreboard(result)}")

        if newest is None:
            check(0)
        steps = planned_batches(order, source, ranks, place["epoch"], place["step_in_epoch"], num_workers=args.workers)
        numbers = range(place["step"] + 1, args.steps + 1)
        bar = tqdm(numbers, initial=place["step"], total=args.steps, desc="align", unit="step",
                   disable=None if ranks.is_first else True)  # None: shown on a terminal only
        for step, (planned, batches) in zip(bar, steps):
            rate = warmup_cosine(step - 1, args.steps, math.ceil(args.warmup * args.steps))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            row = train_step(model, omni, optimizer, turns, ranks, batches, micro_loss, seeds=(args.seed, step), clip=args.clip,
                             bf16=args.bf16)
            log({"step": step, "epoch": planned.epoch, "rate": rate, **row, "rows_crc32": planned.checksum()})
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            if step % args.validate_every == 0 or step == args.steps:
                check(step)
            if step % args.save_every == 0 or step == args.steps:
                tensors = gather_state(omni.trained(), optimizer)
                if ranks.is_first:
                    folder.save(step, tensors, {"step": step, "epoch": planned.epoch, "step_in_epoch": planned.step_in_epoch + 1})

    finish_run(omni, unseen, turns, folder, ranks, args)


def main(arguments: Sequence[str] | None = None) -> None:
    args = options().parse_args(arguments)
    with join_ranks(args.device) as ranks:
        if ranks.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # the projector's and LoRA's fp32 masters multiply in TF32
        try:
            run(args, ranks)
        except (BadInput, MissingExtra, WeightsUnavailable, FileNotFoundError) as error:
            raise SystemExit(f"align: {error}") from error


if __name__ == "__main__":
    main()
