from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from concept_unlearn.data.tables import read_rows, read_table
from concept_unlearn.errors import EmptyData, InvalidData

ROWS = [
    {"question": "Who?", "choices": ["Ann", "Bob"], "answer": 1},
    {"question": "Où?", "choices": ["ici", "là"], "answer": 0},
]


def write(path: Path, rows: Any = ROWS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            cells = [[r["question"], json.dumps(r["choices"]).replace('"', '""'), r["answer"]] for r in rows]
            path.write_text("question,choices,answer\n" + "".join(f'"{q}","{c}",{a}\n' for q, c, a in cells))
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)


def read(row: Any) -> dict[str, Any]:
    return {"question": row.text("question"), "choices": list(row.texts("choices")), "answer": row.whole("answer")}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
@pytest.mark.parametrize("name", ["facts", "facts/test"])
def test_the_same_rows_come_from_every_kind_of_file(tmp_path: Path, suffix: str, name: str):
    write(tmp_path / f"{name}.{suffix}")
    assert [read(row) for row in read_table(tmp_path, name)] == ROWS
    assert [read(row) for row in read_rows(tmp_path / f"{name}.{suffix}")] == ROWS


def test_a_json_file_may_hold_json_lines(tmp_path: Path):
    write(tmp_path / "facts.jsonl")
    (tmp_path / "facts.jsonl").rename(tmp_path / "facts.json")
    assert [read(row) for row in read_table(tmp_path, "facts")] == ROWS


def test_a_copy_of_a_hub_repository_is_read_piece_by_piece_in_order(tmp_path: Path):
    for i, row in enumerate(ROWS):
        write(tmp_path / f"facts/test-0000{i}-of-00002.parquet", [row])
    assert [read(row) for row in read_table(tmp_path, "facts/test")] == ROWS
    assert [read(row) for row in read_table(tmp_path, "facts", split="test")] == ROWS
    with pytest.raises(InvalidData, match=r"no table 'facts' .* looked for facts.jsonl.*facts/train.jsonl"):
        read_table(tmp_path, "facts")


def test_a_table_with_a_split_is_never_read_from_a_file_of_all_splits(tmp_path: Path):
    write(tmp_path / "facts.jsonl")
    with pytest.raises(InvalidData, match=r"looked for facts/test\.jsonl, facts/test\.json"):
        read_table(tmp_path, "facts/test")


def test_folder_and_hub_are_read_by_the_same_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(*args: Any, **settings: Any) -> Any:
        asked.append((*args, settings))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [read(row) for row in read_table("owner/name", "facts")] == ROWS
    assert [read(row) for row in read_table("owner/name", "facts/dev")] == ROWS
    assert asked == [("owner/name", "facts", {"split": "train"}), ("owner/name", "facts", {"split": "dev"})]
    assert read_table("owner/name", "facts/dev")[1].where == "owner/name, facts/dev, row 1"


def test_what_the_hub_refuses_is_one_of_our_errors(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args: Any, **settings: Any) -> Any:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InvalidData, match=r"no facts/train of dataset 'owner/name' .*: offline"):
        read_table("owner/name", "facts")


def test_a_missing_table_says_what_was_looked_for_and_what_is_there(tmp_path: Path):
    write(tmp_path / "other.jsonl")
    write(tmp_path / "deep/one.json")
    with pytest.raises(
        InvalidData, match=r"looked for facts.jsonl, .*facts.csv.*; it holds deep/one.json, other.jsonl$"
    ):
        read_table(tmp_path, "facts")
    with pytest.raises(InvalidData, match="no folder 'nowhere'"):
        read_table("nowhere", "facts")
    with pytest.raises(InvalidData, match="is a file"):
        read_table(tmp_path / "other.jsonl", "facts")
    with pytest.raises(InvalidData, match="no file"):
        read_rows(tmp_path / "facts.jsonl")
    (tmp_path / "facts.txt").write_text("hello")
    with pytest.raises(InvalidData, match=r"rows are read from \.jsonl, \.json, \.parquet, \.csv"):
        read_rows(tmp_path / "facts.txt")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"x": 1}\n\n[1]\n', r"a\.jsonl, line 3: a row is a mapping or a text"),
        ("a.jsonl", b'{"x": 1}\n{"x": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.json", b'[\n{"x": 1},\n{"x": }\n]', r"a\.json, line 3: not JSON"),
        ("a.json", b'\n\n[{"x": 1} {"x": 1}]', r"a\.json, line 3: not JSON"),
        ("a.json", b'["\xff"]', r"a\.json: not UTF-8"),
        ("a.json", b'["text", 3]', r"a\.json, row 1: a row is a mapping or a text; given: 3"),
        ("a.csv", b"x,y\n1,2\n1\n", r"a\.csv, line 3: it has not the 2 cells"),
        ("a.csv", b"x,y\n1,2,3\n", r"a\.csv, line 2: it has not the 2 cells"),
        ("a.csv", b'x,y\n1,"2\n', r"a\.csv, line 2: not CSV"),
        ("a.parquet", b"nothing of the kind", r"a\.parquet: not parquet"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, said: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=said):
        read_table(tmp_path, "a")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_table_without_a_row_is_empty_data(tmp_path: Path, content: str):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(EmptyData, match="has no row"):
        read_table(tmp_path, "a")


def test_fields_that_do_not_fit_say_where_they_stand(tmp_path: Path):
    write(tmp_path / "a.jsonl", [{"t": "  ", "n": True, "l": ["a", ""], "m": "1.5", "e": []}])
    row = read_table(tmp_path, "a")[0]
    for wrong in ("t", "n"):
        with pytest.raises(InvalidData, match=r"a\.jsonl, line 1: .* is text"):
            row.text(wrong)
    for wrong in ("n", "m"):
        with pytest.raises(InvalidData, match=r"a\.jsonl, line 1: .* is a whole number"):
            row.whole(wrong)
    for wrong in ("l", "t", "e"):
        with pytest.raises(InvalidData, match=r"a\.jsonl, line 1: .* is a list of texts"):
            row.texts(wrong)
    with pytest.raises(InvalidData, match=r"a\.jsonl, line 1: no 'question'; it has: t, n, l, m, e"):
        row.text("question")
    with pytest.raises(InvalidData, match=r"a\.jsonl, line 1: probe: .*every probe needs an answer"):
        row.probe(prompt="Who?", answers="?!")


def test_a_row_that_is_only_a_string_is_a_passage(tmp_path: Path):
    (tmp_path / "a.json").write_text('["one", {"text": "two"}]')
    assert [row.passage().text for row in read_table(tmp_path, "a")] == ["one", "two"]
