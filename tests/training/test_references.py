"""A cached reference says what a live one does, reads nothing twice, and refuses what it was not made of."""

from __future__ import annotations

import pytest
import torch
from conftest import make_hf, make_tokenizer, words

from concept_unlearn.data.examples import Passage
from concept_unlearn.errors import CorruptArtifact, InvalidConfig
from concept_unlearn.lm import LM, Site
from concept_unlearn.lm.head import Head
from concept_unlearn.step import LiveReference, Read
from concept_unlearn.training.references import look_up
from concept_unlearn.training.rows import Encoder, plain

SITE = Site("resid_post", 1)
READS = [
    Read("forget", "nll", "answer", True), Read("forget", "logits", "answer", True),
    Read("forget", "logits", "content", True), Read("forget", SITE, "real", True), Read("forget"),
]  # fmt: skip


@pytest.fixture
def lm():
    return LM(make_hf().double(), make_tokenizer(), name="tiny")


def make_split(shift=0):
    passages = [Passage(prompt=words(10, 11), text=words(*range(12 + shift, 14 + shift + i))) for i in range(7)]
    return plain(Encoder(make_tokenizer(), 64), [*passages, Passage(text=words(20, 21, 22))])


def ask(lm, folder=None, split=None, model="m", patch="", batch_size=3):
    head = Head(lm.model)
    live = LiveReference(lm, head)
    splits = {"forget": split or make_split()}
    return look_up(live, splits, READS, model=model, patch=patch, folder=folder, batch_size=batch_size), live


@pytest.mark.parametrize("rows", [[0], [5, 2, 7], [7, 6, 5, 4, 3, 2, 1, 0]])
def test_cached_equals_live_for_any_batch(lm, rows):
    cached, live = ask(lm)
    batch = make_split().batch(rows)
    torch.testing.assert_close(cached.nll("forget", batch), live.nll("forget", batch))
    for where in ("answer", "content"):
        hidden = cached.hidden("forget", batch, where)
        torch.testing.assert_close(hidden, live.hidden("forget", batch, where))
        torch.testing.assert_close(cached.logits(hidden), live.logits(hidden))
    torch.testing.assert_close(
        cached.activations("forget", batch, SITE, "real"), live.activations("forget", batch, SITE, "real")
    )


def test_what_depends_on_the_padding_is_asked_anew(lm):
    cached, live = ask(lm)
    batch = make_split().batch([0, 6])
    torch.testing.assert_close(cached.hidden("forget", batch, "all"), live.hidden("forget", batch, "all"))


def test_what_is_on_disk_is_not_computed_again(lm, tmp_path, monkeypatch):
    first, _ = ask(lm, tmp_path)
    batch = make_split().batch([3, 1])
    want = first.nll("forget", batch)
    monkeypatch.setattr(lm.model, "forward", None)
    again, _ = ask(lm, tmp_path, batch_size=8)
    assert torch.equal(again.nll("forget", batch), want)


def test_the_reference_of_another_model_or_of_other_rows_is_refused(lm, tmp_path):
    ask(lm, tmp_path)
    with pytest.raises(InvalidConfig, match="is the reference of tiny, its fingerprint m; here is tiny with other"):
        ask(lm, tmp_path, model="other")
    with pytest.raises(InvalidConfig, match=r"its rows .*: use another folder, or delete it"):
        ask(lm, tmp_path, split=make_split(shift=5))


def test_a_damaged_file_is_named(lm, tmp_path):
    ask(lm, tmp_path)
    path = tmp_path / "reference-forget.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptArtifact, match=r"reference-forget\.safetensors cannot be read"):
        ask(lm, tmp_path)


def test_the_reference_of_another_patch_is_refused_in_either_direction(lm, tmp_path):
    ask(lm, tmp_path / "plain")
    ask(lm, tmp_path / "patched", patch="p")
    with pytest.raises(InvalidConfig, match="its patch none; here is tiny with p"):
        ask(lm, tmp_path / "plain", patch="p")
    for other, says in (("", "none"), ("q", "q")):
        with pytest.raises(InvalidConfig, match=f"its patch p; here is tiny with {says}"):
            ask(lm, tmp_path / "patched", patch=other)
    ask(lm, tmp_path / "patched", patch="p")
