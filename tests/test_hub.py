"""The Hub: what goes up comes down bit for bit, damage and silence are met in seconds, and the page runs and parses.

huggingface_hub's own client talks to a hub on 127.0.0.1 that keeps repositories, branches, commits and LFS objects, knows
tokens, and can be told to fail. The client reads its settings at import: most tests set them in its module of constants,
one runs in a process of its own with the environment that users set.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import READER, WRITER, Answer, Hub, Repository, hub_for_the_client, running_hub
from tiny_whisper import make_tiny_whisper
from torch import Tensor, nn

from omni_adapters import OmniGPT, Projector, hub
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.encoders.weights import WeightsUnavailable
from omni_adapters.encoders.whisper import WhisperEncoder
from omni_adapters.hub import ADAPTER, UploadFailed, fetch_adapter, publish
from omni_adapters.model_card import UNWRITABLE, model_card
from omni_adapters.shapes import BadInput

REPO = "owner/ears"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_for_the_client(tmp_path, monkeypatch) as running:
        yield running


def mute(where: str) -> Callable[[Answer], Any]:
    """Requests whose line matches are accepted and never answered."""
    def fault(request: Answer) -> None:
        if re.search(where, f"{request.command} {request.path}"):
            request.server.closing.wait(60)
    return fault


# ---- ears --------------------------------------------------------------------------------------------------------------


def waves() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(int(16_000 * s), generator=rng) for s in (0.4, 0.25)]


def ears(gpt: nn.Module, encoder: Any = None, seed: int = 0, **options: Any) -> OmniGPT:
    torch.manual_seed(seed)
    if encoder is None:
        encoder = LogMelEncoder()
        encoder.fit_statistics(encoder.preprocess(waves()))
    return OmniGPT(gpt, (encoder, Projector(encoder.d_model, 32, 16, stack=12, zero_init=False)), **options)


def push(omni: OmniGPT, **options: Any) -> str:
    return omni.push_to_hub(REPO, **{"token": WRITER, **options})


def pull(gpt: nn.Module, **options: Any) -> OmniGPT:
    return OmniGPT.from_pretrained(REPO, gpt, **options)


def logits(omni: OmniGPT, idx: Tensor) -> Tensor:
    with torch.no_grad():
        return omni.eval()(idx, None, waves())


def head(server: Hub, branch: str = "main") -> dict[str, bytes]:
    repo = server.repositories[REPO]
    return repo.commits[repo.branches[branch]]


def page(server: Hub) -> str:
    return head(server)["README.md"].decode()


def block(card: str) -> str:
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)[0]


def flip(data: bytes) -> bytes:
    """One bit of the last value."""
    return data[:-1] + bytes([data[-1] ^ 1])


def flip_on_server(server: Hub) -> None:
    for oid, data in server.objects.items():
        server.objects[oid] = flip(data)


def flip_in_cache() -> None:
    files = [file for file in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(flip(file.read_bytes()))


@pytest.fixture
def pushed(server, gpt) -> dict[str, Tensor]:
    """What was trained, after it was pushed."""
    omni = ears(gpt)
    push(omni)
    trained = {name: tensor.detach().clone() for name, tensor in omni.trained().items()}
    omni.remove()
    server.requests.clear()
    return trained


def same(omni: OmniGPT, trained: dict[str, Tensor]) -> bool:
    own = omni.trained()
    return own.keys() == trained.keys() and all(torch.equal(own[name], tensor) for name, tensor in trained.items())


# ---- up and down ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, lora", [({}, False), ({"placeholders": {"audio": 49}, "value_embeds": "learned"}, True),
                                           ({"insert_at": 3}, False)], ids=["plain", "placeholders and LoRA", "insert_at"])
def test_what_goes_up_comes_down(server, make_gpt, options, lora):
    omni = ears(make_gpt(), **options)
    if lora:
        omni.add_lora(rank=2)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in omni.trained().values():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=rng))
    url = push(omni, message="Ears that hear", card={"license": "mit", "metrics": {"wer": 0.25}})
    repo = server.repositories[REPO]
    assert url == f"{server.endpoint}/{REPO}/commit/{repo.branches['main']}"
    assert len(repo.commits) == 2 and set(head(server)) == {ADAPTER, "README.md"}  # the empty one, and one with both files
    there = pull(make_gpt(), token=READER)
    assert same(there, omni.trained())
    idx = torch.tensor([[1, 49, 3, 4], [5, 6, 49, 8]])
    assert torch.equal(logits(there, idx), logits(omni, idx))
    namespace: dict[str, Any] = {"gpt": make_gpt()}
    exec(block(page(server)), namespace)
    assert same(namespace["omni"], omni.trained())
    again = push(omni, message="Again")  # another page: no card
    assert again != url
    assert push(omni, message="And again") == again  # nothing new: no commit


def test_the_page_makes_the_encoder_where_the_hub_has_it(server, gpt, make_gpt, tmp_path):
    whisper = make_tiny_whisper(tmp_path / "whisper", d_model=32)
    server.repositories["owner/whisper"] = Repository()
    server.repositories["owner/whisper"].commit("main", {f.name: f.read_bytes() for f in whisper.iterdir()}, "weights")
    omni = ears(gpt, WhisperEncoder("hf:owner/whisper"))
    push(omni)
    assert str(tmp_path) not in page(server)
    namespace: dict[str, Any] = {"gpt": make_gpt()}
    exec(block(page(server)), namespace)  # the adapter says where its encoder is to be had
    assert same(namespace["omni"], omni.trained()) and "encoder=" not in block(page(server))
    omni.remove()
    push(ears(gpt, WhisperEncoder(whisper)))  # from a folder: it is for the reader to load
    assert str(tmp_path) not in page(server) and "`encoder` the encoder" in page(server)
    namespace = {"gpt": make_gpt(), "encoder": WhisperEncoder(whisper)}
    exec(block(page(server)), namespace)


def test_a_second_load_asks_as_little_as_it_can(server, pushed, gpt, make_gpt, monkeypatch):
    pull(gpt).remove()
    server.requests.clear()
    pull(gpt).remove()
    assert server.requests == [f"HEAD /{REPO}/resolve/main/{ADAPTER}"]
    sha = server.repositories[REPO].branches["main"]
    server.requests.clear()
    assert same(pull(gpt, revision=sha), pushed)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(pull(make_gpt()), pushed)
    assert server.requests == []
    with pytest.raises(WeightsUnavailable, match="HF_HUB_OFFLINE is set and no copy is cached"):
        pull(gpt, revision="other")
    with pytest.raises(UploadFailed, match="HF_HUB_OFFLINE"):
        publish(REPO, lambda path: path.touch(), "", token=WRITER)


def test_revisions(server, pushed, gpt, make_gpt, monkeypatch):
    first = server.repositories[REPO].branches["main"]
    other = ears(make_gpt(), seed=5)
    push(other, revision="v2")
    assert set(server.repositories[REPO].branches) == {"main", "v2"} and server.repositories[REPO].branches["main"] == first
    assert 'revision="v2"' in head(server, "v2")["README.md"].decode()
    assert same(pull(make_gpt(), revision="v2"), other.trained())
    assert same(pull(make_gpt()), pushed)
    push(other)  # main moves on
    assert same(pull(make_gpt()), other.trained())
    assert same(pull(make_gpt(), revision=first), pushed)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # and the cache knows where each stands
    assert same(pull(make_gpt()), other.trained())
    assert same(pull(make_gpt(), revision="v2"), other.trained())


def test_a_folder(tmp_path, gpt, make_gpt, monkeypatch):
    omni = ears(gpt)
    omni.save_adapter(tmp_path / ADAPTER)
    assert same(OmniGPT.from_pretrained(tmp_path, make_gpt()), omni.trained())
    monkeypatch.chdir(tmp_path.parent)
    assert fetch_adapter(tmp_path.name) == Path(tmp_path.name) / ADAPTER
    (tmp_path / "owner" / "ears").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source, options, words in [(tmp_path / ADAPTER, {}, "load_adapter"), (tmp_path, {"revision": "v2"}, "revision='v2'"),
                                   ("owner/ears", {}, "nothing"), (tmp_path / "owner", {}, "holds ears")]:
        with pytest.raises(BadInput, match=words):
            fetch_adapter(source, **options)


def test_the_environment_that_users_set(tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_TOKEN, in a process of its own."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import tiny_gpt
from test_hub import REPO, ears, same
from omni_adapters import OmniGPT
omni = ears(tiny_gpt())
print(omni.push_to_hub(REPO))
print(same(OmniGPT.from_pretrained(REPO, tiny_gpt()), omni.trained()))
"""
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("HF_") and "_PROXY" not in name.upper()}
    with running_hub() as server:
        env = {**inherited, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": WRITER,
               "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert done.stdout.split() == [f"{server.endpoint}/{REPO}/commit/{server.repositories[REPO].branches['main']}", "True"], \
            done.stderr


# ---- damage ----------------------------------------------------------------------------------------------------------------


def test_a_byte_flipped_on_the_hub_is_refused_until_it_is_mended(server, pushed, gpt):
    flip_on_server(server)
    for _ in range(2):
        server.requests.clear()
        with pytest.raises(BadInput, match=r"damaged file.*sha256.*pushed again"):
            pull(gpt)
        assert 1 <= sum(line.startswith("GET") for line in server.requests) <= 4  # a redirect counts twice
    flip_on_server(server)
    assert same(pull(gpt), pushed)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_byte_flipped_in_the_cache_is_healed(server, pushed, gpt, pinned, monkeypatch):
    revision = server.repositories[REPO].branches["main"] if pinned else None
    pull(gpt, revision=revision).remove()
    flip_in_cache()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"damaged.*sha256.*Unset HF_HUB_OFFLINE once"):
        pull(gpt, revision=revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.fault = mute("HEAD")
    with pytest.raises(WeightsUnavailable, match=r"the cached copy: damaged"):
        pull(gpt, revision=revision)
    server.fault = lambda request: None
    omni = pull(gpt, revision=revision)
    assert same(omni, pushed)
    omni.remove()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(pull(gpt, revision=revision), pushed)


def test_an_adapter_for_another_gpt_is_no_damage(server, pushed, make_gpt):
    other = make_gpt()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    pull(make_gpt())
    server.requests.clear()
    with pytest.raises(BadInput, match="made for something else"):
        pull(other)
    assert len(server.requests) == 1
    assert same(pull(other, any_weights=True), {n: t for n, t in pull(make_gpt()).trained().items()})


# ---- silence and refusals ---------------------------------------------------------------------------------------------------


def test_a_mute_hub_costs_seconds(server, pushed, gpt, monkeypatch):
    started = time.monotonic()
    server.fault = mute(".")
    with pytest.raises(WeightsUnavailable, match="HF_ENDPOINT") as caught:
        pull(gpt)
    assert isinstance(caught.value, OSError) and time.monotonic() - started < 10  # one timeout of 2 s
    omni = ears(gpt)
    with pytest.raises(UploadFailed, match="Check the network"):
        push(omni)
    omni.remove()
    assert time.monotonic() - started < 20
    server.fault = lambda request: None
    assert same(pull(gpt), pushed)


@pytest.mark.parametrize("drips", [False, True])
def test_a_hub_that_falls_mute_or_drips_meets_the_deadline(server, pushed, gpt, monkeypatch, drips):
    monkeypatch.setattr(hub, "PATIENCE", 1.5)
    monkeypatch.setattr(hub, "SLOWEST", 1e9)

    def drip(request: Answer) -> None:
        if request.command == "GET" and "cdn" in request.path:
            request.send_response(200)
            request.send_header("Content-Length", "1000000")
            request.end_headers()
            while not request.server.closing.wait(0.2):
                request.wfile.write(b"x")
                request.wfile.flush()

    server.fault = drip if drips else mute("GET")
    started = time.monotonic()
    with pytest.raises(WeightsUnavailable, match="no answer within 2 s"):
        pull(gpt)
    assert time.monotonic() - started < 10


def test_an_upload_that_is_not_answered_ends(server, gpt, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 1.5)
    server.fault = mute("/commit/")
    with pytest.raises(UploadFailed, match=r"no answer within 2 s.*Whether the upload arrived is not known"):
        push(ears(gpt))


def test_a_hub_out_of_order_leaves_the_cached_copy_usable(server, pushed, gpt):
    pull(gpt).remove()
    for fault in (mute("."), lambda request: (503, {}, b"")):
        server.fault = fault
        with pytest.warns(UserWarning, match=r"Using the cached copy of commit [0-9a-f]{40}"):
            omni = pull(gpt)
        assert same(omni, pushed)
        omni.remove()


def once(method: str, faults: list[Any], request: Answer) -> Any:
    return faults.pop() if faults and request.command == method else None


def test_one_404_poisons_nothing(server, pushed, gpt):
    sha = server.repositories[REPO].branches["main"]
    for code in ("EntryNotFound", "RepoNotFound", "RevisionNotFound"):
        for method in ("HEAD", "GET"):
            faults = [(404, {"X-Error-Code": code, "X-Repo-Commit": sha}, b"")]
            server.fault = partial(once, method, faults)
            with pytest.raises(WeightsUnavailable):
                pull(gpt)
            assert faults == []
    assert same(pull(gpt), pushed)


@pytest.mark.parametrize("options, words", [
    ({"token": "hf_wrong"}, r"401.*token=…"),
    ({"revision": "v9"}, r"revision takes a branch"),
    ({"repo": "owner/absent"}, r"Check the spelling of owner/absent"),
    ({"repo": "owner/absent", "token": READER}, r"Check the spelling of owner/absent"),
    ({"repo": "owner/private"}, r"private or gated repository needs a token"),
    ({"repo": "owner/private", "token": READER}, r"has no adapter\.safetensors at main"),
])
def test_refusals_to_load(server, pushed, options, words):
    server.repositories["owner/private"] = Repository(private=True)
    options = dict(options)
    with pytest.raises(WeightsUnavailable) as caught:
        fetch_adapter(options.pop("repo", REPO), **options)
    message = " ".join(str(caught.value).split())
    assert re.search(words, message) and "hf_" not in message
    assert isinstance(caught.value, OSError)


def test_a_file_too_large_for_an_adapter_is_not_downloaded(server, pushed, monkeypatch):
    monkeypatch.setattr(hub, "MAX_BYTES", 1000)
    with pytest.raises(BadInput, match="at most 1000"):
        fetch_adapter(REPO)
    assert [line.split()[0] for line in server.requests] == ["HEAD"]


@pytest.mark.parametrize("options, words", [
    ({"token": "hf_wrong"}, r"401.*Nothing was uploaded. Pass token=…"),
    ({"token": READER}, r"403.*may write to owner/ears"),
    ({"token": None}, r"401.*hf auth login"),
])
def test_refusals_to_upload_leave_nothing(server, gpt, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(UploadFailed) as caught:
        push(ears(gpt), **options)
    message = " ".join(str(caught.value).split())
    assert re.search(words, message) and "hf_w" not in message
    assert server.repositories == {} and list((tmp_path / "temporary").iterdir()) == []
    server.repositories[REPO] = Repository()
    with pytest.raises(UploadFailed, match=r"401|403"):
        publish(REPO, lambda path: path.write_bytes(b"x"), "---\nlicense: mit\n---\n", **options)
    assert head(server) == {} and list((tmp_path / "temporary").iterdir()) == []


def test_what_cannot_be_saved_makes_no_repository(server, gpt):
    omni = ears(gpt)
    for options, words in [({"card": {"licence": "mit"}}, "licence"), ({"message": " "}, "message"),
                           ({"revision": "0" * 40}, "a commit"), ({"revision": "a..b"}, r"a\.\.b")]:
        with pytest.raises(BadInput, match=words):
            push(omni, **options)
    with torch.no_grad():
        omni.projector.fc1.weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        push(omni)
    assert server.requests == []


def test_private_is_private(server, gpt, make_gpt):
    omni = ears(gpt)
    push(omni, private=True)
    assert server.repositories[REPO].private
    assert same(pull(make_gpt(), token=READER), omni.trained())
    with pytest.raises(WeightsUnavailable, match="Check the spelling"):  # cached, but no longer for us
        pull(make_gpt())
    push(omni, private=True, message="again")
    server.repositories[REPO] = Repository(private=False)
    with pytest.raises(BadInput, match="public"):
        push(omni, private=True)
    assert head(server) == {}


ODD = ["---", "a\n---\nb", "no", "null", "1e3", "'\"", "a: b", "- x", "# x", "```", "<!--", "| a | b |", "[x](y)", "\\", "\u2028",
       "\ud800", "\x00", "{{x}}", "&a *b", "&amp;", "1. x", "$$", "~~~", "<script>", "    code", "=====", "a  \nb", "a/b",
       "a\n\n- b"]
TEXTS = st.text(st.characters(), max_size=60) | st.lists(st.sampled_from(ODD), min_size=1, max_size=4).map(" ".join) \
    | st.lists(st.sampled_from(ODD), min_size=1, max_size=4).map("\n".join)
NO_REPOSITORY = ["a", "a/b/c", "a//b", "/a/b", "./a", "a/..", "a/-b", "a/b.git", "a/" + "b" * 99, "a/b c", "", "a\n/b", 'a/"b',
                 "a/b--c", Path("a/b"), None]


@pytest.mark.parametrize("source", NO_REPOSITORY, ids=str)
def test_what_is_no_repository_is_refused_without_a_request(server, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    for call in (lambda: hub.check_repo_id("push", source), lambda: fetch_adapter(source)):
        with pytest.raises(BadInput, match="owner/name"):
            call()
    assert server.requests == []


@given(TEXTS)
def test_a_repository_name_that_passes_breaks_nothing(text):
    with contextlib.suppress(BadInput):
        name = hub.check_repo_id("test", text)
        assert re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", name)


# ---- the page --------------------------------------------------------------------------------------------------------


def description(**changes: Any) -> dict[str, Any]:
    encoder = {"type": "LogMelEncoder", "source": None, "d_model": 80, "frame_rate": 100.0, "sampling_rate": 16_000,
               "sha256": None}
    return {"host": {"n_embd": 32, "vocab_size": 50, "num_embeddings": 64, "sha256": "ab" * 32}, "encoder": encoder,
            "projector": {"in_dim": 80, "out_dim": 32, "hidden_dim": 16, "stack": 12}, "value_embeds": "zero", "insert_at": 1,
            "placeholders": None, "lora": None} | changes


SIZES = {"projector.fc1.weight": (16, 960), "projector.fc2.weight": (32, 16), "encoder.mean": (80,)}
def test_the_page_says_what_is_known_and_no_more():
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "rslora": False, "paths": ["a", "b", "c"]}
    card = {"metrics": {"word accuracy": np.float32(0.25), "clips": 1234567}, "license": "mit", "language": ["en"],
            "notes": "Trained on 3 * 4 clips."}
    text = model_card(REPO, description(lora=lora), SIZES, card)
    for words in ["15,872 values in 2 tensors (fc1.weight 16×960, fc2.weight 32×16)", "stored: encoder | 80 values",
                  "| encoder | LogMelEncoder |", "| soft tokens per second | 8.33333 |", f"sha256 `{'ab' * 32}`", r"n\_embd 32",
                  "rank 4, alpha 8.0", "3 layers", "| value embeddings at soft tokens | zero |", "before text position 1",
                  "| word accuracy | 0.25 |", "| clips | 1234567 |", f"torch {torch.__version__}", r"3 \* 4 clips"]:
        assert words in text, words
    data = ModelCard(text).data.to_dict()
    assert data == {"license": "mit", "language": ["en"], "library_name": "omni-adapters", "pipeline_tag": "audio-text-to-text",
                    "tags": ["omni-adapters", "audio", "soft-tokens", "lora"]}
    bare = model_card(REPO, description(), SIZES)
    assert not re.search(r"license|language|datasets|base_model|## Metrics|## Notes|None|nan", bare)
    assert "| LoRA | none |" in bare


@pytest.mark.parametrize("layer, words", [({}, ""), ({"layer": 7}, ", layer 7"), ({"layer": [3, 7]}, ", layers 3 7"),
                                          ({"layer": "all"}, ", all layers"), ({"layer": "a|b"}, r", layer a\|b")])
def test_the_page_names_the_layers_of_an_encoder_that_loads_itself(layer, words):
    encoder = {"type": "HFSpeechEncoder", "source": "hf:me/speech", "d_model": 64, "frame_rate": 50.0, "sampling_rate": 16_000,
               "sha256": None}
    text = model_card(REPO, description(encoder=encoder | layer), SIZES)
    assert f"| encoder | HFSpeechEncoder, `hf:me/speech`{words} |" in text
    assert f'OmniGPT.from_pretrained("{REPO}", gpt)' in text and "`encoder` the encoder" not in text


@pytest.mark.parametrize("card", [{"licence": "mit"}, {"license": ["mit"]}, {"language": [1]}, {"metrics": {"wer": float("nan")}},
                                  {"metrics": {"wer": True}}, {"metrics": {1: 0.5}}, {"metrics": [0.5]}, {"notes": 3},
                                  {"metrics": {"wer": torch.tensor(0.5)}}], ids=str)
def test_cards_that_cannot_be(card):
    with pytest.raises(BadInput, match="model_card"):
        model_card(REPO, description(), SIZES, card)


@given(license=TEXTS, language=TEXTS | st.lists(TEXTS, max_size=2), datasets=st.lists(TEXTS, max_size=2), base_model=TEXTS,
       names=st.lists(TEXTS, max_size=2), notes=TEXTS, source=TEXTS)
def test_texts_are_shown_not_obeyed(license, language, datasets, base_model, names, notes, source):
    markdown_it = pytest.importorskip("markdown_it")
    card = {"license": license, "language": language, "datasets": datasets, "base_model": base_model, "notes": notes,
            "metrics": {name: 0.5 for name in names}}
    encoder = description()["encoder"] | {"source": source, "type": source}
    text = model_card(REPO, description(encoder=encoder), SIZES, card)
    text.encode()
    parsed = ModelCard(text)
    found = parsed.data.to_dict()
    for key in ("license", "language", "datasets", "base_model"):
        assert found.get(key) == (card[key] or None)
    blocks = markdown_it.MarkdownIt("commonmark").enable("table").parse(parsed.text)
    kinds = [token.type for token in blocks]
    headings = 3 + any(card["metrics"]) + bool(shown(notes)) + (set(names) == {""})
    assert kinds.count("heading_open") == headings and kinds.count("fence") == 1
    assert kinds.count("table_open") == 1 + bool(names)
    assert not {"hr", "html_block", "code_block", "blockquote_open", "bullet_list_open", "ordered_list_open"} & set(kinds)
    inline = [token for token in blocks if token.type == "inline"]
    assert {child.type for token in inline for child in token.children} <= {"text", "softbreak", "code_inline", "text_special"}
    plain = ["".join(" " if child.type == "softbreak" else child.content for child in token.children) for token in inline]
    assert shown(notes) in " ".join(plain)
    assert all(shown(name) in plain for name in names)


def shown(text: str) -> str:
    """Words apart by single spaces; what no page can hold is a space too."""
    return " ".join(UNWRITABLE.sub(" ", text).split())
