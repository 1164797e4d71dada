"""Manifests: what is written is read back, and every bad row is named by file and line."""

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_adapters.data.manifest import ManifestRow, read_manifest, write_manifest
from omni_adapters.shapes import BadInput

unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | unicode_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(unicode_text, inner, max_size=3),
    max_leaves=6,
)
other_keys = unicode_text.filter(lambda key: key not in ("audio", "text", "seconds"))
attributes = st.dictionaries(other_keys, json_values, max_size=3)
seconds = st.floats(0, 1e6)
name = st.from_regex(r"[a-zé ]{1,6}(/[a-z]{1,4})?\.wav", fullmatch=True)


@given(st.lists(st.tuples(name, unicode_text, seconds, attributes), min_size=1, max_size=4), st.booleans())
def test_round_trip(tmp_path_factory, fields, inside):
    folder = tmp_path_factory.mktemp("manifest")
    audio_folder = folder if inside else folder.parent / "elsewhere"
    rows = [ManifestRow(str(audio_folder / audio), *rest) for audio, *rest in fields]
    write_manifest(folder / "rows.jsonl", rows)
    assert read_manifest(folder / "rows.jsonl") == rows
    assert os.listdir(folder) == ["rows.jsonl"], "no temporary file stays behind"


def test_a_moved_data_set_still_finds_its_audio(tmp_path):
    (tmp_path / "before").mkdir()
    write_manifest(tmp_path / "before" / "rows.jsonl", [ManifestRow(str(tmp_path / "before" / "a" / "b.wav"), "hi", 1)])
    assert json.loads((tmp_path / "before" / "rows.jsonl").read_text())["audio"] == "a/b.wav"
    (tmp_path / "before").rename(tmp_path / "after")
    assert read_manifest(tmp_path / "after" / "rows.jsonl")[0].audio == str(tmp_path / "after" / "a" / "b.wav")


def test_a_path_relative_to_the_working_folder_keeps_its_meaning(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path)
    write_manifest("lists/rows.jsonl", [ManifestRow("clips/a.wav", "hi", 1.0)])
    assert read_manifest("lists/rows.jsonl")[0].audio == str(tmp_path / "clips" / "a.wav")


def test_equal_rows_are_equal_bytes(tmp_path):
    for file, extra in (("one", {"b": 1, "a": {"y": 1, "x": 2}}), ("two", {"a": {"x": 2, "y": 1}, "b": 1})):
        write_manifest(tmp_path / file, [ManifestRow("/a.wav", "ü\u2028", 1, extra)])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len(read_manifest(tmp_path / "one")) == 1, "U+2028 ends no line"


def test_blank_lines_and_windows_line_ends_are_fine(tmp_path):
    row = b'{"audio": "a.wav", "text": "", "seconds": 2, "speaker": "f1"}'
    (tmp_path / "rows.jsonl").write_bytes(b"\r\n" + row + b"\r\n\r\n" + row)
    expected = ManifestRow(str(tmp_path / "a.wav"), "", 2.0, {"speaker": "f1"})
    assert read_manifest(tmp_path / "rows.jsonl") == [expected, expected]


GOOD = '{"audio": "a.wav", "text": "hi", "seconds": 1}'
BAD_ROWS = [
    ('{"audio": "a.wav"', "which is not JSON (Expecting ',' delimiter"),
    ("[1, 2]", "which is a list; expected a JSON object"),
    ('{"audio": "a.wav", "text": "hi"}', "without 'seconds'; expected the keys audio, text, seconds"),
    ('{"text": "hi", "seconds": 1}', "without 'audio'"),
    ('{"audio": "a.wav", "seconds": 1}', "without 'text'"),
    ('{"audio": 3, "text": "hi", "seconds": 1}', "where 'audio' is 3; expected a string for 'audio'"),
    ('{"audio": "", "text": "hi", "seconds": 1}', "where 'audio' is ''; expected a path for 'audio'"),
    ('{"audio": "a\\u0000", "text": "hi", "seconds": 1}', "where 'audio' is 'a\\x00'; expected a path"),
    ('{"audio": "a.wav", "text": null, "seconds": 1}', "where 'text' is None; expected a string for 'text'"),
    ('{"audio": "a.wav", "text": "hi", "seconds": "1"}', "where 'seconds' is '1'; expected a number for 'seconds'"),
    ('{"audio": "a.wav", "text": "hi", "seconds": true}', "where 'seconds' is True; expected a number"),
    ('{"audio": "a.wav", "text": "hi", "seconds": -0.5}', "where 'seconds' is -0.5; expected a finite duration ≥ 0"),
    ('{"audio": "a.wav", "text": "hi", "seconds": 1e999}', "where 'seconds' is inf"),
    ('{"audio": "a.wav", "text": "hi", "seconds": 1' + "0" * 400 + "}", "which is not JSON (a number of 401 characters)"),
    ('{"audio": "a.wav", "text": "hi", "seconds": NaN}', "which is not JSON (the constant NaN); expected JSON,"),
    ('{"audio": "a.wav", "text": "hi", "seconds": 1, "text": "ho"}', "which is not JSON (the key 'text' twice)"),
    ('{"audio": "a.wav", "text": "hi", "seconds": 1, "x": {"y": 1, "y": 1}}', "which is not JSON (the key 'y' twice)"),
    ('{"audio": "a.wav", "text": "\\ud800", "seconds": 1}', "where 'text' is '\\ud800' (str); expected a JSON value"),
    ("[" * 100_000, "which is not JSON (maximum recursion"),
]


@pytest.mark.parametrize("row, message", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_named(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{row}\n{GOOD}\n")
    with pytest.raises(BadInput) as refusal:
        read_manifest(path)
    assert f"{path}, line 3" in str(refusal.value)
    assert message in str(refusal.value)


def test_not_utf8(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(GOOD.encode() + b"\n" + GOOD.replace("hi", "h\u00e9").encode("latin-1"))
    with pytest.raises(BadInput, match=r"line 2, which is not UTF-8 .* Save the file as UTF-8\."):
        read_manifest(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_no_rows(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=r"rows\.jsonl, which has no rows; expected one JSON object per line"):
        read_manifest(tmp_path / "rows.jsonl")


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadInput, match="which is not a file; expected a JSON Lines file"):
            read_manifest(path)


UNWRITABLE = [
    (ManifestRow("a.wav", "hi", math.nan), "where 'seconds' is nan (float); expected a JSON value"),
    (ManifestRow("a.wav", "hi", -1.0), "where 'seconds' is -1.0; expected a finite duration"),
    (ManifestRow("a.wav", "\ud800", 1.0), "where 'text' is '\\ud800' (str); expected a JSON value"),
    (ManifestRow("", "hi", 1.0), "where 'audio' is ''; expected a path"),
    (ManifestRow("a.wav", None, 1.0), "where 'text' is None; expected a string"),
    (ManifestRow("a.wav", "hi", 1.0, {"text": "ho"}), "with attributes text; expected attributes of other names"),
    (ManifestRow("a.wav", "hi", 1.0, {"x": (1, 2)}), "where 'x' is (1, 2) (tuple); expected a JSON value"),
    (ManifestRow("a.wav", "hi", 1.0, {"x": {1: 2}}), "with the key 1 in 'x'; expected a JSON value"),
    (ManifestRow("a.wav", "hi", 1.0, {"x": object()}), "where 'x' is <object object at"),
    (ManifestRow("a.wav", "hi", 1.0, {"x": math.inf}), "where 'x' is inf (float); expected a JSON value"),
]


@pytest.mark.parametrize("row, message", UNWRITABLE, ids=range(len(UNWRITABLE)))
def test_what_could_not_be_read_back_is_not_written(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("before")
    with pytest.raises(BadInput) as refusal:
        write_manifest(path, [ManifestRow("a.wav", "hi", 1.0), row])
    assert f"write_manifest: got row 1 for {path}" in str(refusal.value)
    assert message in str(refusal.value)
    assert path.read_text() == "before"


def test_writing_needs_rows_and_a_folder(tmp_path):
    with pytest.raises(BadInput, match=r"no rows for .*; expected at least one row"):
        write_manifest(tmp_path / "rows.jsonl", [])
    with pytest.raises(BadInput, match=r"in a folder that does not exist; .* Create .*absent first\."):
        write_manifest(tmp_path / "absent" / "rows.jsonl", [ManifestRow("a.wav", "hi", 1.0)])


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_manifest(path, [ManifestRow("/a.wav", "old", 1.0)])

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_manifest(path, [ManifestRow("/a.wav", "new", 1.0)])
    assert read_manifest(path) == [ManifestRow("/a.wav", "old", 1.0)]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX")
def test_the_file_mode_follows_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        write_manifest(tmp_path / "rows.jsonl", [ManifestRow("/a.wav", "hi", 1.0)])
    finally:
        os.umask(before)
    assert (tmp_path / "rows.jsonl").stat().st_mode & 0o777 == 0o644
