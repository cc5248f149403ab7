"""A store is whole or says what is missing; killing its making at any moment changes nothing."""

from __future__ import annotations

import random
import time

import pytest
import torch
from safetensors.torch import load_file
from workers import fill, start, tiny_corpus, tiny_harvest, tiny_lm, together

from concept_unlearn import LM
from concept_unlearn.activations import Store, harvest
from concept_unlearn.activations.shards import cut, read
from concept_unlearn.errors import CorruptArtifact, EmptyData, InvalidConfig


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    fill(folder)
    return folder


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_a_store_holds_the_rows_of_its_shards(filled, lm):
    store, wanted = Store(filled), tiny_harvest()
    expected = [read(tiny_lm(), texts, wanted) for texts in cut(tiny_lm(), tiny_corpus(), wanted)]
    assert store.n_shards == len(expected) > 5
    assert store.n_rows == sum(len(next(iter(s.values()))) for s in expected)
    for i, shard in enumerate(expected):
        for site, x in store.shard(i).items():
            assert torch.equal(x, shard[site])


def test_each_epoch_reads_every_shard_once_in_another_order(filled):
    store = Store(filled)
    site = store.sites[0]
    orders = [[float(s[site].sum()) for s in store.shards(epoch, 0, 1)] for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_killed_ten_times_it_ends_with_the_same_files(filled, tmp_path):
    began = time.perf_counter()
    fill(tmp_path / "timed")
    seconds, rng = time.perf_counter() - began, random.Random(0)
    for _ in range(10):
        process = start(fill, tmp_path / "killed")
        time.sleep(rng.uniform(0.2, 0.2 + seconds))
        process.kill()
        process.join()
    fill(tmp_path / "killed")
    assert {n: c for n, c in content(tmp_path / "killed").items() if not n.startswith(".")} == content(filled)


def test_two_processes_give_the_same_files_as_one(filled, tmp_path):
    together(2, fill, tmp_path / "two")
    assert content(tmp_path / "two") == content(filled)


def test_only_what_is_missing_is_made_again(tmp_path, monkeypatch):
    fill(tmp_path / "store")
    before = content(tmp_path / "store")
    (tmp_path / "store" / "00002.safetensors").write_bytes(before["00002.safetensors"][:-5])
    altered = bytearray(before["00004.safetensors"])
    altered[-1] ^= 1
    (tmp_path / "store" / "00004.safetensors").write_bytes(bytes(altered))
    (tmp_path / "store" / "00005.json").write_bytes(before["00005.json"][:20])
    with pytest.raises(CorruptArtifact, match="shard 2, 5 missing or truncated"):
        Store(tmp_path / "store")
    made = []
    from concept_unlearn.activations import store as room

    monkeypatch.setattr(room, "read", lambda lm, texts, *a, **k: made.append(texts.number) or read(lm, texts, *a, **k))
    fill(tmp_path / "store")
    assert made == [2, 4, 5]
    assert content(tmp_path / "store") == before


def test_an_unfinished_store_is_not_read(tmp_path):
    fill(tmp_path / "store")
    last = max((tmp_path / "store").glob("0*.json"))
    last.unlink()
    with pytest.raises(CorruptArtifact, match="unfinished"):
        Store(tmp_path / "store")


def test_a_store_of_another_harvest_is_not_added_to(filled, tmp_path):
    for changed, message in (
        ({"context": 8}, "its context is 16, asked for is 8"),
        ({"tokens": 100}, "its tokens is None"),
        ({"sites": ("resid_post.2",)}, "sites"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            harvest(tiny_lm(), tiny_corpus(), tiny_harvest(**changed), filled)
    with pytest.raises(InvalidConfig, match="corpus_fingerprint"):
        harvest(tiny_lm(), tiny_corpus(seed=1), tiny_harvest(), filled)
    other = tiny_lm()
    with torch.no_grad():
        other.model.model.norm.weight.mul_(2)
    with pytest.raises(InvalidConfig, match="model_fingerprint"):
        harvest(LM(other.model, other.tokenizer, name="tiny"), tiny_corpus(), tiny_harvest(), filled)


def test_a_folder_that_is_no_store_says_so(tmp_path):
    with pytest.raises(EmptyData, match=r"index\.json"):
        Store(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match=r"index\.json"):
        Store(tmp_path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InvalidConfig, match="other safetensors"):
        harvest(tiny_lm(), tiny_corpus(), tiny_harvest(), tmp_path)


def test_a_full_disk_keeps_what_is_whole(tmp_path, monkeypatch):
    from concept_unlearn import files

    real, calls = files.os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        fill(tmp_path / "store")
    assert not list((tmp_path / "store").glob(".*"))
    whole = [load_file(p) for p in sorted((tmp_path / "store").glob("*.safetensors"))]
    assert len(whole) == 2
    monkeypatch.setattr(files.os, "fsync", real)
    fill(tmp_path / "store")
    assert Store(tmp_path / "store").n_shards > 5
