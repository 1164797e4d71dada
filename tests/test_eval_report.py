"""Intervals against a closed form, sums by hand, the keys that are promised, a picture that is one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_adapters.data.questions import Question, Suite
from omni_adapters.eval.report import bar_places, bootstrap_ci95, chance, check_target, make_report, scoreboard, write_report
from omni_adapters.eval.suite import SYSTEMS, Answers, Graded
from omni_adapters.shapes import BadInput


def question(number: int, category: str = "pitch", about: str = "texture", options: tuple[str, ...] = tuple("abcd")) -> Question:
    return Question(f"q{number}", category, about, "what", options, 0, audio="x.wav")


def graded(*points: int | None) -> list[Graded | None]:
    return [None if each is None else Graded(each, 1, 1 - each) for each in points]


SUITE = Suite("small", (question(0), question(1), question(2, "verb", "words"), question(3, "verb", "words", ("a", "b"))), "5ac")
ANSWERS = Answers({"overall": graded(1, 1, 0, 1), "shuffled": graded(0, 1, 0, 0), "blank": graded(0, 0, 0, 1),
                   "text_oracle": graded(None, None, 1, 1)}, [], {"text_oracle": 2})


@pytest.mark.parametrize(("right", "num"), [(150, 200), (20, 40), (9, 10)])
def test_the_interval_of_an_accuracy_is_the_binomials(right: int, num: int) -> None:
    """Resampling n answers of which a share p is right draws Binomial(n, p) / n: its quantiles are known exactly."""
    low, high = bootstrap_ci95([1] * right + [0] * (num - right), [1] * num)
    p, below, quantiles = right / num, 0.0, []
    for k in range(num + 1):
        below += math.comb(num, k) * p**k * (1 - p) ** (num - k)
        quantiles.append(below)
    exact = [next(k for k in range(num + 1) if quantiles[k] >= share) / num for share in (0.025, 0.975)]
    # 10,000 draws put the share below a quantile within 4 · sqrt(0.025 · 0.975 / 10,000) < 0.0063 of 2.5 %
    near = [next(k for k in range(num + 1) if quantiles[k] >= share) / num for share in (0.0187, 0.0313, 0.9687, 0.9813)]
    assert near[0] <= low <= near[1] and near[2] <= high <= near[3]
    assert low == pytest.approx(exact[0], abs=1.01 / num) and high == pytest.approx(exact[1], abs=1.01 / num)


def test_intervals_of_ratios_repeat_and_refuse() -> None:
    wrong, words = [0, 2, 5, 1], [4, 6, 5, 3]
    low, high = bootstrap_ci95(wrong, words)
    assert 0 <= low < 8 / 18 < high <= 1 and bootstrap_ci95(wrong, words) == [low, high]
    assert bootstrap_ci95([1, 1], [1, 1]) == [1.0, 1.0] and bootstrap_ci95([0, 0], [3, 1]) == [0.0, 0.0]
    with pytest.raises(BadInput, match="0 points"):
        bootstrap_ci95([], [])


def test_the_promised_keys_and_their_values() -> None:
    report = make_report(SUITE, ANSWERS, command="omni-adapters eval", seconds=1.5, adapter_sha256="ad")
    assert {"overall", "shuffled", "blank", "text_oracle", "cascade", "per_category", "num_questions", "questions_sha256",
            "command", "seconds", "by_about", "answers", "adapter_sha256", "versions"} <= set(report)
    assert report["overall"]["accuracy"] == 0.75
    assert report["text_oracle"] == {"accuracy": 1.0, "ci95": [1.0, 1.0], "num_questions": 2}
    assert report["overall"]["ci95"][0] < 0.75 < report["overall"]["ci95"][1] and report["cascade"] is None
    assert report["per_category"] == {
        "pitch": {"about": "texture", "num_questions": 2, "overall": 1.0, "shuffled": 0.5, "blank": 0.0, "text_oracle": None,
                  "cascade": None},
        "verb": {"about": "words", "num_questions": 2, "overall": 0.5, "shuffled": 0.0, "blank": 0.5, "text_oracle": 1.0,
                 "cascade": None}}
    assert report["by_about"]["words"]["overall"]["accuracy"] == 0.5 and report["by_about"]["texture"]["cascade"] is None
    assert (report["num_questions"], report["questions_sha256"], report["seconds"]) == (4, "5ac", 1.5)
    assert report["chance"] == chance(SUITE.questions) == (3 / 4 + 1 / 2) / 4
    assert set(report["versions"]) == {"omni_adapters", "torch", "espeakng-loader", "pocketsphinx"}
    assert report["answers"][2] == {"id": "q2", "category": "verb", "right": 0, "overall": 1, "shuffled": 1, "blank": 1,
                                    "text_oracle": 0}


def test_word_error_rates_are_of_all_words() -> None:
    suite = Suite("said", (question(0, "t", "words", ("a b",)), question(1, "t", "words", ("c",))), "5ac")
    answers = Answers({"overall": [Graded(1, 2, "a"), Graded(3, 1, "d e f")]}, ["a", "f"], {})
    report = make_report(suite, answers, command="", seconds=0)
    assert report["metric"] == "wer" and report["overall"]["wer"] == 4 / 3 and report["chance"] is None
    assert report["answers"][0] == {"id": "q0", "category": "t", "right": "a b", "overall": "a", "transcript": "a"}
    assert "wer 1.333" in scoreboard(report)


def test_the_table_has_a_row_for_each_category_and_group() -> None:
    lines = scoreboard(make_report(SUITE, ANSWERS, command="", seconds=0)).splitlines()
    assert lines[0].split() == "n ours another's sound silence transcript recogniser".split()
    assert [line.split()[0] for line in lines[1:-1]] == ["pitch", "verb", "texture", "words", "all"]
    assert lines[1].split() == ["pitch", "2", "1.000", "0.500", "0.000", "–", "–"]
    assert "accuracy 0.750" in lines[-1] and "guessing gets 0.312" in lines[-1]


def test_json_and_picture_lie_side_by_side(tmp_path: Path) -> None:
    report = make_report(SUITE, ANSWERS, command="", seconds=0)
    out, picture = write_report(tmp_path / "runs" / "small.json", report)
    assert json.loads(out.read_text()) == report and picture == tmp_path / "runs" / "small.png"
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") == 1200  # pixels wide
    with pytest.raises(BadInput, match=r"ends in \.json"):
        write_report(tmp_path / "small.txt", report)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["small.json", "small.png"]
    (tmp_path / "folder.json").mkdir()
    for bad in (tmp_path / "folder.json", out / "more" / "small.json"):
        with pytest.raises(BadInput, match="where no file can be written"):
            check_target(bad)
    assert check_target(tmp_path / "new" / "small.json") and not (tmp_path / "new").exists()


@given(st.lists(st.sampled_from(["texture", "words", "music"]), min_size=1, max_size=12))
def test_groups_stand_apart(abouts: list[str]) -> None:
    places = bar_places({str(number): {"about": about} for number, about in enumerate(abouts)})
    order = sorted(range(len(places)), key=places.__getitem__)
    gaps = [(places[b] - places[a], abouts[a] == abouts[b]) for a, b in zip(order, order[1:])]
    assert all(gap == (1 if same else 2) for gap, same in gaps)


def test_every_system_has_a_column() -> None:
    assert set(make_report(SUITE, ANSWERS, command="", seconds=0)) >= set(SYSTEMS)
