"""Two descriptions compared: every difference is named with both sides, and nothing else is one."""

import pytest

from omni_adapters.descriptions import check_same, differences
from omni_adapters.shapes import BadInput

DESCRIPTION = {"host": {"n_embd": 64, "side": [1, 2]}, "encoder": {"id": "whisper-tiny", "γ": 0.1}, "steps": 1000}


def test_equal_descriptions_pass():
    check_same("Test", {}, {})
    check_same("Test", DESCRIPTION, dict(reversed(DESCRIPTION.items())))
    assert differences(DESCRIPTION, DESCRIPTION) == []
    check_same("Test", {"a": 32.0, "b": [1, [2]], "c": [{"d": 1}]}, {"a": 32, "b": (1, (2,)), "c": ({"d": 1},)})


def test_every_difference_is_named_with_both_sides():
    saved = {"encoder": {"id": "a", "d_model": 384}, "flag": True, "gone": {"x": 1}, "layers": [1, 2], "name": None, "same": 1}
    here = {"encoder": {"id": "b", "d_model": 384}, "flag": 1, "layers": [1, 3], "name": {"x": 1}, "new": 0, "same": 1}
    with pytest.raises(BadInput) as caught:
        check_same("OmniGPT.load_adapter", saved, here)
    assert caught.value.came == (
        "an adapter made for something else (encoder.id: saved 'a', here 'b', flag: saved True, here 1, "
        "gone: saved {'x': 1}, here nothing, layers: saved [1, 2], here [1, 3], name: saved None, here {'x': 1}, "
        "new: saved nothing, here 0)")
    assert str(caught.value).startswith("OmniGPT.load_adapter: got an adapter made for something else (encoder.id")


def test_keys_that_would_break_a_line_are_quoted():
    with pytest.raises(BadInput, match=r"'a\\n\\x1b'\.b: saved 1, here nothing") as caught:
        check_same("Test", {"a\n\x1b": {"b": 1}}, {"a\n\x1b": {}})
    assert "\n" not in str(caught.value)


def test_no_difference_is_left_out():
    with pytest.raises(BadInput) as caught:
        check_same("Test", {f"k{number}": 1 for number in range(20)}, {})
    assert all(f"k{number}: saved 1, here nothing" in str(caught.value) for number in range(20))
