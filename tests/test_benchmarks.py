"""The benchmark suite: what a percentile, a round, a row and a comparison are, with clocks that the test turns.

Times come from a fake timer, so that every number expected here is exact; only the last section runs real steps.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as suite
from benchmarks import decode, encoder, loss, measure, report, step
from benchmarks.group import Group, Variant, worst
from benchmarks.measure import (
    HEADLESS,
    MAX_ROUNDS,
    MIN_ROUNDS,
    Roofs,
    Row,
    measure_group,
    peak_bytes,
    percentiles,
)
from benchmarks.roofs import measure_roofs

ROOT = Path(__file__).parents[1]
ROOFS = Roofs(100.0, {"fp32": 2.0, "bf16": 8.0})
HEADER: dict[str, Any] = {"suite": "quick", "kind": "cpu", "device": "a machine", "date": "2026-01-01", "commit": "abc",
                          "versions": {"torch": "2"}, "roofs": ROOFS._asdict()}


class FakeTime:
    """A timer that says what `ms` says of a step, and a clock that goes on by as much."""

    def __init__(self, ms: dict[Any, float | list[float]]) -> None:
        self.ms = {step: (list(value) if isinstance(value, list) else value) for step, value in ms.items()}
        self.now, self.order = 0.0, []

    def timer(self, step: Any) -> float:
        value = self.ms[step]
        ms = value.pop(0) if isinstance(value, list) else value
        self.now += ms / 1e3
        self.order.append(step)
        return ms

    def clock(self) -> float:
        return self.now


def steps(count: int) -> list[Callable[[], None]]:
    return [types.FunctionType((lambda: None).__code__, {}, f"step{i}") for i in range(count)]


def measured(group: Group, ms: dict[Any, float | list[float]], budget_s: float = 0.0) -> tuple[dict[str, Row], FakeTime]:
    time = FakeTime(ms)
    rows = measure_group(group, "cpu", ROOFS, budget_s, timer=time.timer, clock=time.clock)
    assert [row.variant for row in rows] == [variant.name for variant in group.variants]
    return {row.variant: row for row in rows}, time


# ---- times ---------------------------------------------------------------------------------------------------------------


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentiles([10.0, 20, 30, 40, 50, 60]) == (20.0, 35.0, 50.0)  # 1 + 0.2 · 5 = the second, and so on
    assert percentiles([7.0]) == (7.0, 7.0, 7.0)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=30))
def test_percentiles_are_in_order_and_within(times: list[float]) -> None:
    p20, p50, p80 = percentiles(times)
    least, most = min(times) * (1 - 1e-12), max(times) * (1 + 1e-12)
    assert least <= p20 <= p50 <= p80 <= most


def test_rounds_are_interleaved_and_each_begins_with_the_next_variant() -> None:
    a, b, c = steps(3)
    group = Group("x", "case", "a", [Variant("a", a), Variant("b", b), Variant("c", c)])
    rows, time = measured(group, {a: 1.0, b: 2.0, c: 4.0})
    assert time.order == [a, b, c, b, c, a, c, a, b]  # three rounds although no time was given
    assert {row.rounds for row in rows.values()} == {MIN_ROUNDS}
    assert [rows[name].ratio for name in "abc"] == [1.0, 0.5, 0.25]


def test_rounds_go_on_until_the_seconds_are_spent_and_no_further_than_is_useful() -> None:
    a, b = steps(2)
    group = Group("x", "case", "a", [Variant("a", a), Variant("b", b)])
    assert measured(group, {a: 400.0, b: 600.0}, budget_s=4.5)[0]["a"].rounds == 5  # a round takes 1 s; the fifth begins at 4 s
    assert measured(group, {a: 0.0, b: 1e-9}, budget_s=9.0)[0]["b"].rounds == MAX_ROUNDS


def test_a_row_has_percentiles_rates_and_its_share_of_the_roof() -> None:
    a, b, headless = steps(3)
    group = Group("x", "64 new tokens, fp32", "a", [Variant("a", a, flops=4e9, bytes=1e9, saved_bytes=7), Variant("b", b),
                                                    Variant("a" + HEADLESS, headless)])
    rows, _ = measured(group, {a: [10.0, 40, 20], b: 5.0, headless: 4.0})
    row = rows["a"]
    assert (row.p20_ms, row.p50_ms, row.p80_ms) == pytest.approx((14, 20, 32))
    assert row.tflops == pytest.approx(0.2) and row.gbs == pytest.approx(50) and row.tokens_per_s == pytest.approx(3200)
    assert row.share_of_roof == pytest.approx(0.5)  # 1 GB at 100 GB/s is 10 ms, 4 GFLOP at 2 TFLOP/s only 2
    assert row.saved_bytes == 7 and row.launches is None
    assert rows["a, no head"].p50_ms == 4.0 and rows["a, no head"].ratio is None  # an ablation is no rival
    assert rows["b"].ratio == pytest.approx(4) and rows["b"].tflops is None and rows["b"].share_of_roof is None


def test_the_roof_is_that_of_the_dtype_in_the_case() -> None:
    (a,) = steps(1)
    shares = {"big, fp32": 0.5, "big, bfloat16; saved in fp32": 0.125, "big": 0.5}  # 1 TFLOP in 1 s; fp32 is a CPU's usual
    for case, share in shares.items():
        rows, _ = measured(Group("x", case, "a", [Variant("a", a, flops=1e12)]), {a: 1000.0})
        assert rows["a"].share_of_roof == pytest.approx(share)


# ---- rows that are not timed -----------------------------------------------------------------------------------------------


def test_what_cannot_run_is_a_row_and_so_is_what_is_wrong() -> None:
    a, wrong, nan, right = steps(4)
    variants = [Variant("a", a), Variant("peft", why="peft is not installed"), Variant("wrong", wrong, error=0.2),
                Variant("nan", nan, error=float("nan")), Variant("right", right, error=0.1)]
    group = Group("x", "case", "a", variants, bound=0.1)
    rows, _ = measured(group, {a: 1.0, right: 1.0})  # the timer knows no other step
    assert {name: row.status for name, row in rows.items()} == {"a": "ok", "peft": "n/a", "wrong": "invalid", "nan": "invalid",
                                                                "right": "ok"}
    assert rows["wrong"].p50_ms is None and rows["wrong"].ratio is None
    text = report.table(list(rows.values()))
    assert "n/a: peft is not installed" in text and "invalid: error 2.0e-01 is beyond its bound of 1.0e-01" in text


def test_a_variant_that_raises_is_a_row_and_the_others_go_on() -> None:
    a, b, late = steps(3)

    def broken() -> None:
        raise RuntimeError("CUDA out of memory. Tried to\nallocate")

    group = Group("x", "case", "broken", [Variant("a", a), Variant("broken", broken), Variant("late", late), Variant("b", b)])
    rows, _ = measured(group, {a: 1.0, b: 1.0, late: [1.0]})  # late has a time for its first round only: IndexError
    assert [rows[name].status for name in ("a", "broken", "late", "b")] == ["ok", "failed", "failed", "ok"]
    assert rows["broken"].note == "RuntimeError: CUDA out of memory. Tried to"
    assert rows["late"].note.startswith("IndexError") and rows["b"].rounds == MIN_ROUNDS
    assert rows["a"].ratio is None  # there is no baseline to divide by


def test_times_stand_where_a_profiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    (a,) = steps(1)

    def forbidden(*_: Any) -> int:
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(measure, "launches", forbidden)
    monkeypatch.setattr(measure, "peak_of", forbidden)
    row = measured(Group("x", "case", "a", [Variant("a", a, "compiled in 3 s")]), {a: 2.0})[0]["a"]
    assert (row.status, row.p50_ms, row.launches, row.peak_bytes) == ("ok", 2.0, None, None)
    said = "not counted: RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    assert row.note == f"compiled in 3 s; launches {said}; peak {said}"


# ---- files and comparison --------------------------------------------------------------------------------------------------


def ok(variant: str, p20: float, p50: float, p80: float, **more: Any) -> Row:
    return Row("x", "case", variant, "ok", "", 1.0, p20, p50, p80, **more)


ROWS = [ok("a", 1.0, 2.0, 3.0, rounds=5, launches=12, error=1e-7, peak_bytes=10**9), Row("x", "case", "b, c", "n/a", 'no "b"'),
        Row("x", "other", "a", "invalid", "wrong", error=0.5, bound=0.1)]


def test_json_and_csv_hold_the_rows(tmp_path: Path) -> None:
    report.write(tmp_path, HEADER, ROWS)
    assert report.read(tmp_path) == (HEADER, ROWS) == report.read(tmp_path / "suite.json")
    assert report.read_csv(tmp_path / "suite.csv") == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["suite.csv", "suite.json"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    report.write(tmp_path, HEADER, [Row("x", "case", "a", "invalid", "error nan", error=float("nan"))])
    text = (tmp_path / "suite.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["rows"][0]["error"] is None


def test_compare_says_slower_faster_or_same() -> None:
    old = [ok("slower", 9, 10, 11), ok("faster", 9, 10, 11), ok("same", 9, 10, 11), ok("gone", 1, 1, 1), ok("broke", 1, 1, 1)]
    new = [ok("slower", 11.5, 12, 13), ok("faster", 4, 5, 6), ok("same", 10.9, 15, 16), ok("new", 1, 1, 1),
           Row("x", "case", "broke", "failed", "RuntimeError: no")]
    found = report.compare((HEADER, old), (HEADER, new), 1.1)
    text = "\n".join(found.lines)
    assert "slower: 1.20 × (10 [9, 11] → 12 [11.5, 13] ms) slower" in text
    assert "faster: 0.50 ×" in text and text.count(" same\n") == 1
    assert "broke: was ok, is failed (RuntimeError: no)" in text
    assert "only in the first: x · case · gone" in text and "only in the second: x · case · new" in text
    assert found.worse == ["x · case · slower", "x · case · gone", "x · case · broke"]  # "same" is within its spread
    assert report.compare((HEADER, old), (HEADER, new), 1.3).worse == ["x · case · gone", "x · case · broke"]
    assert report.compare((HEADER, old), (HEADER, new), None).worse == []


def test_compare_exits_1_where_asked_and_warns_of_another_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.write(tmp_path / "a", HEADER, [ok("a", 9, 10, 11)])
    report.write(tmp_path / "b", HEADER | {"device": "another"}, [ok("a", 19, 20, 21)])
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert suite.main(["compare", *folders]) == 0
    assert "are different devices" in capsys.readouterr().out
    assert suite.main(["compare", *folders, "--fail-above", "1.1"]) == 1
    assert suite.main(["compare", folders[1], folders[0], "--fail-above", "1.1"]) == 0


@pytest.mark.parametrize("text", [
    None, "", "[]", "{}", '{"header": {}, "rows": []}', json.dumps({"header": HEADER, "rows": [{"bench": "x"}]}),
    json.dumps({"header": HEADER, "rows": [Row("x", "case", "a", "ok")._asdict()]}),
], ids=["missing", "empty", "a list", "no header", "half a header", "half a row", "no time"])
def test_what_is_no_report_is_named(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "suite.json"
    if text is not None:
        path.write_text(text)
    for command in (["show", str(tmp_path)], ["compare", str(path), str(path)]):
        with pytest.raises(SystemExit) as error:
            suite.main(command)
        assert error.value.code == 2 and f"{path} is no report of python -m benchmarks" in capsys.readouterr().err


def test_options_that_say_nothing_are_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite, "measure_roofs", None)
    (tmp_path / "file").write_text("")
    nothing = ["compare", "a", "b", "--fail-above", "nan"]
    for command, said in ((["--out", str(tmp_path / "file")], "--out"), (nothing, "nan: a finite")):
        with pytest.raises(SystemExit) as error:
            suite.main(command)
        assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_loss_case_says_its_rows() -> None:
    assert [report.num_rows(case) for case in ("weight frozen, N=1500, C=384", "N=64", "32 rows supervised")] == [1500, 64, None]


def test_losses_of_one_kind_are_one_panel_whatever_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full suite measures the frozen head at three numbers of rows: that is what the picture of memory is of."""
    monkeypatch.setattr(loss, "SIZES", {("full", "cpu"): loss.Size(64, 8, 32)})
    monkeypatch.setattr(loss, "MORE_ROWS", {"cpu": (16, 256)})
    monkeypatch.setattr(loss, "contenders", lambda case, *_: [("naive", loss.partial(loss.naive, softcap=case.softcap))])
    made = list(loss.groups("full", "cpu"))
    assert [report.num_rows(group.case) for group in made] == [64, 64, 64, 64, 64, 16, 256]
    assert made[1].case.startswith("frozen, kernels alone") and made[1].variants[0].why == "needs CUDA and triton"
    made = [group for group in made if "alone" not in group.case]
    assert made[2].case == "1 rows supervised, N=64, C=8, V=32, float32"  # 32 of 1500 are 1 of 64
    rows = [row for group in made for row in measure_group(group, "cpu", ROOFS, 0.0)]
    assert all(row.status == "ok" and row.peak_bytes for row in rows)
    assert report.memory_panels(rows).keys() == {"weight frozen, C=8, V=32, float32"}
    assert report.draw_all(tmp_path, HEADER, rows)[2] == str(tmp_path / "memory.png")


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    def row(bench: str, case: str, variant: str, ms: float, **more: Any) -> Row:
        return Row(bench, case, variant, "ok", "", 10 / ms, ms, ms, ms, **more)

    said = report.draw_all(tmp_path, HEADER, [row("loss", "N=10", "only", 10.0)])
    assert [line.partition(":")[0] for line in said] == [f"no {name}.png" for name in ("roofline", "ratios", "memory", "share")]
    rows = [row("loss", f"frozen, N={N}, fp32", name, ms, peak_bytes=N * 100, flops=1e9, bytes=1e8, tflops=0.1)
            for N in (10, 100) for name, ms in (("naive", 10.0), ("chunked", 5.0))]
    rows += [row("step", "d6", "prepender", 10.0), row("step", "d6", "prepender" + HEADLESS, 6.0)._replace(ratio=None)]
    said = report.draw_all(tmp_path, HEADER, rows)
    assert said == [str(tmp_path / f"{name}.png") for name in ("roofline", "ratios", "memory", "share")]
    assert all(Path(path).stat().st_size > 5000 for path in said)


def test_a_share_is_what_leaving_the_head_out_saves() -> None:
    def pair(case: str, whole: float, rest: float) -> list[Row]:
        row = Row("step", case, "prepender", "ok", "", 30 / whole, whole, whole, whole)
        return [row, row._replace(variant="prepender" + HEADLESS, ratio=None, p50_ms=rest)]

    assert report.shares(pair("d6, stage 1", 10.0, 6.0)) == [report.Share("d6, stage 1: prepender", 10.0, 6.0, 30.0)]
    assert report.shares(pair("d6, stage 1", 10.0, 11.0))[0].rest_ms == 10.0  # noise: no head takes less than no time
    many = [row for number in range(20) for stage in ("1", "2") for row in pair(f"d{number}, stage {stage}", 10.0, 6.0)]
    assert [share.name for share in report.shares(many)] == [f"d{number}, stage 1: prepender" for number in range(20)]


# ---- the command -----------------------------------------------------------------------------------------------------------


def stub(groups: list[Group | Exception]) -> types.ModuleType:
    module = types.ModuleType("benchmarks.loss")

    def of(suite: str, device: str) -> Iterator[Group]:
        for group in groups:
            if isinstance(group, Exception):
                raise group
            yield group
    module.groups = of  # type: ignore[attr-defined]
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[Row]]]:
    """The suite on a bench that the test makes, in the place of benchmarks.loss, without measuring this machine's roofs."""
    def call(groups: list[Group | Exception], *more: str) -> tuple[int, list[Row]]:
        monkeypatch.setitem(sys.modules, "benchmarks.loss", stub(groups))
        monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(suite, "measure_roofs", lambda device: ROOFS)
        code = suite.main(["--bench", "loss", "--seconds", "0", "--out", str(tmp_path), *more])
        return code, report.read(tmp_path)[1]
    return call


def matmul() -> torch.Tensor:
    x = torch.ones(64, 64, requires_grad=True)
    (x @ x).sum().backward()
    return x


GOOD = Group("loss", "64 rows, fp32", "a", [Variant("a", matmul, error=1e-8, flops=1e6, bytes=5e4), Variant("b", matmul)], 1e-6)


def test_a_run_measures_writes_and_exits_0(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run([GOOD])
    assert code == 0 and [row.status for row in rows] == ["ok", "ok"]
    assert all(row.p50_ms and row.first_ms and row.peak_bytes and row.rounds == MIN_ROUNDS for row in rows)
    assert rows[0].peak_bytes is not None and rows[0].peak_bytes >= 2 * 64 * 64 * 4  # x and its gradient
    header, _ = report.read(tmp_path)
    assert header["command"] == "python -m benchmarks --bench loss --seconds 0"  # and nothing of this machine's folders
    assert header["versions"]["torch"] == metadata.version("torch") and "liger-kernel" in header["versions"]
    assert "loss: 64 rows, fp32" in capsys.readouterr().out
    assert (tmp_path / "ratios.png").exists() and (tmp_path / "roofline.png").exists()
    (tmp_path / "ratios.png").unlink()
    assert suite.main(["show", str(tmp_path)]) == 0 and (tmp_path / "ratios.png").exists()


def test_a_run_goes_on_past_what_fails_and_exits_1(run: Any) -> None:
    wrong = Group("loss", "wrong", "a", [Variant("a", matmul, error=1.0)], 1e-6)
    code, rows = run([wrong, GOOD, ValueError("no data")])
    assert code == 1
    assert [row.status for row in rows] == ["invalid", "ok", "ok", "failed"]
    assert rows[-1].note == "ValueError: no data"


def test_a_device_that_is_lost_is_a_row(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(suite.gc, "collect", lost)
    code, rows = run([GOOD, GOOD])
    assert code == 1 and [row.status for row in rows] == ["ok", "ok", "failed"]
    assert rows[-1].note == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_on_a_cpu_each_bench_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second is killed half-way: what it had measured stands, and a row says that there is no more."""
    asked: list[list[str]] = []

    def child(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        asked.append(command[3:])
        bench, out = (command[command.index(option) + 1] for option in ("--bench", "--out"))
        report.write(Path(out), HEADER, [ok("a", 1, 2, 3)._replace(bench=bench)])
        return subprocess.CompletedProcess(command, {"lora": 0, "decode": -9}[bench])

    monkeypatch.setattr(suite, "measure_roofs", lambda device: ROOFS)
    monkeypatch.setattr(suite, "commit", lambda: "abc")
    monkeypatch.setattr(suite.subprocess, "run", child)
    assert suite.main(["--bench", "lora", "decode", "--seconds", "2", "--minutes", "1", "--out", str(tmp_path)]) == 1
    assert [words[:6] for words in asked] == [["--suite", "quick", "--bench", b, "--seconds", "2"] for b in ("lora", "decode")]
    rows = report.read(tmp_path)[1]
    assert [(row.bench, row.status) for row in rows] == [("lora", "ok"), ("decode", "ok"), ("decode", "failed")]
    assert rows[-1].note == "their process ended with code -9"
    assert not (tmp_path / "lora").exists() and not (tmp_path / "decode").exists()


def test_a_bench_without_groups_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.loss", types.ModuleType("benchmarks.loss"))
    for spec, note in ((None, "there is no benchmarks.loss"), ("found", "benchmarks.loss has no groups")):
        monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name, spec=spec: spec)
        (row,) = suite.groups_of("loss", "quick", "cpu")
        assert isinstance(row, Row) and (row.status, row.note) == ("n/a", note)


def test_minutes_end_a_bench_with_a_row(run: Any) -> None:
    code, rows = run([GOOD, GOOD, GOOD], "--minutes", "0")
    assert code == 0 and [row.status for row in rows] == ["ok", "ok", "n/a"]
    assert rows[-1].note == "--minutes 0 are spent"


def test_a_name_that_is_no_bench_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--bench", "losses"])
    assert "no bench losses; there are lora, decode" in capsys.readouterr().err


# ---- the benches -----------------------------------------------------------------------------------------------------------


def test_roofs_are_those_of_a_copy_and_a_matmul() -> None:
    roofs = measure_roofs("cpu", num_bytes=2**20, shapes=[(64, 64, 64), (32, 8, 16)])
    assert roofs.copy_gbs > 0 and set(roofs.matmul_tflops) == {"fp32"} and roofs.matmul_tflops["fp32"] > 0


def test_the_peak_of_a_step_is_what_it_holds_at_a_time() -> None:
    def two_then_one() -> None:
        a, b = torch.empty(1000), torch.empty(500)
        del a, b
        torch.empty(1200)

    assert peak_bytes(two_then_one, [], "cpu") == 4 * 1500
    assert peak_bytes(lambda: None, [], "cpu") == 0


def test_gradients_of_the_step_before_are_no_part_of_a_peak() -> None:
    x = torch.ones(1000, requires_grad=True)

    def step() -> None:
        x.grad = None
        x.square().sum().backward()

    wanted = peak_bytes(step, [x], "cpu")
    assert x.grad is not None and wanted >= 8000  # x² or 2x, and x.grad
    assert measure.peak_of(Variant("x", step, trained=(x,)), "cpu") == wanted


def test_a_loss_that_fails_is_a_row_and_a_foreign_one_is_not_applicable(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise ValueError("no kernel image")

    tensors = loss.batch(loss.FROZEN, loss.Size(8, 4, 16), "cpu", torch.float32)
    ours, theirs = (loss.variant(name, broken, tensors, []) for name in ("triton", "liger"))
    assert ours.step is not None and theirs.step is None and theirs.why == "ValueError: no kernel image"
    with pytest.raises(RuntimeError, match="no kernel image"):
        ours.step()
    monkeypatch.setattr(loss, "missing", lambda package, device: "")
    for name in ("liger", "cut_cross_entropy"):
        monkeypatch.setattr(loss, name, broken)
    assert {why for _, why in loss.others(loss.FROZEN, "cuda")} == {"ValueError: no kernel image"}


@pytest.mark.parametrize("stage", step.STAGES)
def test_steps_agree_with_the_hand_patched_forward_in_fp64(stage: str) -> None:
    (group,) = step.groups_of(step.Case(1, stage, 6, 16, "cpu"), compiling=False)  # 2¹⁹ logits
    found = {variant.name: variant for variant in group.variants}
    assert set(found) == {*step.NAMES, *(name + HEADLESS for name in step.EAGER[:2])}
    for name in step.EAGER:
        error, bound = found[name].error, group.bound
        assert error is not None and bound is not None and error <= bound
    by_hand, ours, fused = (found[name] for name in step.EAGER)
    assert fused.saved_bytes is not None and fused.saved_bytes != ours.saved_bytes  # another way; fewer where it is chunked:
    assert stage == "full" or fused.saved_bytes < ours.saved_bytes                  # a trained weight has too few rows for it
    assert by_hand.flops and ours.flops and by_hand.saved_bytes and ours.saved_bytes
    C, V, soft, matmuls = 128, 32768, 6, 3 if stage == "full" else 2  # forward, hidden states' gradient, the weight's gradient
    assert by_hand.flops - ours.flops == pytest.approx(2 * V * C * soft * matmuls, rel=1e-4)  # a smear gate is 24 wide
    assert by_hand.saved_bytes > ours.saved_bytes
    assert found["CUDA graph, compiled"].step is None and "CPU" in found["CUDA graph, compiled"].why


def test_nothing_of_a_step_outlives_its_group() -> None:
    """A suite of many groups would fill the machine, and with it the GPU."""
    def living() -> int:
        gc.collect()
        return sum(type(one) in (torch.Tensor, torch.nn.Parameter) and one.numel() >= 2**16 for one in gc.get_objects())

    before = living()
    for group in step.groups_of(step.Case(1, "full", 6, 4, "cpu"), compiling=False):
        assert living() > before
        for variant in group.variants:
            if variant.step is not None:
                variant.step()
        del group, variant
    assert living() <= before


def test_a_wrong_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step.Host, "loss_by", lambda self, name, module=None: lambda: self.headless("prepender")()
                        + 0 * sum(p.sum() for p in self.trained.values()))
    (group,) = step.groups_of(step.Case(1, "1", 6, 4, "cpu"), compiling=False)
    errors = [variant.error for variant in group.variants[:2]]
    assert all(error is not None and error > 0.1 for error in errors)


def test_a_gradient_that_is_not_a_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a right loss and a right gradient: √ has no slope at 0, and 0 × ∞ is NaN."""
    right = step.Host.loss_by

    def loss_by(self: step.Host, name: str, module: Any = None) -> Callable[[], torch.Tensor]:
        return lambda: right(self, name, module)() + (0 * list(self.trained.values())[-1]).sum().sqrt()

    monkeypatch.setattr(step.Host, "loss_by", loss_by)
    (group,) = step.groups_of(step.Case(1, "1", 6, 4, "cpu"), compiling=False)
    rows = measure_group(group._replace(variants=group.variants[:3]), "cpu", ROOFS, 0.0)
    assert [(row.status, row.note.split()[1]) for row in rows] == 3 * [("invalid", "nan")]
    assert group.bound == step.FLOOR[torch.float32]  # three times NaN is no bound


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(0, 9), st.booleans())
def test_the_worst_of_errors_is_nan_where_one_is(errors: list[float], place: int, nan: bool) -> None:
    if nan:
        errors.insert(place, float("nan"))
    assert math.isnan(worst(errors)) if nan else worst(errors) == max(errors)


def test_compiled_steps_are_a_group_behind_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def compiled(self: step.Host, name: str, expected: list[torch.Tensor]) -> Variant:
        asked.append(name)
        return Variant(name, lambda: None)

    monkeypatch.setattr(step.Host, "compiled", compiled)
    both = step.groups_of(step.Case(1, "1", 6, 4, "cpu"), compiling=True)
    eager = next(both)
    assert {variant.name for variant in eager.variants} == {*step.EAGER, *(name + HEADLESS for name in step.EAGER[:2])}
    assert not asked  # eager rows are there before anything is compiled
    (behind,) = both
    assert behind.case == f"{eager.case}, compiled" and behind.baseline == "hand-patched" and set(asked) == {*step.COMPILED}
    assert [variant.name for variant in behind.variants] == ["hand-patched", *step.COMPILING]
    assert set(step.COMPILING) == {*step.COMPILED, *step.GRAPHS} and behind.variants[0].error == eager.variants[0].error
    assert all((variant.step is None) == (variant.name in step.GRAPHS) for variant in behind.variants)


def test_cases_of_the_suite() -> None:
    assert {(case.depth, case.T) for case in step.cases("quick", "cpu")} == {(6, 32)}
    full = step.cases("full", "cuda")
    assert len(full) == len(set(full)) == 3 * 4 * 2 * 3  # depths, soft tokens, text tokens, stages
    compiled = step.to_compile("full", "cuda")
    assert set(full[: len(compiled)]) == set(compiled) and {case.depth for case in compiled} == {6, 12, 20}


def test_decoding_agrees_with_and_without_a_cache() -> None:
    first, several = decode.groups_of(1, 6, 3, "cpu")
    for group in (first, several):
        assert [variant.name for variant in group.variants] == list(decode.NAMES)
        for variant in group.variants:
            assert variant.error is not None and group.bound is not None and variant.error <= group.bound
    tokens = [variant.step() for variant in several.variants if variant.step is not None]
    assert len(tokens[0]) == 3 and tokens[0] == tokens[1] == tokens[2]
    flops = [variant.flops for variant in several.variants]
    assert flops[0] > flops[1] > flops[2]  # type: ignore[operator]


def test_encoders_are_measured_without_tf32_and_leave_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(encoder, "random_whisper", lambda *_: None)
    monkeypatch.setattr(encoder, "groups_of", lambda *_: (GOOD for _ in range(2)))
    for _ in encoder.groups("quick", "cpu"):
        seen.append(torch.backends.cudnn.allow_tf32)
        if len(seen) == 3:  # a run that is out of time
            break
    assert seen == 3 * [False] and torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_gpu_script_can_be_read() -> None:
    subprocess.run(["bash", "-n", "benchmarks/gpu.sh"], cwd=ROOT, check=True)
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    limits = [int(limit) for limit in re.findall(r"^ *step (\d+) ", text, re.MULTILINE)]
    assert len(limits) == 6 and text.count("timeout") == 1 and "timeout -k 5 " in text
    assert sum(limits) + 5 * len(limits) <= 480  # seconds, with the time in which a process may resist


def run_gpu_script(tmp_path: Path, python: str, **variables: str) -> tuple[int, list[str]]:
    """With an interpreter that notes how it is called: exit code and calls."""
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >> "$CALLS"\n{python}\n')
    (tmp_path / "python").chmod(0o755)
    own = {"OUT": str(tmp_path / "out"), "PYTHON": str(tmp_path / "python"), "CALLS": str(tmp_path / "calls")}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=os.environ | own | variables, capture_output=True)
    return done.returncode, [line for line in (tmp_path / "calls").read_text().splitlines() if " pip " not in line]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_gpu_script_goes_on_past_what_fails(tmp_path: Path) -> None:
    code, calls = run_gpu_script(tmp_path, "exit 3")
    assert code == 1 and len(calls) == 5 and calls[0] == "-m benchmarks.roofs --device cuda"
    first, second = (call.split("--bench ")[1].split(" --")[0].split() for call in calls if "--bench" in call)
    assert second == ["loss"] and first + second == list(suite.BENCHES)


@pytest.mark.skipif(shutil.which("bash") is None or not Path("/proc/self/status").exists(), reason="no bash, or no Linux")
def test_gpu_script_packs_what_it_has(tmp_path: Path) -> None:
    """After each step: the last one here ends the script."""
    die = 'kill -9 $PPID $(awk "/PPid/ {print \\$2}" /proc/$PPID/status)'
    code, calls = run_gpu_script(tmp_path, f'echo "said by $2"\ncase "$*" in *"--bench loss"*) {die};; esac', PACK="1")
    assert code == -9 and len(calls) == 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.tgz"]
    with tarfile.open(tmp_path / "out" / "results.tgz") as packed:
        names = {member.name: member for member in packed.getmembers() if member.isfile()}
        assert set(names) == {f"./{name}" for name in ("roofs.txt", "kernels.log", "library.log", "suite.txt")}
        assert packed.extractfile(names["./roofs.txt"]).read() == b"said by benchmarks.roofs\n"  # type: ignore[union-attr]


def test_the_page_says_what_was_measured() -> None:
    """docs/performance.md's table, row by row, from the committed report."""
    header, rows = report.read(ROOT / "benchmarks" / "results" / "cpu")
    found = {(row.bench, row.case, row.variant): row for row in rows}
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "performance.md").read_text().splitlines()]
    told = [line for line in lines if len(line) == 6 and line[0] in suite.BENCHES]
    assert {line[0] for line in told} == set(suite.BENCHES) and header["suite"] == "full"
    for bench, case, variant, against, ratio, peak in told:
        row, other = found[bench, case, variant], found[bench, case, against]
        assert row.ratio is not None and row.peak_bytes is not None and other.peak_bytes is not None and other.ratio == 1
        assert (ratio, peak) == (f"{row.ratio:.2f}", f"{row.peak_bytes / 1e6:.1f} of {other.peak_bytes / 1e6:.1f}")


def test_the_readme_says_what_was_measured() -> None:
    _, rows = report.read(ROOT / "benchmarks" / "results" / "cpu")
    found = {(row.case, row.variant): row for row in rows if row.bench == "step"}
    text = (ROOT / "README.md").read_text()
    told = re.findall(r"^\| (\d+) \|((?: [\d.]+ ×(?: faster| less)? \|){4})$", text, re.MULTILINE)
    assert len(told) == 4
    for soft, cells in told:
        expected = []
        for stage in ("stage 1", "all trained"):
            case = f"d6, {stage}, {soft} soft + 32 text tokens, 1 row, fp32"
            ours, theirs = found[case, "prepender"], found[case, "hand-patched"]
            assert ours.ratio is not None and ours.peak_bytes is not None and theirs.peak_bytes is not None
            expected += [f"{ours.ratio:.2f}", f"{theirs.peak_bytes / ours.peak_bytes:.2f}"]
        assert re.findall(r"[\d.]+(?= ×)", cells) == expected


def test_the_goals_on_a_cpu_are_reached() -> None:
    """In the committed report: LoRA within 1.25 × of the frozen layer, a 5 s clip 5 × faster than padded to 30 s, a loss 1.6 ×
    faster in a fifth of the memory, and 20 × where 32 rows of 1500 count."""
    _, rows = report.read(ROOT / "benchmarks" / "results" / "cpu")
    assert not [row for row in rows if row.status in ("failed", "invalid")]
    found = {(row.bench, row.case, row.variant): row for row in rows}
    ratios = {key: row.ratio or 0.0 for key, row in found.items()}
    assert 1 / ratios["lora", "768 → 3072, 4096 rows, float32", "ours"] <= 1.25
    clips = [ratio for (bench, case, variant), ratio in ratios.items()
             if bench == "encoder" and "of 5 s" in case and variant == "context=clip"]
    assert len(clips) == 10 and min(clips) >= 5
    size = "N=1500, C=384, V=32768, float32"
    peaks = {variant: found["loss", f"weight frozen, {size}", variant].peak_bytes or 0 for variant in ("naive", "chunked")}
    assert ratios["loss", f"weight frozen, {size}", "chunked"] >= 1.6 and 5 * peaks["chunked"] <= peaks["naive"]
    assert ratios["loss", f"32 rows supervised, {size}", "chunked"] >= 20
    block = "block of width {}, 4096 rows, float32; saved bytes in bf16"
    for width in (384, 768, 1280):  # beyond what a frozen block keeps, PEFT's three times and more
        frozen, ours, peft = (found["lora", block.format(width), variant].saved_bytes or 0
                              for variant in ("frozen block", "ours", "PEFT"))
        assert 3 * (ours - frozen) <= peft - frozen
