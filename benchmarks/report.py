"""What was measured, as a table, CSV, JSON and pictures; and two reports compared.

A report is {"header": …, "rows": […]}, rows being `measure.Row`s; suite.csv has the rows alone, an empty cell where something
does not apply. Each picture shows what its rows can bear, and one that has nothing to show is not drawn: `draw_all` says why.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from benchmarks.measure import HEADLESS, Roofs, Row, dtype_of

MOST_SHARES = 24         # bars of the share picture
COLOURS = ("#2a6f97", "#e07a5f", "#81b29a", "#8d99ae", "#c9a227", "#6d597a", "#bc4749", "#00a5a5", "#f4a261", "#3d405b")


# ---- the table -----------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    title: str
    width: int
    show: Callable[[Row], str]


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def megabytes(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def milliseconds(value: float | None) -> str:
    """Three digits at least."""
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


COLUMNS = (
    Column("p20 ms", 8, lambda row: milliseconds(row.p20_ms)),
    Column("p50", 8, lambda row: milliseconds(row.p50_ms)),
    Column("p80", 8, lambda row: milliseconds(row.p80_ms)),
    Column("ratio", 6, lambda row: number(row.ratio, ".2f")),
    Column("TFLOP/s", 8, lambda row: number(row.tflops, ".3g")),
    Column("GB/s", 7, lambda row: number(row.gbs, ".3g")),
    Column("roof", 5, lambda row: number(row.share_of_roof, ".0%")),
    Column("tokens/s", 8, lambda row: number(row.tokens_per_s, ".4g")),
    Column("launches", 8, lambda row: number(row.launches, "d")),
    Column("peak MB", 8, lambda row: number(megabytes(row.peak_bytes), ",.1f")),
    Column("saved MB", 8, lambda row: number(megabytes(row.saved_bytes), ",.1f")),
    Column("error", 7, lambda row: number(row.error, ".0e")),
    Column("first ms", 8, lambda row: milliseconds(row.first_ms)),
)


def table(rows: list[Row]) -> str:
    """Text: a line for each case, below it one for each variant. Columns that no row fills are left out."""
    ok = [row for row in rows if row.status == "ok"]
    columns = [column for column in COLUMNS if any(column.show(row) for row in ok)]
    name = max((len(row.variant) for row in rows), default=0)
    lines = []
    for (bench, case), members in grouped(rows):
        lines += ["", f"{bench}: {case}"]
        if any(row.status == "ok" for row in members):
            lines.append("  ".join([f"  {'':{name}}", *(f"{column.title:>{column.width}}" for column in columns)]))
        lines += [line_of(row, columns, name) for row in members]
    return "\n".join(line.rstrip() for line in lines)


def line_of(row: Row, columns: list[Column], name: int) -> str:
    if row.status != "ok":
        return f"  {row.variant:{name}}  {row.status}: {row.note}"
    cells = "  ".join(f"{column.show(row):>{column.width}}" for column in columns)
    return f"  {row.variant:{name}}  {cells}  {row.note}"


def grouped(rows: list[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.bench, row.case), []).append(row)
    yield from found.items()


def header_lines(header: dict[str, Any]) -> str:
    roofs = header["roofs"]
    matmuls = ", ".join(f"{value:.3g} TFLOP/s {dtype}" for dtype, value in roofs["matmul_tflops"].items())
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    return (f"{header['suite']} suite on {header['device']}, {header['date']}, commit {header['commit']}\n{versions}\n"
            f"roofs: copy {roofs['copy_gbs']:.4g} GB/s, matmul {matmuls}")


# ---- files ---------------------------------------------------------------------------------------------------------------


def plain(row: Row) -> dict[str, Any]:
    """A row for JSON, which has no NaN and no infinity: an error that is either stands in the note."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row._asdict().items()}


def write(out: Path, header: dict[str, Any], rows: list[Row]) -> None:
    """suite.json and suite.csv, each whole or as it was before: a run that is killed leaves what it had measured."""
    out.mkdir(parents=True, exist_ok=True)
    replace(out / "suite.json", json.dumps({"header": header, "rows": [plain(row) for row in rows]}, indent=1, allow_nan=False,
                                           ensure_ascii=False) + "\n")
    lines = [list(Row._fields), *([("" if value is None else value) for value in plain(row).values()] for row in rows)]
    part = out / "suite.csv.part"
    with part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    os.replace(part, out / "suite.csv")


def replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """A suite.json, or the folder it is in. SystemExit 2 names what is no report."""
    path = path / "suite.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        header, rows = found["header"], [Row(**row) for row in found["rows"]]
        header_lines(header)
        header["kind"], header["versions"]["torch"]
        if any(row.status == "ok" and None in (row.p20_ms, row.p50_ms, row.p80_ms) for row in rows):
            raise ValueError("a row is ok and has no time")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{path} is no report of python -m benchmarks: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return header, rows


def read_csv(path: Path) -> list[Row]:
    kinds = {name: next(kind for kind in (int, float, str) if hint is kind or kind in get_args(hint) or kind is str)
             for name, hint in get_type_hints(Row).items()}
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{name: cell_value(cell, kinds[name]) for name, cell in line.items()}) for line in csv.DictReader(file)]


def cell_value(cell: str, kind: type) -> Any:
    return cell if kind is str else None if cell == "" else kind(cell)


# ---- pictures ------------------------------------------------------------------------------------------------------------


def draw_all(out: Path, header: dict[str, Any], rows: list[Row]) -> list[str]:
    """Draw what there is; returns a sentence for each picture, drawn or not."""
    import matplotlib
    matplotlib.use("Agg")

    ok = [row for row in rows if row.status == "ok"]
    title = f"{header['device']}, torch {header['versions']['torch']}, {header['date']}"
    said = []
    for name, draw in (("roofline", draw_roofline), ("ratios", draw_ratios), ("memory", draw_memory), ("share", draw_share)):
        path = out / f"{name}.png"
        why = draw(ok, header, title, path)
        if why is not None:
            path.unlink(missing_ok=True)
        said.append(f"{path}" if why is None else f"no {name}.png: {why}")
    return said


def colours(names: list[str]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def finish(figure: Any, path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_roofline(rows: list[Row], header: dict[str, Any], title: str, path: Path) -> str | None:
    """FLOPs for each byte against TFLOP/s, below the roofs that were measured beside them."""
    import matplotlib.pyplot as plt

    points = [(row, row.flops / row.bytes) for row in rows if row.flops and row.bytes and row.tflops]
    if not points:
        return "no row has both flops and bytes"
    roofs = Roofs(**header["roofs"])
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    low, high = min(x for _, x in points) / 3, max(x for _, x in points) * 3
    used = {dtype_of(row.case, header["kind"]) for row, _ in points}
    for dtype, style in zip(sorted(used & set(roofs.matmul_tflops)), ("-", "--", ":")):
        peak = roofs.matmul_tflops[dtype]
        ridge = 1e3 * peak / roofs.copy_gbs
        low, high = min(low, ridge / 3), max(high, 3 * ridge)
        axis.plot([low, ridge, high], [low * roofs.copy_gbs / 1e3, peak, peak], style, color="black", linewidth=1,
                  label=f"{roofs.copy_gbs:,.0f} GB/s copy, {peak:.3g} TFLOP/s {dtype}")
    shades = colours([row.bench for row, _ in points])
    for bench, colour in shades.items():
        own = [(x, row.tflops) for row, x in points if row.bench == bench]
        axis.scatter(*zip(*own), s=22, color=colour, alpha=0.75, edgecolors="none", label=f"{bench} ({len(own)})", zorder=3)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs for each byte that a step must move at least", ylabel="TFLOP/s")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    finish(figure, path, title)
    return None


def draw_ratios(rows: list[Row], header: dict[str, Any], title: str, path: Path) -> str | None:
    """A panel a bench: for each case, a bar from 1 to each variant's ratio. Baselines, which are 1, are not drawn."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    shown = [row for row in rows if row.ratio not in (None, 1.0)]
    if not shown:
        return "no group has two variants to compare"
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in shown:
        panels.setdefault(row.bench, {}).setdefault(row.case, []).append(row)
    heights = [max(sum(map(case_height, cases.values())), 0.16 * len(variants_of(cases))) + 0.6 for cases in panels.values()]
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, sum(heights) + 0.4), layout="constrained", squeeze=False,
                                height_ratios=heights)
    for axis, (bench, cases) in zip(axes[:, 0], panels.items()):
        draw_bars(axis, cases, colours(variants_of(cases)))
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}") if narrow(axis) else NullFormatter())
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.set_title(f"{bench}: the baseline's time ÷ this one's", fontsize=9, loc="left")
    finish(figure, path, title)
    return None


def variants_of(cases: dict[str, list[Row]]) -> list[str]:
    return list(dict.fromkeys(row.variant for members in cases.values() for row in members))


def case_height(members: list[Row]) -> float:
    """Inches: a bar each, and air between cases."""
    return 0.09 * len(members) + 0.09


def draw_bars(axis: Any, cases: dict[str, list[Row]], shades: dict[str, str]) -> None:
    """From top to bottom, one unit an inch; the legend to the right."""
    from matplotlib.patches import Patch

    top, ticks = 0.0, []
    for members in cases.values():
        for place, row in enumerate(members):
            assert row.ratio is not None
            axis.barh(top + 0.045 + 0.09 * (place + 0.5), row.ratio - 1, 0.08, left=1, color=shades[row.variant])
        ticks.append(top + case_height(members) / 2)
        top += case_height(members)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(ticks, list(cases), fontsize=7)
    axis.set_ylim(top, 0)
    axis.legend([Patch(color=shade) for shade in shades.values()], list(shades), frameon=False, fontsize=7, loc="upper left",
                bbox_to_anchor=(1.01, 1))


def narrow(axis: Any) -> bool:
    """Less than a decade on a log axis: its minor ticks need labels."""
    low, high = axis.get_xlim()
    return bool(high / low < 10)


def num_rows(case: str) -> int | None:
    """N of a loss case, which names it "N=1500"."""
    found = re.search(r"\bN=(\d+)", case)
    return int(found[1]) if found else None


def memory_panels(rows: list[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Loss cases that were measured at two numbers of rows or more: case but for N → variant → (N, peak MB)."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        N = num_rows(row.case) if row.bench == "loss" else None
        if N is not None and row.peak_bytes:
            kind = re.sub(r",? ?\bN=\d+", "", row.case)
            panels.setdefault(kind, {}).setdefault(row.variant, []).append((N, row.peak_bytes / 1e6))
    return {kind: lines for kind, lines in panels.items() if any(len(points) > 1 for points in lines.values())}


def draw_memory(rows: list[Row], header: dict[str, Any], title: str, path: Path) -> str | None:
    """The loss bench's peak memory against its rows: one panel for each case but for N."""
    import matplotlib.pyplot as plt

    panels = memory_panels(rows)
    if not panels:
        return "no loss case was measured at two numbers of rows"
    shades = colours([variant for lines in panels.values() for variant in lines])
    wide = min(3, len(panels))
    tall = -(-len(panels) // wide)
    figure, axes = plt.subplots(tall, wide, figsize=(3.6 * wide + 2, 2.9 * tall + 0.4), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis, (kind, lines) in zip(axes.flat, panels.items()):
        for place, (variant, points) in enumerate(lines.items()):  # wide below narrow: two that are equal are both seen
            axis.plot(*zip(*sorted(points)), "o-", markersize=3.5, linewidth=max(1.2, 5 - 2 * place), color=shades[variant])
        axis.set(xscale="log", yscale="log", xlabel="rows", ylabel="peak MB of a step")
        axis.set_xticks(sorted({N for points in lines.values() for N, _ in points}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(kind or "loss", fontsize=8)
        axis.tick_params(labelsize=7)
    handles = [plt.Line2D([], [], color=shade, marker="o", markersize=3.5) for shade in shades.values()]
    figure.legend(handles, list(shades), frameon=False, fontsize=7, loc="outside right upper")
    finish(figure, path, title)
    return None


class Share(NamedTuple):
    """One bar: a step's time, and what is left of it without head and loss; `baseline_ms`: of the case's hand-patched step."""

    name: str
    whole_ms: float
    rest_ms: float
    baseline_ms: float


def shares(rows: list[Row]) -> list[Share]:
    """Of the first, most important cases; of stage 1 alone where all would be more than a picture holds."""
    rest = {(row.case, row.variant.removesuffix(HEADLESS)): row.p50_ms for row in rows if row.variant.endswith(HEADLESS)}
    found = [Share(f"{row.case}: {row.variant}", row.p50_ms, min(left, row.p50_ms), row.ratio * row.p50_ms) for row in rows
             if row.bench == "step" and row.p50_ms and row.ratio and (left := rest.get((row.case, row.variant)))]
    if len(found) > MOST_SHARES:
        found = [share for share in found if "stage 1" in share.name]
    return found[:MOST_SHARES]


def draw_share(rows: list[Row], header: dict[str, Any], title: str, path: Path) -> str | None:
    """Head and loss against the rest of a step, by leaving them out; lengths are shares of the case's hand-patched step."""
    import matplotlib.pyplot as plt

    found = shares(rows)
    if not found:
        return "no step was measured with and without its head"
    figure, axis = plt.subplots(figsize=(9, 0.23 * len(found) + 1.2), layout="constrained")
    places = range(len(found))
    rest = [share.rest_ms / share.baseline_ms for share in found]
    head = [(share.whole_ms - share.rest_ms) / share.baseline_ms for share in found]
    axis.barh(places, rest, 0.7, color="#8d99ae", label="blocks, embeddings, projector")
    axis.barh(places, head, 0.7, left=rest, color="#e07a5f", label="head and loss")
    for place, share in enumerate(found):
        axis.text(rest[place] + head[place] + 0.01, place, f"{1 - share.rest_ms / share.whole_ms:.0%} of "
                  f"{milliseconds(share.whole_ms)} ms", va="center", fontsize=7)
    axis.set_yticks(places, [share.name for share in found], fontsize=7)
    axis.set_xlim(0, 1.2 * max(map(sum, zip(rest, head))))
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.set_xlabel("time of a step ÷ hand-patched", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    finish(figure, path, title)
    return None


# ---- two reports ---------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """`lines` to print; `worse`: names of rows that are slower by more than asked for and beyond their spread, or not ok, or
    not there, where they were ok."""

    lines: list[str]
    worse: list[str]


def key(row: Row) -> tuple[str, str, str]:
    return row.bench, row.case, row.variant


def overlap(a: Row, b: Row) -> bool:
    """Whether p20 … p80 of both have a time in common."""
    assert a.p20_ms is not None and a.p80_ms is not None and b.p20_ms is not None and b.p80_ms is not None
    return a.p20_ms <= b.p80_ms and b.p20_ms <= a.p80_ms


def compare(a: tuple[dict[str, Any], list[Row]], b: tuple[dict[str, Any], list[Row]], fail_above: float | None) -> Comparison:
    """b against a, row by row: how many times as long it takes."""
    lines, worse = [], []
    if a[0]["device"] != b[0]["device"]:
        lines.append(f"warning: {a[0]['device']!r} and {b[0]['device']!r} are different devices: times do not compare")
    old, new = {key(row): row for row in a[1]}, {key(row): row for row in b[1]}
    for name in old:
        if name not in new:
            if old[name].status == "ok":
                worse.append(" · ".join(name))
            continue
        label, one, other = " · ".join(name), old[name], new[name]
        if one.status != "ok" or other.status != "ok":
            if one.status != other.status:
                lines.append(f"{label}: was {one.status}, is {other.status} ({other.note or one.note})")
            if one.status == "ok":
                worse.append(label)
            continue
        assert one.p50_ms is not None and other.p50_ms is not None
        ratio, same = other.p50_ms / one.p50_ms, overlap(one, other)
        verdict = "same" if same else "slower" if ratio > 1 else "faster"
        lines.append(f"{label}: {ratio:.2f} × ({spread(one)} → {spread(other)} ms) {verdict}")
        if fail_above is not None and ratio > fail_above and not same:
            worse.append(label)
    for title, names in (("only in the first", old.keys() - new.keys()), ("only in the second", new.keys() - old.keys())):
        lines += [f"{title}: {' · '.join(name)}" for name in sorted(names)]
    return Comparison(lines, worse if fail_above is not None else [])


def spread(row: Row) -> str:
    return f"{milliseconds(row.p50_ms)} [{milliseconds(row.p20_ms)}, {milliseconds(row.p80_ms)}]"
