"""Several layers of an encoder, and a pool, all the way: shards, stage 1, stage 2, the adapter and what it says of itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from corpus import QUESTION, ROOT, Corpus, build_corpus, log_of
from tiny_speech import make_tiny_speech

from omni_adapters import OmniGPT, Projector
from omni_adapters.checkpoint import load_adapter
from omni_adapters.cli import main
from omni_adapters.data.audio import load_audio
from omni_adapters.data.clips import ManifestClips
from omni_adapters.data.manifest import read_manifest
from omni_adapters.data.shards import ShardReader
from omni_adapters.encoders.hf_speech import HFSpeechEncoder
from omni_adapters.encoders.log_mel import LogMelEncoder
from omni_adapters.shapes import BadInput
from omni_adapters.training.hosts import open_host
from omni_adapters.training.turns import Turns
from omni_adapters.training.update import check_rows

sys.path.insert(0, str(ROOT / "examples"))
import align
import instruct

PNG = b"\x89PNG\r\n\x1a\n"
NUM_LAYERS = 4  # three layers, and what enters the first
SHORT = "--steps 3 --validate-every 3 --save-every 3".split()


class Heard(NamedTuple):
    corpus: Corpus
    speech: Path    # a tiny wav2vec2
    shards: Corpus  # the same clips, as all of its layers
    aligned: Path   # stage 1 on those shards

    def encoder(self) -> list[str]:
        return ["--encoder", str(self.speech), "--layer", "all"]


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    folder = tmp_path_factory.mktemp("layers")
    corpus, speech = build_corpus(folder / "corpus"), make_tiny_speech(folder / "speech", "wav2vec2-group")
    shards = corpus._replace(train=folder / "train", valid=folder / "valid")
    found = Heard(corpus, speech, shards, folder / "aligned")
    for name in ("train", "valid"):
        manifest = getattr(corpus, name).with_suffix(".jsonl")
        assert main(["extract", "--manifest", str(manifest), "--out", str(getattr(shards, name)), *found.encoder()]) == 0
    ears = "--lr 0.05 --stack 2 --pool 3 --normalize-layers".split()
    align.main(shards.options(found.aligned, *found.encoder(), *SHORT, *ears))
    return found


def report(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return read


def test_shards_of_several_layers_hold_them_side_by_side(heard: Heard) -> None:
    reader, encoder = ShardReader(heard.shards.valid, verify=True), HFSpeechEncoder(heard.speech, layer="all")
    assert reader.config["description"]["layer"] == "all" and reader.config["d_model"] == NUM_LAYERS * encoder.width == 128
    (values, lens), rows = reader.load_batch(range(len(reader)))
    clips = read_manifest(heard.corpus.valid.with_suffix(".jsonl"))
    assert [row["text"] for row in rows] == [clip.text for clip in clips]
    for clip, stored, steps in zip(clips, values, lens):
        sound = load_audio(clip.audio, 16_000)
        alone = encoder(encoder.preprocess([sound]))
        torch.testing.assert_close(stored[:steps].float(), alone.values[0], rtol=2**-10, atol=2e-5)  # float16; batched: ≤ 1e-5
        last = HFSpeechEncoder(heard.speech, layer=-1)
        assert torch.equal(alone.values[0, :, -encoder.width:], last(last.preprocess([sound])).values[0])


def test_shards_of_other_layers_are_refused(heard: Heard, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"encoder\.layer: saved 'all', here 2"):
        align.main(heard.shards.options(tmp_path / "run", "--encoder", str(heard.speech), "--layer", "2"))
    assert not (tmp_path / "run").exists()


def test_stage_1_learns_a_mix_and_shows_it(heard: Heard) -> None:
    out = heard.aligned
    tensors, description = load_adapter(out / "adapter.safetensors")
    scores, metrics = tensors["projector.mix.scores"], report(out)
    assert scores.shape == (NUM_LAYERS,) and bool(scores.any())  # zeros at the start
    assert metrics["layer_mix"] == pytest.approx(scores.softmax(dim=0).tolist())
    assert metrics["soft_tokens_a_clip"] == 3 and "soft_tokens_a_second" not in metrics
    assert (out / "layer_mix.png").read_bytes().startswith(PNG)
    assert description["encoder"]["layer"] == "all"
    assert {"num_layers": NUM_LAYERS, "normalize_layers": True, "pool": 3}.items() <= description["projector"].items()


def test_an_adapter_of_several_layers_builds_its_own_encoder(heard: Heard) -> None:
    path = heard.aligned / "adapter.safetensors"
    sound = [load_audio(read_manifest(heard.corpus.valid.with_suffix(".jsonl"))[0].audio, 16_000)]
    gpt, tokenizer = open_host("reference", heard.corpus.gpt)
    idx = torch.tensor([Turns(tokenizer).parts({"text": "do re"}, False)[0]])
    rebuilt = OmniGPT.load_adapter(path, gpt)
    assert isinstance(rebuilt.encoder, HFSpeechEncoder) and rebuilt.encoder.layers == tuple(range(NUM_LAYERS))
    assert "3 soft tokens a clip; a clip of 30 s takes 3 positions" in rebuilt.describe()
    logits = rebuilt.eval()(idx, audio=sound)
    rebuilt.remove()
    given = OmniGPT.load_adapter(path, gpt, encoder=HFSpeechEncoder(heard.speech, layer="all")).eval()
    assert torch.equal(given(idx, audio=sound), logits)
    given.remove()
    with pytest.raises(BadInput, match=r"encoder\.layer: saved 'all', here nothing"):
        OmniGPT.load_adapter(path, gpt, encoder=HFSpeechEncoder(heard.speech), any_weights=True)


def test_stage_2_goes_on_from_it_with_sound_encoded_online(heard: Heard, tmp_path: Path) -> None:
    more = ["--adapter", str(heard.aligned / "adapter.safetensors"), "--projector-lr", "0.01", "--rank", "2"]
    instruct.main(heard.corpus.options(tmp_path / "run", *heard.encoder(), *SHORT, *more, manifest=True))
    validations = [[row["validation"]["right"]["loss"] for row in log_of(out) if "validation" in row]
                   for out in (heard.aligned, tmp_path / "run")]
    assert validations[1][0] == pytest.approx(validations[0][-1], abs=1e-2)  # shards are float16, this is not
    before, after = (load_adapter(out / "adapter.safetensors")[0]["projector.mix.scores"]
                     for out in (heard.aligned, tmp_path / "run"))
    assert not torch.equal(before, after)
    assert report(tmp_path / "run")["layer_mix"] == pytest.approx(after.softmax(dim=0).tolist())
    assert (tmp_path / "run" / "layer_mix.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("settings", [{"stack": 1}, {"stack": 4}, {"stack": 1, "pool": 3}, {"stack": 4, "pool": 40}])
def test_a_row_has_as_many_positions_as_its_projector_makes(heard: Heard, settings: dict[str, int]) -> None:
    source = ManifestClips(read_manifest(heard.corpus.train.with_suffix(".jsonl")), LogMelEncoder())
    turns, projector = Turns(open_host("reference", heard.corpus.gpt)[1], "chat", QUESTION), Projector(80, 8, **settings)
    longest = 0
    for number in range(len(source)):
        steps = -(-int(source.lens[number]) // settings["stack"])
        (asked, answer), (read, _) = (turns.parts(source.row(number), reads) for reads in (False, True))
        longest = max(longest, settings.get("pool", steps) + len(asked) + len(answer) - 1, len(read) + len(answer) - 1)
    check_rows(source, turns, projector.num_soft_tokens, longest)
    with pytest.raises(BadInput, match=f"with {longest} positions, .* at most {longest - 1}"):
        check_rows(source, turns, projector.num_soft_tokens, longest - 1)


def test_a_pool_too_large_for_the_gpt_is_refused_before_the_run(heard: Heard, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"5000 of them sound.*the GPT has\. Cut the clip, or raise --stack, or lower --pool"):
        align.main(heard.corpus.options(tmp_path / "run", "--pool", "5000"))
    assert not (tmp_path / "run").exists()
