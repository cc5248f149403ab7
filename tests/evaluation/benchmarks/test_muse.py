from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import words

from concept_unlearn.errors import InvalidConfig, InvalidData
from concept_unlearn.evaluation.benchmark import Benchmark
from concept_unlearn.evaluation.benchmarks import MUSE
from concept_unlearn.lm import LM, Written

N = 5


def asked(start: int, n: int) -> list[dict[str, str]]:
    return [{"question": words(i, 7), "answer": words(i, i + 1)} for i in range(start, start + n)]


def texts(start: int, n: int) -> list[str]:
    return [words(*((start + i + 3 * j) % 40 + 6 for j in range(12))) for i in range(n)]


TABLES: dict[str, Any] = {
    "knowmem/forget_qa": asked(10, 4),
    "knowmem/forget_qa_icl": asked(30, 2),
    "knowmem/retain_qa": asked(20, 4),
    "knowmem/retain_qa_icl": asked(34, 2),
    "verbmem/forget": [{"prompt": words(i, 8, 9), "gt": words(*range(i, i + 9))} for i in range(10, 14)],
    "privleak/forget": texts(0, 4),
    "privleak/retain": texts(4, 4),
    "privleak/holdout": texts(8, 4),
    "raw/forget": [{"text": t} for t in texts(0, 3)],
    "raw/retain1": [{"text": t} for t in texts(12, 3)],
} | {f"{kind}/forget_{i}": [{"text": t} for t in texts(i, i)] for kind in ("scal", "sust") for i in range(1, 5)}


def write(folder: Path, tables: dict[str, Any]) -> Path:
    for name, rows in tables.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, TABLES)


def muse(folder: Path, **settings: Any) -> MUSE:
    return MUSE(data=folder, **{"max_new_tokens": 4, "max_verbatim_tokens": N, **settings})


def test_sets_hold_the_rows_of_their_tables(folder: Path):
    sets = muse(folder).sets
    assert {name: len(a.examples) for name, a in sets.items()} == {
        "verbatim": 4, "forget_questions": 4, "retain_questions": 4, "forget": 3, "members": 4, "holdout": 4,
    }  # fmt: skip
    assert [p.text for p in sets["members"].examples] == TABLES["privleak/forget"]
    assert {name: a.max_new_tokens for name, a in sets.items() if "questions" in name or name == "verbatim"} == {
        "verbatim": N, "forget_questions": 4, "retain_questions": 4,
    }  # fmt: skip
    assert {name: len(a.examples) for name, a in muse(folder, n_items=2).sets.items()} == dict.fromkeys(sets, 2)


def test_a_question_follows_answered_ones_of_its_own_table(folder: Path):
    probe = muse(folder).sets["forget_questions"].examples[0]
    assert probe.prompt == (
        f"Question: {words(30, 7)}\nAnswer: {words(30, 31)}\n\nQuestion: {words(31, 7)}\nAnswer: {words(31, 32)}\n\n"
        f"Question: {words(10, 7)}\nAnswer:"
    )
    assert (probe.answers, probe.chat) == ((words(10, 11),), False)
    assert words(34, 7) in muse(folder).sets["retain_questions"].examples[0].prompt
    assert muse(folder, n_shots=1).sets["forget_questions"].examples[0].prompt.count("Question:") == 2
    bare = muse(folder, n_shots=0).sets["forget_questions"].examples[0].prompt
    assert bare == f"Question: {words(10, 7)}\nAnswer:"


def test_a_reply_stops_before_the_next_question(folder: Path, lm: LM, monkeypatch: pytest.MonkeyPatch):
    benchmark = muse(folder, max_verbatim_tokens=30)
    replies = [words(10, 11), "w11 w12\n\nQuestion: w1", "w12 w13\nQuestion: w12", "w13 w14 Question: w13"]
    written = [Written([i], torch.zeros(1)) for i in range(len(replies))]
    monkeypatch.setattr(LM, "write", lambda self, prompts, **settings: written[: len(prompts)])
    monkeypatch.setattr(lm.tokenizer, "decode", lambda ids, **settings: replies[ids[0]], raising=False)
    view = benchmark.observe(lm, metrics=benchmark.leaks)
    said = [reply.text for reply in view["forget_questions"].said]
    assert sorted(said) == [words(10, 11), words(11, 12), words(12, 13), words(13, 14)]


def test_a_continuation_is_compared_with_as_many_tokens_as_may_be_written(folder: Path, lm: LM):
    benchmark = muse(folder)
    view = benchmark.observe(lm, metrics=benchmark.leaks)
    assert [p.answers for p in view["verbatim"].examples] == [(words(*range(i, i + N)),) for i in range(10, 14)]
    assert [p.answers[0].count("w") for p in benchmark.sets["verbatim"].examples] == [9] * 4
    longer = muse(folder, max_verbatim_tokens=30)
    kept = longer.observe(lm, metrics=longer.leaks)["verbatim"].examples
    assert kept == longer.sets["verbatim"].examples


def test_a_copier_has_all_of_verbatim_memorisation_however_the_document_goes_on(folder: Path, lm: LM):
    prompts = [words(i, 8, 9) for i in range(10, 30)]
    said = lm.generate(prompts, max_new_tokens=N, chat=False)
    known = [(p, s) for p, s in zip(prompts, said, strict=True) if len(s.split()) == N and "<" not in s]
    assert len(known) > 3
    write(folder, {"verbmem/forget": [{"prompt": p, "gt": f"{s} {words(40, 41, 42)}"} for p, s in known]})
    benchmark = muse(folder)
    found = benchmark.measure(benchmark.observe(lm, metrics=benchmark.leaks), benchmark.leaks)
    assert found["verbatim/rouge"].value == 1
    assert found["forget_questions/rouge"].value < 1


def test_every_metric_is_measured_and_the_retrained_model_leaks_nothing_beside_itself(folder: Path, lm: LM):
    benchmark = muse(folder)
    view = benchmark.observe(lm)
    alone, beside = benchmark.measure(view), benchmark.measure(view.beside(retrained=view))
    assert beside["members/priv_leak"].value == 0
    assert {n for n, m in alone.items() if m.value is None} == {"members/priv_leak"}
    assert all(m.value is not None for m in beside.values())
    assert alone["forget/extraction_strength"].n == 3
    names = set(alone)
    assert {line.metric for line in benchmark.lines} == names
    assert {*(m.name for m in benchmark.leaks), benchmark.keeps.name} <= names


def test_batches_change_nothing(folder: Path, lm: LM):
    one, many = (muse(folder, batch_size=size) for size in (1, 7))
    a, b = one.measure(one.observe(lm)), many.measure(many.observe(lm))
    assert {n: m.value for n, m in a.items()} == {n: pytest.approx(m.value, abs=1e-5) for n, m in b.items()}


@pytest.mark.parametrize("which", ["scal", "sust"])
def test_successive_forget_sets_are_the_same_benchmark_of_other_documents(folder: Path, which: Any):
    first = muse(folder, n_shots=1)
    _ = first.sets
    steps = first.steps(which)
    assert [s.forget for s in steps] == [f"{which}_{i}" for i in range(1, 5)]
    assert [len(s.sets["forget"].examples) for s in steps] == [1, 2, 3, 4]
    assert all(s.model_copy(update={"forget": "forget"}) == first for s in steps)
    assert len({s.digest for s in (first, *steps)}) == 5
    for step in steps:
        others = {name: asked for name, asked in step.sets.items() if name != "forget"}
        assert others == {name: asked for name, asked in first.sets.items() if name != "forget"}


def test_it_is_its_spec(folder: Path):
    benchmark = muse(folder, forget="scal_2", n_items=2, k=0.2)
    again = Benchmark.parse(json.loads(json.dumps(benchmark.spec())))
    assert again == benchmark
    assert again.digest == benchmark.digest
    for wrong in ("scal_5", "sust", "retain1"):
        with pytest.raises(InvalidConfig, match="forget"):
            Benchmark.parse({"kind": "muse", "forget": wrong})


def test_what_is_asked_to_be_forgotten_is_a_scope(folder: Path):
    scope = muse(folder, forget="sust_2").request
    assert [p.text for p in scope.forget] == texts(2, 2)
    assert [p.text for p in scope.retain] == texts(12, 3)
    assert len(scope.in_easy) == len(scope.out_near) == 4


def test_files_that_are_missing_or_do_not_fit_are_named(folder: Path):
    write(folder, {"verbmem/forget": [{"prompt": words(9), "gt": words(9)}, {"prompt": words(9), "gt": ""}]})
    with pytest.raises(InvalidData, match=r"verbmem/forget\.json, row 1: 'gt' is text"):
        _ = muse(folder).sets
    (folder / "knowmem/retain_qa_icl.json").unlink()
    write(folder, {"verbmem/forget": TABLES["verbmem/forget"]})
    with pytest.raises(
        InvalidData, match=r"looked for knowmem/retain_qa_icl\.jsonl, .*it holds knowmem/forget_qa\.json"
    ):
        _ = muse(folder).sets
    assert muse(folder, n_shots=0).sets
