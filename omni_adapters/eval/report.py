"""What a suite leaves: scores with their intervals as JSON, a table for the terminal, a picture.

    {"metric": "accuracy", "overall": {"accuracy": 0.71, "ci95": [0.645, 0.77], "num_questions": 200}, "shuffled": {…}, …,
     "by_about": {"texture": {…}, "words": {…}}, "per_category": {"pitch": {"about": "texture", "num_questions": 20,
     "overall": 0.8, "shuffled": 0.25, …}}, "num_questions": 200, "questions_sha256": …, "command": …, "seconds": …,
     "answers": [{"id": …, "right": 1, "overall": 1, "shuffled": 3, …}, …]}

A system that was not asked is null. Suites of transcriptions have "wer", the word error rate, where others have "accuracy".
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_adapters import __version__
from omni_adapters.data.questions import Question, Suite
from omni_adapters.eval.suite import SYSTEMS, Answers, Graded, System, grouped
from omni_adapters.files import write_whole
from omni_adapters.shapes import BadInput
from omni_adapters.training.pictures import DARK, PALE, WARM, plotting

NUM_RESAMPLES = 10_000
LABELS: dict[System, str] = {"overall": "ours", "shuffled": "another's sound", "blank": "silence", "text_oracle": "transcript",
                             "cascade": "recogniser"}
DRAWN: dict[System, str] = {"overall": DARK, "shuffled": PALE, "cascade": WARM}


def bootstrap_ci95(points: Sequence[int], out_of: Sequence[int], *, num_resamples: int = NUM_RESAMPLES,
                   seed: int = 0) -> list[float]:
    """[low, high] of Σ points / Σ out_of: the percentile bootstrap over questions (Efron and Tibshirani, 1993, chapter 13).

    Each resample draws as many questions as there are, with replacement; 2.5 % of resamples lie below the interval and 2.5 %
    above. It says what other questions of the same kind would have changed, not what another training run would have; where all
    are right or none is, it has no width, and says less.
    """
    if not len(points) or len(points) != len(out_of):
        raise BadInput("bootstrap_ci95", f"{len(points)} points out of {len(out_of)}", "one for each question, at least one")
    rng, num = np.random.Generator(np.random.PCG64(seed)), len(points)
    gained, possible = np.asarray(points, dtype=np.float64), np.asarray(out_of, dtype=np.float64)
    ratios = []
    for _ in range(0, num_resamples, 100):  # a hundred resamples at a time, so that memory does not follow their number
        drawn = rng.integers(num, size=(100, num))
        ratios.append(gained[drawn].sum(axis=1) / possible[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios)[:num_resamples], [0.025, 0.975])
    return [float(low), float(high)]


def make_report(suite: Suite, answers: Answers, *, command: str, seconds: float, **more: Any) -> dict[str, Any]:
    """The report as JSON values; `more` is put beside (what the adapter is, say)."""
    questions, graded = suite.questions, answers.graded
    metric = "accuracy" if questions[0].is_choice else "wer"
    report: dict[str, Any] = {"suite": suite.name, "metric": metric}
    report |= {system: scored(graded.get(system), range(len(questions)), metric) for system in SYSTEMS}
    report["by_about"] = {about: {"num_questions": len(numbers)}
                          | {system: scored(graded.get(system), numbers, metric) for system in SYSTEMS}
                          for about, numbers in grouped([question.about for question in questions]).items()}
    report["per_category"] = {category: {"about": questions[numbers[0]].about, "num_questions": len(numbers)}
                              | {system: ratio(graded.get(system), numbers) for system in SYSTEMS}
                              for category, numbers in grouped([question.category for question in questions]).items()}
    report |= {"num_questions": len(questions), "questions_sha256": suite.sha256, "command": command, "seconds": seconds,
               "chance": chance(questions), "num_dropped_words": answers.num_dropped,
               "versions": versions(), **more}
    report["answers"] = [told(number, question, answers) for number, question in enumerate(questions)]
    return report


def versions() -> dict[str, str | None]:
    """Of what decides a score: espeak-ng speaks the recipes, pocketsphinx is the cascade's ear. None where not installed."""
    found: dict[str, str | None] = {"omni_adapters": __version__, "torch": torch.__version__}
    for name in ("espeakng-loader", "pocketsphinx"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def scored(graded: Sequence[Graded | None] | None, numbers: Sequence[int], metric: str) -> dict[str, Any] | None:
    """{metric, "ci95", "num_questions"} of those that were answered; None where there is none."""
    found = answered(graded, numbers)
    if not found:
        return None
    points, out_of = [each.points for each in found], [each.out_of for each in found]
    return {metric: sum(points) / sum(out_of), "ci95": bootstrap_ci95(points, out_of), "num_questions": len(found)}


def ratio(graded: Sequence[Graded | None] | None, numbers: Sequence[int]) -> float | None:
    found = answered(graded, numbers)
    return sum(each.points for each in found) / sum(each.out_of for each in found) if found else None


def answered(graded: Sequence[Graded | None] | None, numbers: Sequence[int]) -> list[Graded]:
    return [each for number in numbers if graded is not None and (each := graded[number]) is not None]


def chance(questions: Sequence[Question]) -> float | None:
    """What guessing gets right: the mean of one over the options. None for transcriptions."""
    if not questions[0].is_choice:
        return None
    return float(np.mean([1 / len(question.options) for question in questions]))


def told(number: int, question: Question, answers: Answers) -> dict[str, Any]:
    """One question's answers: the index of the option, or the text, by system."""
    values: dict[str, Any] = {"id": question.id, "category": question.category,
                              "right": question.answer if question.is_choice else question.right}
    values |= {system: each.said for system, graded in answers.graded.items() if (each := graded[number]) is not None}
    return values | ({"transcript": answers.transcripts[number]} if answers.transcripts else {})


def scoreboard(report: Mapping[str, Any]) -> str:
    """Categories as rows, systems as columns, the groups and the whole below; with the whole's 95 % interval."""
    width = max(len(name) for name in (*report["per_category"], *report["by_about"], "all"))
    metric = report["metric"]
    lines = [f"    {'':{width}} {'n':>5} " + " ".join(f"{LABELS[system]:>15}" for system in SYSTEMS)]
    for name, row in report["per_category"].items():
        lines.append(_line(name, row["num_questions"], [row[system] for system in SYSTEMS], width))
    whole = {"num_questions": report["num_questions"]} | {system: report[system] for system in SYSTEMS}
    for name, row in {**{f"{about}": row for about, row in report["by_about"].items()}, "all": whole}.items():
        values = [None if row[system] is None else row[system][metric] for system in SYSTEMS]
        lines.append(_line(name, row["num_questions"], values, width))
    low, high = report["overall"]["ci95"]
    guess = "" if report["chance"] is None else f"; guessing gets {report['chance']:.3f}"
    return "\n".join([*lines, f"    {metric} {report['overall'][metric]:.3f}, 95 % interval {low:.3f} to {high:.3f}{guess}"])


def _line(name: str, num: int, values: Sequence[float | None], width: int) -> str:
    return f"    {name:{width}} {num:5} " + " ".join(f"{'–':>15}" if value is None else f"{value:15.3f}" for value in values)


def write_report(path: str | os.PathLike[str], report: Mapping[str, Any]) -> list[Path]:
    """The JSON at `path` and the picture beside it, each whole or not at all; folders are made. Returns both paths.

    Raises what `check_target` raises, before anything is written.
    """
    target = check_target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole("write_report", target, (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    draw_report(report, target.with_suffix(".png"))
    return [target, target.with_suffix(".png")]


def check_target(path: str | os.PathLike[str]) -> Path:
    """A path to write a report at, looked at before hours of work. BadInput where it does not end in .json, is a folder, or lies
    where nothing can be written; MissingExtra without matplotlib."""
    if Path(path).suffix != ".json":
        raise BadInput("write_report", f"{os.fspath(path)}", "a path that ends in .json", "the picture takes its name with .png")
    folder = next(place for place in Path(path).absolute().parents if place.exists())
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BadInput("write_report", f"{os.fspath(path)}, where no file can be written", "a path in a folder of yours")
    plotting("write_report")
    return Path(path)


def draw_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Bars for each category, ours, another's sound and the recogniser's, groups apart; a line at what guessing gets. 1200 px."""
    pyplot = plotting("draw_report")
    rows, places = report["per_category"], bar_places(report["per_category"])
    drawn = [system for system in DRAWN if any(row[system] is not None for row in rows.values())]
    figure, axis = pyplot.subplots(figsize=(12, 5.5), layout="constrained")
    width = 0.8 / len(drawn)
    for rank, system in enumerate(drawn):
        shifts = [place + (rank - (len(drawn) - 1) / 2) * width for place in places]
        axis.bar(shifts, [row[system] or 0.0 for row in rows.values()], width, color=DRAWN[system], label=LABELS[system])
    if report["chance"] is not None:
        axis.axhline(report["chance"], color="black", linewidth=1, linestyle=":", label=f"guessing, {report['chance']:.0%}")
    top = 1.0 if report["metric"] == "accuracy" else max(1.0, *(row[system] or 0 for row in rows.values() for system in drawn))
    for about, numbers in grouped([row["about"] for row in rows.values()]).items():
        axis.text((places[numbers[0]] + places[numbers[-1]]) / 2, top * 1.02, about, ha="center", fontsize=13, color=DARK)
    axis.set(ylabel="share of right answers" if report["metric"] == "accuracy" else "word error rate", ylim=(0, top * 1.1))
    axis.set_xticks(places, list(rows), rotation=35, ha="right", fontsize=max(6, min(12, 160 // len(rows))))
    axis.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, dpi=100, format="png")
    pyplot.close(figure)
    write_whole("draw_report", path, content.getvalue())


def bar_places(rows: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Where each category stands: one apart, and one more between groups."""
    groups = list(grouped([row["about"] for row in rows.values()]).values())
    places, start = [0.0] * len(rows), 0.0
    for numbers in groups:
        for rank, number in enumerate(numbers):
            places[number] = start + rank
        start += len(numbers) + 1
    return places
