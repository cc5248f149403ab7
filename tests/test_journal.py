"""A folder of long work knows whose it is, keeps one whole checkpoint, and forgets what was not checkpointed."""

from __future__ import annotations

import pytest
import torch

from concept_unlearn.errors import CorruptArtifact, InvalidConfig
from concept_unlearn.journal import Journal


def journal(folder, **what):
    made = Journal(folder, {"model": "a", "settings": {"lr": 0.1, "n": 3}} | what, name="work")
    made.claim()
    return made


def test_the_same_work_may_come_back_and_other_work_is_told_what_differs(tmp_path):
    journal(tmp_path)
    journal(tmp_path)
    with pytest.raises(InvalidConfig, match=r"another work \(its settings\.lr is 0\.1, asked for is 0\.2\)"):
        journal(tmp_path, settings={"lr": 0.2, "n": 3})


def test_a_checkpoint_is_what_was_saved_last(tmp_path):
    mine = journal(tmp_path)
    assert mine.load() is None
    for step in (1, 2):
        mine.save({"x": torch.full((2,), float(step))}, {"step": step})
    again = journal(tmp_path).load()
    assert again.notes == {"step": 2}
    assert torch.equal(again.tensors["x"], torch.full((2,), 2.0))
    mine.finish()
    assert not mine.has_checkpoint


def test_a_damaged_checkpoint_is_named(tmp_path):
    mine = journal(tmp_path)
    mine.save({"x": torch.ones(100)}, {})
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CorruptArtifact, match="delete it to start anew"):
        mine.load()


def test_a_save_that_fails_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    mine = journal(tmp_path)
    mine.save({"x": torch.ones(1)}, {"step": 1})
    monkeypatch.setattr("concept_unlearn.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        mine.save({"x": torch.zeros(1)}, {"step": 2})
    assert mine.load().notes == {"step": 1}
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_lines_past_the_checkpoint_and_half_lines_go(tmp_path):
    mine = journal(tmp_path)
    for step in range(1, 5):
        mine.log(step, {"loss": step / 2})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    mine.trim(2)
    assert (tmp_path / "log.jsonl").read_text().splitlines() == ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 1.0}']
