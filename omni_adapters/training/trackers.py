"""Experiment trackers beside a run's own log: wandb, trackio, tensorboard, each by name, none needed.

wandb without a key or without a network logs offline (`wandb sync` uploads later); a tracker that fails while training
goes on is reported once and left alone: no run ends because of a dashboard.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from omni_adapters.shapes import BadInput, MissingExtra, listing

PROJECT = "nanochat-omni-audio"


class Tracker(NamedTuple):
    name: str
    log: Callable[[dict[str, float], int], object]
    finish: Callable[[], object]


@contextmanager
def open_trackers(names: Sequence[str], folder: str | os.PathLike[str], config: Mapping[str, Any], *,
                  project: str = PROJECT) -> Iterator[Callable[[Mapping[str, Any], int], None]]:
    """Inside, a function log(values, step) that hands the numbers among `values` to each tracker.

    names:  of wandb, trackio, tensorboard. folder: the run's; its name is the run's name, so that a resumed run goes on
    under it. Raises BadInput for an unknown name, MissingExtra for one that is not installed, before training begins.
    """
    unknown = [name for name in names if name not in OPENERS]
    if unknown:
        raise BadInput("open_trackers", listing(unknown), listing(list(OPENERS)))
    trackers = [OPENERS[name](Path(folder), dict(config), project) for name in names]

    def log(values: Mapping[str, Any], step: int) -> None:
        numbers = {name: float(value) for name, value in flat(values) if isinstance(value, (int, float))}
        for tracker in list(trackers):
            try:
                tracker.log(numbers, step)
            except Exception as error:
                print(f"{tracker.name} failed and is left alone from step {step} on: {error!r}", file=sys.stderr)
                trackers.remove(tracker)

    try:
        yield log
    finally:
        for tracker in trackers:
            with suppress(Exception):
                tracker.finish()


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def open_wandb(folder: Path, config: dict[str, Any], project: str) -> Tracker:
    try:
        import wandb
    except ImportError as error:
        raise MissingExtra("open_trackers('wandb')", "wandb", "trackers") from error
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:8]  # tells runs/a from runs/a
    settings = {"project": project, "name": folder.name, "id": f"{folder.name}-{digest}", "resume": "allow", "dir": str(folder),
                "config": config}
    has_key = bool(getattr(getattr(wandb, "api", None), "api_key", None))  # from the environment or `wandb login`
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
    try:
        run = wandb.init(**settings, mode=mode)
    except Exception as error:  # no network, a refused key: its exceptions share no type
        print(f"wandb is offline ({error!r}); `wandb sync` uploads {folder} later", file=sys.stderr)
        run = wandb.init(**settings, mode="offline")
    return Tracker("wandb", lambda values, step: run.log(values, step=step), run.finish)


def open_trackio(folder: Path, config: dict[str, Any], project: str) -> Tracker:
    try:
        import trackio
    except ImportError as error:
        raise MissingExtra("open_trackers('trackio')", "trackio", "trackers") from error
    run = trackio.init(project=project, name=folder.name, resume="allow", config=config)
    return Tracker("trackio", lambda values, step: run.log(values, step=step), run.finish)


def open_tensorboard(folder: Path, config: dict[str, Any], project: str) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("open_trackers('tensorboard')", "tensorboard", "trackers") from error
    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in flat(config)))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", log, writer.close)


OPENERS: dict[str, Callable[[Path, dict[str, Any], str], Tracker]] = {
    "wandb": open_wandb, "trackio": open_trackio, "tensorboard": open_tensorboard,
}
