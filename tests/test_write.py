"""Text the model writes: seeded, resumable, a corpus."""

from __future__ import annotations

import json

import pytest
from conftest import words
from test_cli import shell

from concept_unlearn.errors import EmptyData
from concept_unlearn.write import write

TOPICS = ["w7", "w8 w9", "w10"]


def read(folder):
    return {p.name: p.read_text() for p in folder.glob("*.jsonl")}


def test_every_topic_is_written_about_as_often_as_asked(lm, tmp_path):
    corpus = write(lm, TOPICS, tmp_path, per_topic=4, max_new_tokens=5, batch_size=5)
    texts = list(corpus)
    assert len(texts) == 12
    n_chat = sum(lm.tokenizer(text)["input_ids"][:1] == lm.chat_head[:1] for text in texts)
    assert n_chat >= 9


def test_a_stopped_call_goes_on_to_the_same_files(lm, tmp_path):
    for folder in ("a", "b"):
        write(lm, TOPICS, tmp_path / folder, max_new_tokens=5, batch_size=5)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    (tmp_path / "a" / "00001.jsonl").unlink()
    write(lm, TOPICS, tmp_path / "a", max_new_tokens=5, batch_size=5)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    write(lm, TOPICS, tmp_path / "c", max_new_tokens=5, batch_size=5, seed=1)
    assert read(tmp_path / "c") != read(tmp_path / "b")


def test_from_the_shell(workplace, tmp_path):
    (tmp_path / "topics.txt").write_text(words(7) + "\n\n" + words(8) + "\n")
    shell(
        "write", tmp_path / "topics.txt", "--output", tmp_path / "text", "--model", workplace / "model",
        "--per-topic", 3, "--max-new-tokens", 4,
    )  # fmt: skip
    lines = [json.loads(line) for text in read(tmp_path / "text").values() for line in text.splitlines()]
    assert len(lines) == 6


def test_no_topic_is_an_error(lm, tmp_path):
    with pytest.raises(EmptyData, match="topic"):
        write(lm, [], tmp_path)
