"""Opening hosts by name, and rows of tokens: who is graded, where the sound stands."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hosts import fingerprint, reference, tiny_hf
from hypothesis import given
from hypothesis import strategies as st

from omni_adapters.reference_gpt import GPT, GPTConfig
from omni_adapters.shapes import BadInput
from omni_adapters.training.hosts import SPECIALS, WordTokenizer, load_nanochat, open_host, save_reference
from omni_adapters.training.turns import Turns

WORDS = "turn left right now lamp what is said".split()


def small() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=64, vocab_size=len(WORDS) + len(SPECIALS), n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    return GPT(config)


def test_a_saved_reference_comes_back_bit_for_bit(tmp_path: Path) -> None:
    gpt = small()
    save_reference(tmp_path / "gpt", gpt, WORDS)
    opened, tokenizer = open_host("reference", tmp_path / "gpt")
    assert fingerprint(opened)["bits"] == fingerprint(gpt)["bits"]
    assert not opened.training
    idx = torch.tensor([tokenizer.encode("turn left now")])
    assert torch.equal(opened(idx), gpt(idx))
    assert tokenizer.decode(tokenizer.encode("turn  left")) == "turn left"


@pytest.mark.parametrize("damage", ["model.safetensors", "host.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "other"])
def test_a_damaged_reference_is_refused(damage: str, how: str, tmp_path: Path) -> None:
    save_reference(tmp_path, small(), WORDS)
    path = tmp_path / damage
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if how == "cut" else b'{"config": {"n_layer": 3}, "words": ["a"]}')
    with pytest.raises(BadInput, match="load_reference"):
        open_host("reference", tmp_path)


def test_a_vocabulary_of_another_size_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"7 words for a vocabulary of {len(WORDS) + len(SPECIALS)}; expected {len(WORDS)}"):
        save_reference(tmp_path / "gpt", small(), WORDS[:-1])
    assert not (tmp_path / "gpt" / "host.json").exists()


@pytest.mark.parametrize("words", [["a", "a"], ["a b"], [""], ["<|bos|>"]])
def test_words_must_be_words(words: list[str]) -> None:
    with pytest.raises(BadInput, match="distinct words without blanks"):
        WordTokenizer(words)


def test_an_unknown_word_is_named() -> None:
    with pytest.raises(BadInput, match="the word lamps"):
        WordTokenizer(WORDS).encode("turn lamps")


def test_a_named_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("my_hosts")
    module.opened = lambda checkpoint, device: (small().train(), WordTokenizer(WORDS))
    module.nothing = lambda checkpoint, device: small()
    monkeypatch.setitem(sys.modules, "my_hosts", module)
    assert not open_host("my_hosts:opened", "somewhere").gpt.training
    with pytest.raises(BadInput, match=r"a loader that returns GPT; expected \(gpt, tokenizer\)"):
        open_host("my_hosts:nothing", "")
    with pytest.raises(BadInput, match="my_hosts has no absent"):
        open_host("my_hosts:absent", "")
    with pytest.raises(BadInput, match="kind 'gpt5'; expected reference, nanochat, transformers, or module:function"):
        open_host("gpt5", "")


def test_transformers(tmp_path: Path) -> None:
    """A NanoChatForCausalLM with a tokenizer of words, both saved as transformers saves them."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    gpt = tiny_hf()
    words = WordTokenizer(WORDS)
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words.ids, unk_token=WORDS[0]))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(tmp_path)
    gpt.save_pretrained(tmp_path)  # type: ignore[operator]
    opened, tokenizer = open_host("transformers", tmp_path)
    assert tokenizer.encode("turn left") == words.encode("turn left")
    assert tokenizer.encode_special("<|user_end|>") == words.encode_special("<|user_end|>")
    with pytest.raises(BadInput, match=r"the special token <\|nobody\|>"):
        tokenizer.encode_special("<|nobody|>")
    idx = torch.tensor([tokenizer.encode("turn left now")])
    assert torch.allclose(opened(idx).logits, gpt.eval()(idx).logits, atol=1e-5)


def test_nanochat_needs_a_checkpoint_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager: Any = ModuleType("nanochat.checkpoint_manager")
    manager.find_last_step = lambda folder: 7
    manager.build_model = lambda folder, step, device, phase: (small(), WordTokenizer(WORDS), {"step": step})
    monkeypatch.setitem(sys.modules, "nanochat", ModuleType("nanochat"))
    monkeypatch.setitem(sys.modules, manager.__name__, manager)
    with pytest.raises(BadInput, match=r"holds no model_\*\.pt"):
        load_nanochat(tmp_path, torch.device("cpu"))
    (tmp_path / "model_000007.pt").touch()
    assert isinstance(open_host("nanochat", tmp_path).tokenizer, WordTokenizer)


# ---- turns ----------------------------------------------------------------------------------------------------------------

BOS, USER, USER_END, ASSISTANT, ASSISTANT_END = range(5)


def words(text: str) -> list[int]:
    return WordTokenizer(WORDS).encode(text)


def test_a_chat_row() -> None:
    turns = Turns(WordTokenizer(WORDS))
    row = {"text": "turn left", "question": "what is said"}
    assert turns.prompt(row) == [BOS, USER, *words("what is said"), USER_END, ASSISTANT]
    assert turns.reading(row) == [BOS, USER, *words("turn left what is said"), USER_END, ASSISTANT]
    assert turns.answer(row) == [*words("turn left"), ASSISTANT_END]
    assert turns.insert_at == 2 and turns.end == ASSISTANT_END


def test_a_plain_row() -> None:
    turns = Turns(WordTokenizer(WORDS), "plain")
    assert turns.prompt({"text": "turn left"}) == [BOS]
    assert turns.reading({"text": "turn left"}) == [BOS, *words("turn left")]
    assert turns.insert_at == 1 and turns.end == BOS
    with pytest.raises(BadInput, match="Use the chat form"):
        turns.prompt({"text": "turn left", "question": "what"})
    with pytest.raises(BadInput, match="form 'poem'"):
        Turns(WordTokenizer(WORDS), "poem")  # type: ignore[arg-type]


ROWS = st.lists(st.fixed_dictionaries(
    {"text": st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)},
    optional={"question": st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join),
              "answer": st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)}), min_size=1, max_size=4)


@given(ROWS, st.booleans())
def test_only_the_answer_is_graded(rows: list[dict[str, str]], read: bool) -> None:
    """Every row's graded targets are the answer's tokens and its end, each predicted from the token before it."""
    turns = Turns(WordTokenizer(WORDS), question="what")
    idx, targets = turns.batch(rows, read=read)
    for row, ids, wanted in zip(rows, idx.tolist(), targets.tolist()):
        graded = [t for t, target in enumerate(wanted) if target != -1]
        assert [wanted[t] for t in graded] == [*words(row.get("answer", row["text"])), ASSISTANT_END]
        assert ids[graded[0]] == ASSISTANT
        assert [ids[t + 1] for t in graded[:-1]] == [wanted[t] for t in graded[:-1]]
        assert ids[: graded[0] + 1] == (turns.reading(row) if read else turns.prompt(row))


def test_null_is_no_answer_and_a_list_is_none() -> None:
    turns = Turns(WordTokenizer(WORDS), question="what")
    row = {"audio": "a.wav", "text": "turn left", "answer": None, "question": None}
    assert turns.answer(row) == [*words("turn left"), ASSISTANT_END]
    assert turns.prompt(row)[2:-2] == words("what")
    with pytest.raises(BadInput, match=r"row of a\.wav: got answer = \['now'\]; expected a text"):
        turns.batch([{**row, "answer": ["now"]}])
    with pytest.raises(BadInput, match=r"row of a\.wav: got the word shout"):
        turns.batch([{**row, "text": "shout"}])


def test_a_transcript_does_not_stick_to_the_question() -> None:
    class Letters(WordTokenizer):
        def encode(self, text: str) -> list[int]:
            return [100 + ord(letter) for letter in text]

    assert Turns(Letters(WORDS)).reading({"text": "ab", "question": "c"})[2:-2] == [100 + ord(letter) for letter in "ab\nc"]


def test_the_reference_host_of_the_other_tests_has_no_words() -> None:
    with pytest.raises(BadInput, match="for a vocabulary of"):
        save_reference("unused", reference(), WORDS[:2])
    assert not Path("unused/host.json").exists()
