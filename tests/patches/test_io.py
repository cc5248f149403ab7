"""A saved patch works without its dictionary, knows its base, notices damage, and survives a bad save."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import D_MODEL, VOCAB, make_bridge, make_hf, make_sae, make_tokenizer, words

from concept_unlearn.dictionaries import direction
from concept_unlearn.edits import Clamp, DenseClamp
from concept_unlearn.errors import CorruptArtifact, InvalidConfig, PatchMismatch, PatchNotReached, UnknownName
from concept_unlearn.gates import ProbeGate, SequenceGate
from concept_unlearn.lm import LM, Site
from concept_unlearn.patches import FeaturePatch, Stack, WeightPatch, load_patch
from concept_unlearn.weights import Dense, LowRank, Sparse

TEXTS = [words(7, 8, 9, 10), words(20, 21, 22)]


def make(**settings):
    read = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    kinds = {
        "columns": {"dictionary": make_sae("jumprelu", d_sae=40)},
        "whole": {"dictionary": make_sae("topk", k=8, d_sae=40).to(dtype=torch.float32)},
    }
    kind = settings.pop("kind", "columns")
    sensor = direction(Site("resid_pre", 1), read, read, normalisation="constant_norm_rescale")
    return FeaturePatch(features=[1, 3, 5], edit=DenseClamp(to=-4.0), **kinds[kind], **settings), sensor


def patches():
    columns, sensor = make()
    whole, _ = make(kind="whole")
    probed = FeaturePatch(slices=columns.slices, edit=columns.edit, gate=ProbeGate(above=-100.0), sensor=sensor)
    gated = FeaturePatch(slices=columns.slices, edit=columns.edit, gate=SequenceGate(above=0.0))
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(32, D_MODEL, generator=generator) < 0.1
    weighted = WeightPatch(
        {
            "model.embed_tokens.weight": Dense(torch.randn(VOCAB, D_MODEL, generator=generator)).to(torch.bfloat16),
            "model.layers.1.self_attn.o_proj.weight": LowRank(torch.ones(D_MODEL, 2), torch.ones(2, D_MODEL)),
            "model.layers.1.mlp.up_proj.weight": Sparse(torch.ones(int(mask.sum())), mask),
        },
        strength=0.75,
    )
    return {
        "columns": columns,
        "whole": whole,
        "probed": probed,
        "gated": gated,
        "stack": Stack((columns, probed), 0.5),
        "weight": weighted,
        "weight-stack": Stack((weighted, columns), 0.5),
    }


@pytest.mark.parametrize("name", list(patches()))
def test_a_loaded_patch_does_the_same_to_the_last_bit(lm, ids, tmp_path, name):
    patch = patches()[name].met(lm, TEXTS)
    patch.save(tmp_path / "patch")
    again = load_patch(tmp_path / "patch", lm)
    assert again.spec() == patch.spec()
    assert again.origin == patch.origin
    with patch.on(lm):
        want = lm.logits(ids)
    with again.on(lm):
        assert torch.equal(lm.logits(ids), want)
    assert not torch.equal(lm.logits(ids), want)


def test_a_patch_is_small_and_never_pickle(lm, tmp_path):
    folder = make()[0].save(tmp_path / "patch", lm)
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".safetensors"]
    assert sum(p.stat().st_size for p in folder.iterdir()) < 20_000
    config = json.loads((folder / "config.json").read_text())
    assert config["origin"]["model"] == "tiny-llama"
    assert config["origin"]["fingerprint"] == lm.fingerprint


def test_a_patch_that_met_no_model_cannot_be_saved(tmp_path):
    with pytest.raises(InvalidConfig, match="has not met its model"):
        make()[0].save(tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_another_base_is_refused(lm, tmp_path):
    folder = make()[0].save(tmp_path / "patch", lm)
    other = LM(make_hf(seed=1), make_tokenizer(), name="other")
    with pytest.raises(PatchMismatch, match=r"made on tiny-llama .*here is other"):
        load_patch(folder, other)
    with pytest.raises(PatchNotReached):
        load_patch(folder, other, any_base=True)


def test_the_same_base_in_another_dtype_or_wrapper_is_accepted(lm, tmp_path):
    low = LM(make_hf().to(torch.bfloat16), make_tokenizer(), name="low")
    folder = make()[0].save(tmp_path / "patch", low)
    assert load_patch(folder, low)
    stored = LM(make_hf().to(torch.bfloat16).to(torch.float32), make_tokenizer())
    assert load_patch(folder, stored)
    bridge = LM(make_bridge(tmp_path / "bridge"))
    assert load_patch(make()[0].save(tmp_path / "again", lm), bridge)


def test_the_canary_notices_an_edit_that_no_longer_arrives(lm, tmp_path, monkeypatch):
    folder = make()[0].save(tmp_path / "patch", lm)
    layer = lm.model.model.layers[1]
    monkeypatch.setattr(
        layer, "register_forward_hook", lambda *_, **__: layer.mlp.register_forward_hook(lambda *_: None)
    )
    with pytest.raises(PatchNotReached, match="misses"):
        load_patch(folder, lm)


def test_the_canary_is_the_text_that_is_changed_most(lm):
    patch = FeaturePatch(dictionary=make_sae("standard"), features=[1, 3], edit=Clamp(to=-4.0))
    origins = [patch.met(lm, [t]).origin for t in TEXTS]
    both = patch.met(lm, TEXTS).origin
    effects = [torch.tensor(o.canary.effect).norm() for o in origins]
    assert both == origins[int(effects[1] > effects[0])]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "config", "no-config", "kind", "format"])
def test_damage_is_noticed(lm, tmp_path, damage):
    folder = make()[0].save(tmp_path / "patch", lm)
    (tensors,) = folder.glob("*.safetensors")
    config = folder / "config.json"
    content = tensors.read_bytes()
    data = json.loads(config.read_text())
    match damage:
        case "truncate":
            tensors.write_bytes(content[:-10])
        case "flip":
            tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "delete":
            tensors.unlink()
        case "config":
            config.write_text(config.read_text()[:-20])
        case "no-config":
            config.unlink()
        case "kind":
            config.write_text(json.dumps(data | {"kind": "magic"}))
        case "format":
            config.write_text(json.dumps(data | {"format": 99}))
    known = "known: adapter, codebook, expert, feature, lens, logit, prefix, prompt, rounded, stack, weight"
    expected = (UnknownName, known) if damage == "kind" else (CorruptArtifact, str(folder.name))
    with pytest.raises(expected[0], match=expected[1]):
        load_patch(folder, lm)


def test_a_folder_that_is_no_patch_says_so(tmp_path):
    with pytest.raises(CorruptArtifact, match=r"no config\.json"):
        load_patch(tmp_path)
    with pytest.raises(CorruptArtifact, match="not a Hub id"):
        load_patch(tmp_path / "nothing")


@pytest.mark.parametrize("fails", ["patch-", "config"])
def test_a_full_disk_leaves_the_old_patch_whole(lm, tmp_path, monkeypatch, fails):
    folder = make()[0].save(tmp_path / "patch", lm)
    before = load_patch(folder, lm)
    from concept_unlearn import files

    original = files.os.fsync
    writing = []

    def full(descriptor):
        writing.append(descriptor)
        if (fails == "patch-" and len(writing) == 1) or (fails == "config" and len(writing) == 2):
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make()[0].at(0.25).save(folder, lm)
    monkeypatch.undo()
    assert load_patch(folder, lm).spec() == before.spec()
    assert not list(folder.glob(".*"))
    make()[0].at(0.25).save(folder, lm)
    assert load_patch(folder, lm).strength == 0.25
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_pushing_uploads_exactly_what_is_saved(lm, monkeypatch):
    import huggingface_hub

    uploaded = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            uploaded["repo"] = (repo_id, private)

        def upload_folder(self, repo_id, folder_path, commit_message):
            import pathlib

            uploaded["files"] = sorted(p.name.split("-")[0] for p in pathlib.Path(folder_path).iterdir())
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert make()[0].met(lm).push_to_hub("user/forget", private=True) == "https://hub/commit"
    assert uploaded == {"repo": ("user/forget", True), "files": ["config.json", "patch"]}
