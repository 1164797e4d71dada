"""A folder of spoken clips from a specification: `omni-adapters speak`.

    {"seed": 0, "splits": {"train": {"clips": 10000, "voices": ["f1", …]}, …}, "ranges": {"words": [3, 6], …}}

Notable:
- DIR/{split}.jsonl is a manifest, with all that was decided about a clip in its row; DIR/audio holds the clips of all splits.
- Equal specifications give equal bytes on one machine. A file is named by its clip and appears whole or not at all; started
  again after a crash, the corpus goes on where it was. A manifest that is there has all its clips.
- Splits share no sentence: each takes the sentences of its set (`texture.sentence_set`), by default the set of its own name. Nor
  do they share voices, unless the specification says `"shared_voices": true`.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

from omni_adapters.data.audio import load_audio, save_audio
from omni_adapters.data.manifest import ManifestRow, write_manifest
from omni_adapters.data.sounds import SAMPLING_RATE
from omni_adapters.data.texture import LANGUAGES, RANGES, SETS, VARIANTS, VOICES, Clip, draw
from omni_adapters.data.texture_sound import measured_pitch, produce, say
from omni_adapters.files import json_object, write_whole
from omni_adapters.processes import worker_pool
from omni_adapters.shapes import BadInput, MissingExtra, listing

DEFAULT_SPEC: dict[str, Any] = {
    "seed": 0,
    "splits": {"train": {"clips": 10_000, "voices": VOICES["train"]}, "valid": {"clips": 300, "voices": VOICES["valid"]},
               "test": {"clips": 600, "voices": VOICES["test"]}},
    "ranges": RANGES,
}
LIMITS = {  # of ranges
    "words": (3, 6, "the words of a sentence, which questions can name"),
    "rate": (80, 450, "the words a minute that espeak-ng can speak"),
    "level": (-90, 0, "in dBFS"),
    "snr": (-90, 90, "in dB"),
}
_SPLIT_KEYS = {"clips", "voices", "sentences", "languages"}
_WHERE = "speak"


def read_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A specification from its JSON file; refused with BadInput as `check_spec` does."""
    try:
        spec = json_object(_WHERE, str(path), Path(path).read_bytes())
    except FileNotFoundError as error:
        raise BadInput(_WHERE, f"{path}, which is not a file", "a specification", "see speak --print-spec") from error
    check_spec(spec)
    return spec


def check_spec(spec: Mapping[str, Any]) -> None:
    """BadInput for unknown or missing keys, voices, languages and ranges, for splits that share sentences, or voices unsaid."""
    unknown = set(spec) - {"seed", "splits", "ranges", "shared_voices"}
    if unknown or type(spec.get("seed")) is not int or not isinstance(spec.get("splits"), dict) or not spec["splits"]:
        raise BadInput(_WHERE, f"a specification with the keys {listing(list(spec)) or 'none'}",
                       "seed, splits, and if wanted ranges and shared_voices", "see omni-adapters speak --print-spec")
    for name, split in spec["splits"].items():
        _check_split(name, split)
    _check_ranges(spec.get("ranges", {}))
    for (one, first), (other, second) in combinations(spec["splits"].items(), 2):
        shared = sorted(set(first["voices"]) & set(second["voices"]))
        if shared and not spec.get("shared_voices"):
            raise BadInput(_WHERE, f"splits {one} and {other}, which share the voices {listing(shared)}", "voices of their own",
                           'say "shared_voices": true if that is meant')
        if sentences_of(one, first) == sentences_of(other, second):
            raise BadInput(_WHERE, f"splits {one} and {other}, which share the sentences of {sentences_of(one, first)}",
                           f"a set each: {listing(list(SETS))}", 'give each split its own "sentences"')


def sentences_of(name: str, split: Mapping[str, Any]) -> str:
    """The set a split takes its sentences from."""
    return str(split.get("sentences", name))


def clips_of(spec: Mapping[str, Any], name: str) -> list[Clip]:
    """A split's clips, drawn from seed and name alone."""
    split = spec["splits"][name]
    rng = random.Random(f"{spec['seed']} {name}")
    return [draw(rng, split["voices"], sentences=sentences_of(name, split), ranges=spec.get("ranges", {}),
                 languages=split.get("languages", tuple(LANGUAGES))) for _ in range(split["clips"])]


def speak_corpus(spec: Mapping[str, Any], out: str | os.PathLike[str], workers: int = 1) -> dict[str, Path]:
    """Every clip of every split, then its manifest; returns split → manifest.

    workers: processes; 1 is this one. Refused with BadInput before anything is spoken: a bad specification, and a folder that
    another one made.
    """
    check_spec(spec)
    if workers < 1:
        raise BadInput(_WHERE, f"workers {workers}", "at least 1")
    folder, drawn = Path(out), {name: clips_of(spec, name) for name in spec["splits"]}
    _claim(folder, spec)
    audio = folder.absolute() / "audio"
    audio.mkdir(exist_ok=True)
    manifests = {}
    with worker_pool(workers) if workers > 1 else nullcontext(None) as running, _progress(sum(map(len, drawn.values()))) as bar:
        for name, clips in drawn.items():
            rows = []
            for row in _rows(clips, name, audio, running):
                rows.append(row)
                bar.update()
            manifests[name] = folder / f"{name}.jsonl"
            write_manifest(manifests[name], rows)
    return manifests


def record(clip: Clip, folder: Path) -> tuple[float, float | None]:
    """The clip's file, unless it is there; its seconds, and its measured pitch in Hz where one voice speaks with a pitch."""
    path, speech = folder / f"{clip.name()}.wav", say(clip)
    if not path.is_file():
        save_audio(path, produce(clip, speech), SAMPLING_RATE)
    return len(load_audio(path, SAMPLING_RATE)) / SAMPLING_RATE, measured_pitch(clip, speech)


def clip_of(row: ManifestRow) -> Clip:
    """The clip of a manifest row that `speak_corpus` wrote."""
    values = {key: value for key, value in row.attributes.items() if key not in ("split", "f0_hz")}
    return Clip.from_values({**values, "text": row.text})


def _rows(clips: Sequence[Clip], split: str, folder: Path, pool: ProcessPoolExecutor | None) -> Iterator[ManifestRow]:
    one = partial(record, folder=folder)
    for clip, (seconds, hertz) in zip(clips, pool.map(one, clips, chunksize=25) if pool else map(one, clips)):
        attributes = {key: value for key, value in clip.values().items() if key != "text"}
        yield ManifestRow(str(folder / f"{clip.name()}.wav"), clip.text, seconds, {**attributes, "split": split, "f0_hz": hertz})


def _claim(folder: Path, spec: Mapping[str, Any]) -> None:
    """Remember what the folder is made by, and refuse one that something else made."""
    content, made_by = json.dumps(spec, indent=1, ensure_ascii=False).encode() + b"\n", folder / "spec.json"
    if made_by.is_file() and made_by.read_bytes() != content:
        raise BadInput(_WHERE, f"the folder {folder}, which another specification made", f"{made_by}, or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(_WHERE, made_by, content)


def _check_split(name: str, split: Any) -> None:
    if not isinstance(split, dict) or not {"clips", "voices"} <= set(split) <= _SPLIT_KEYS:
        raise BadInput(_WHERE, f"the split {name}: {str(split)[:60]}", "clips and voices, and if wanted sentences and languages")
    if not re.fullmatch(r"[\w-]+", name):
        raise BadInput(_WHERE, f"a split named {name!r}", "letters, digits, _ and -", "it names a file, OUT/SPLIT.jsonl")
    if type(split["clips"]) is not int or split["clips"] < 1:
        raise BadInput(_WHERE, f"clips {split['clips']!r} of the split {name}", "an integer of at least 1")
    if sentences_of(name, split) not in SETS:
        raise BadInput(_WHERE, f"the split {name} with the sentences of {sentences_of(name, split)!r}",
                       f"one of {listing(list(SETS))}", 'give it "sentences"')
    voices = split["voices"] if isinstance(split["voices"], list) else [split["voices"]]
    unknown = [voice for voice in voices if str(voice) not in VARIANTS]
    if unknown or not voices:
        raise BadInput(_WHERE, f"the voices {listing(unknown) or 'none'} of the split {name}",
                       f"some of {listing(list(VARIANTS), 40)}")
    foreign = [language for language in split.get("languages", ()) if language not in LANGUAGES]
    if foreign or not split.get("languages", LANGUAGES):
        raise BadInput(_WHERE, f"the languages {listing(foreign) or 'none'} of the split {name}",
                       f"some of {listing(list(LANGUAGES))}")


def _check_ranges(ranges: Mapping[str, Any]) -> None:
    for name, bounds in ranges.items():
        numbers = isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(bound, (int, float)) for bound in bounds)
        if name not in RANGES or not numbers or not bounds[0] <= bounds[1]:
            raise BadInput(_WHERE, f"the range {name}: {bounds}", f"[least, most] for one of {listing(list(RANGES))}")
        least, most, why = LIMITS[name]
        if not least <= bounds[0] <= bounds[1] <= most:
            raise BadInput(_WHERE, f"the range {name}: {bounds}", f"{least:g} to {most:g}, {why}")


def _progress(total: int) -> Any:
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError as error:
        raise MissingExtra(_WHERE, "tqdm", "train") from error
    return tqdm(total=total, desc="speak the corpus", unit="clip")
