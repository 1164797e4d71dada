"""The texture recipe: what its GPT reads, how rows are graded, and, slowly, all of it at a small size."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import layers
from examples import texture
from omni_adapters import OmniGPT
from omni_adapters.data.texture import VOICES, Clip, draw
from omni_adapters.data.texture_questions import AUDIOBENCH_MINI_SHA256, CATEGORIES
from omni_adapters.eval import suite as suites
from omni_adapters.training.hosts import SPECIALS, WordTokenizer, open_host
from tests.tiny_whisper import make_tiny_whisper

SEEDS = st.integers(0, 10_000)


def clip_of(seed: int) -> Clip:
    return draw(random.Random(seed), VOICES["train"], sentences="train")


@settings(max_examples=50, deadline=None)
@given(st.lists(SEEDS, min_size=1, max_size=5))
def test_answers_and_their_ends_are_graded_and_nothing_else(seeds: list[int]) -> None:
    tokenizer, rng = WordTokenizer(texture.LEXICON), random.Random(sum(seeds))
    lessons = [texture.Lesson.of(clip_of(seed)) for seed in seeds]
    turns = [lesson.turns(rng.choice(list(lesson.clip.labels)), rng) for lesson in lessons]
    rows = [texture.dialogue(tokenizer, tokenizer.encode("tiger tiger"), each) for each in turns]
    idx, targets = texture.collate_dialogues(rows)
    end = tokenizer.encode_special(SPECIALS[-1])
    for row, each, read, wanted in zip(rows, turns, idx, targets):
        expected = [token for turn in each for token in (*tokenizer.encode(turn.answer), end)]
        assert wanted[wanted >= 0].tolist() == expected
        assert [*read[: len(row[0]) - 1].tolist(), row[0][-1]] == row[0]
        places = (wanted >= 0).nonzero().flatten()
        assert all(row[0][place + 1] == wanted[place] for place in places.tolist())


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_every_category_is_asked_as_often_as_said(seed: int) -> None:
    rng = random.Random(seed)
    lessons = [texture.Lesson.of(clip_of(seed + number)) for number in range(60)]
    drawing = texture.Drawing(lessons, rng)
    drawn = [drawing() for _ in range(100 * sum(texture.SLOW.get(name, 1) for name in drawing.asked))]
    assert all(name in lessons[number].clip.labels for number, name in drawn)
    for asked in drawing.asked:
        expected = 100 * texture.SLOW.get(asked, 1)
        assert abs(sum(name == asked for _, name in drawn) - expected) < 6 * expected**0.5  # six standard deviations


def test_batches_hold_what_is_of_like_length() -> None:
    rng = random.Random(0)
    numbers = texture.batches(lambda: rng.randrange(1000), lambda number: number, 8, rng)
    for _ in range(5):
        eight = [next(numbers) for _ in range(8)]
        assert all(len(batch) == 8 for batch in eight)
        batches = sorted(eight, key=min)
        assert all(max(one) <= min(other) for one, other in zip(batches, batches[1:]))


def test_minutes_scale_everything() -> None:
    one, two = texture.Sizes.for_minutes(20), texture.Sizes.for_minutes(40)
    assert all(abs(more - 2 * less) <= 1 for less, more in zip(one, two))


def test_the_pages_table_is_the_committed_result() -> None:
    root = Path(__file__).parents[1]
    report = json.loads((root / "benchmarks" / "results" / "audiobench-mini.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "texture.md").read_text(encoding="utf-8")
    systems = ("overall", "shuffled", "blank", "text_oracle", "cascade")
    assert "| all | " + " | ".join(f"{report[name]['accuracy']:.3f}" for name in systems) + " |" in page
    assert "{:.3f} to {:.3f}".format(*report["overall"]["ci95"]) in page
    assert report["questions_sha256"] == AUDIOBENCH_MINI_SHA256 and report["num_questions"] == 200


def test_the_pages_layers_are_the_committed_ones() -> None:
    root = Path(__file__).parents[1]
    results = json.loads((root / "benchmarks" / "results" / "cpu" / "layers.json").read_text(encoding="utf-8"))["results"]
    page = (root / "docs" / "texture.md").read_text(encoding="utf-8")
    for row, name in (("last layer", "last"), ("middle layer (3 of 6)", "middle"), ("learned mix of all seven", "mix")):
        low, high = results[name]["ci95"]
        assert f"| {row} | {results[name]['accuracy']:.3f} | {low:.3f} to {high:.3f} |" in page


def test_the_pages_transfer_is_the_committed_one() -> None:
    root = Path(__file__).parents[1]
    found = json.loads((root / "benchmarks" / "results" / "cpu" / "transfer.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "texture.md").read_text(encoding="utf-8")
    for name, steps in found["median_steps_to"].items():
        row = "first layer copied" if name == "first layer" else name
        assert f"| {row} | " + " | ".join(f"{count:g}" for count in steps.values()) + " |" in page


@pytest.mark.slow
def test_the_recipe_and_the_layers_run(tmp_path: Path) -> None:
    sizes = "--minutes 0.5 --rows 4 --n-layer 2 --n-embd 32 --hidden 32 --width 16 --rank 4 --workers 1 --no-cascade".split()
    texture.main(["--out", str(tmp_path / "run"), *sizes])
    report = json.loads((tmp_path / "run" / "audiobench-mini.json").read_text())
    assert report["num_questions"] == 200 and set(report["per_category"]) == set(CATEGORIES)
    assert 0 <= report["shuffled"]["accuracy"] <= 1 and report["cascade"] is None
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["lm_unchanged"] and set(metrics["listening_gap"]) == {"stage 1", "stage 2"}
    assert all((tmp_path / "run" / name).is_file() for name in ("adapter.safetensors", "loss.png", "audiobench-mini.png"))
    gpt, tokenizer = open_host("reference", str(tmp_path / "run" / "gpt"))
    omni = OmniGPT.load_adapter(tmp_path / "run" / "adapter.safetensors", gpt)  # finds the ears by itself
    suite = suites.open_suite("audiobench-mini")
    again = suites.ask(omni, suites.turns_of(omni, tokenizer), suite.questions[:20])
    assert [one.said for one in again.graded["overall"] if one is not None] == [one["overall"] for one in report["answers"][:20]]
    whisper = make_tiny_whisper(tmp_path / "whisper")
    layers.main(["--encoder", str(whisper), "--gpt", str(tmp_path / "run" / "gpt"), "--context", "clip", "--clips", "12",
                 "--per-category", "1", "--steps", "2", "--rows", "4", "--hidden", "16", "--rank", "2", "--workers", "1",
                 "--out", str(tmp_path / "layers")])
    results = json.loads((tmp_path / "layers" / "layers.json").read_text())["results"]
    assert set(results) == {"last", "middle", "mix"} and len(results["mix"]["layer_mix"]) == 3
    assert (tmp_path / "layers" / "layers.png").is_file() and (tmp_path / "layers" / "layers_mix.png").is_file()
