from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_hf, make_tokenizer, words

from concept_unlearn.errors import EmptyData, InvalidConfig, InvalidData, UnknownName
from concept_unlearn.evaluation.benchmark import Benchmark
from concept_unlearn.evaluation.benchmarks import TOFU
from concept_unlearn.evaluation.view import Reply, Seen, Tokens, View
from concept_unlearn.lm import LM

REAL = Path(__file__).parents[4] / "shared/data/tofu"
LIKELY = {
    "retain": "probability",
    "real_authors": "conditional_probability",
    "world_facts": "conditional_probability",
}
UTILITY = [f"{on}/{metric}" for on, likely in LIKELY.items() for metric in (likely, "rouge", "truth_ratio")]


def rows(start: int, n: int, *, paraphrased: bool = True) -> list[dict[str, Any]]:
    found = []
    for i in range(start, start + n):
        row: dict[str, Any] = {
            "question": words(i, 7, 8 + i % 3), "answer": words(i, i + 1, 9),
            "perturbed_answer": [words(i, i + 2, 9), words(i, i + 3, 10)],
        }  # fmt: skip
        if paraphrased:
            row |= {"paraphrased_answer": words(9, i, i + 1), "paraphrased_question": words(7, i, 8)}
        found.append(row)
    return found


TABLES = {
    "forget01_perturbed": rows(10, 6),
    "retain_perturbed": rows(18, 6),
    "real_authors_perturbed": rows(26, 3, paraphrased=False),
    "world_facts_perturbed": rows(30, 3, paraphrased=False),
    "holdout01": [{k: r[k] for k in ("question", "answer")} for r in rows(34, 5)],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, table in TABLES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in table))
    return tmp_path


def tofu(folder: Path, **settings: Any) -> TOFU:
    return TOFU(data=folder, **{"forget": "forget01", "holdout": "holdout01", "max_new_tokens": 6, **settings})


def spoil(folder: Path, name: str, line: int, **fields: Any) -> None:
    table = [dict(row) for row in TABLES[name]]
    table[line - 1] |= fields
    kept = [{k: v for k, v in row.items() if v is not None} for row in table]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))


def test_sets_hold_the_questions_of_their_tables(folder: Path):
    sets = tofu(folder).sets
    assert {name: len(asked.examples) for name, asked in sets.items()} == {
        "forget": 6, "retain": 6, "real_authors": 3, "world_facts": 3, "holdout": 5, "forget_wordings": 6,
    }  # fmt: skip
    probe, row = sets["forget"].examples[1], TABLES["forget01_perturbed"][1]
    assert (probe.prompt, probe.answers, probe.chat) == (row["question"], (row["answer"],), True)
    assert (probe.distractors, probe.paraphrases) == (tuple(row["perturbed_answer"]), (row["paraphrased_answer"],))
    reworded = sets["forget_wordings"].examples[1]
    assert (reworded.prompt, reworded.answers) == (row["paraphrased_question"], (row["answer"],))
    assert not sets["world_facts"].examples[0].paraphrases
    assert {asked.max_new_tokens for asked in sets.values()} == {6}


def test_a_slice_takes_rows_and_then_the_first_of_them(folder: Path):
    sets = tofu(folder, rows={"forget": (2, 5), "retain": (4, 6)}, n_items=2).sets
    assert [p.prompt for p in sets["forget"].examples] == [r["question"] for r in TABLES["forget01_perturbed"][2:4]]
    assert [p.prompt for p in sets["retain"].examples] == [r["question"] for r in TABLES["retain_perturbed"][4:6]]
    assert len(sets["world_facts"].examples) == len(sets["forget_wordings"].examples) == 2


def test_rows_that_are_not_there_are_refused(folder: Path):
    with pytest.raises(EmptyData, match=r"'forget' .* has 6 rows; asked for are those up to 7"):
        _ = tofu(folder, rows={"forget": (2, 7)}).sets
    with pytest.raises(InvalidConfig, match="go from one to a later one; given: 2 to 2"):
        tofu(folder, rows={"forget": (2, 2)})
    with pytest.raises(UnknownName, match="no set of TOFU named 'forgot'"):
        tofu(folder, rows={"forgot": (0, 1)})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"answer": ""}, "'answer' is text"),
        ({"answer": " ?! "}, "every probe needs an answer"),
        ({"answer": None}, "no 'answer'; it has: question"),
        ({"perturbed_answer": words(1)}, "'perturbed_answer' is a list of texts"),
        ({"perturbed_answer": [words(5), ""]}, "'perturbed_answer' is a list of texts, none of them empty"),
        ({"perturbed_answer": [words(5), words(9, 11, 12)]}, "is both a paraphrase of the answer and a distractor"),
        ({"perturbed_answer": [words(11, 12, 9)]}, "is both an answer and a distractor"),
        ({"paraphrased_question": 3}, "'paraphrased_question' is text"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_file_and_line(folder: Path, fields: dict[str, Any], said: str):
    spoil(folder, "forget01_perturbed", 2, **fields)
    with pytest.raises(InvalidData, match=rf"forget01_perturbed\.jsonl, line 2: .*{said}"):
        _ = tofu(folder).sets


def test_a_missing_table_says_what_the_folder_holds(folder: Path):
    with pytest.raises(
        InvalidData, match=r"looked for forget10_perturbed\.jsonl, .*it holds forget01_perturbed\.jsonl"
    ):
        _ = tofu(folder, forget="forget10").sets
    with pytest.raises(InvalidData, match="no table 'holdout10'"):
        _ = tofu(folder, holdout="holdout10").sets


def test_a_holdout_may_be_a_file_and_is_never_something_trained_on(folder: Path):
    assert (
        len(tofu(folder, holdout=str(folder / "holdout01.jsonl"), rows={"holdout": (1, 3)}).sets["holdout"].examples)
        == 2
    )
    spoil(folder, "holdout01", 3, question=TABLES["retain_perturbed"][0]["question"].upper())
    with pytest.raises(InvalidData, match="is in the holdout and in 'retain'"):
        _ = tofu(folder).sets


def test_every_metric_is_measured_and_the_retrained_model_is_as_good_as_itself(folder: Path, lm: LM):
    benchmark = tofu(folder)
    view = benchmark.observe(lm)
    alone, beside = benchmark.measure(view), benchmark.measure(view.beside(retrained=view))
    assert list(alone) == [m.name for m in benchmark.metrics]
    assert beside["forget/forget_quality"].value == pytest.approx(1)
    assert beside["forget/priv_leak"].value == 0
    assert {n for n, m in alone.items() if m.value is None} == {"forget/forget_quality", "forget/priv_leak"}
    assert all(m.value is not None for m in beside.values())
    assert alone["forget_wordings/extraction_strength"].n == 6


def test_model_utility_is_the_harmonic_mean_of_its_nine_terms(folder: Path, lm: LM):
    benchmark = tofu(folder)
    measured = benchmark.measure(benchmark.observe(lm))
    terms = [measured[name].value for name in UTILITY]
    assert len(terms) == 9
    wanted = 0.0 if min(terms) == 0 else 9 / sum(1 / t for t in terms)
    assert measured["retain/model_utility"].value == pytest.approx(wanted)


def test_a_model_that_knows_everything_by_heart_has_every_score_of_it(folder: Path):
    benchmark = tofu(folder)
    moments = (-1.0,) * 3, (1.0,) * 3
    sure, unsure = Tokens((0.0,) * 3, (True,) * 3, 1, *moments), Tokens((-800.0,) * 3, (False,) * 3, 1)
    sets = {
        name: Seen(name, asked, tuple(
            {
                "answers": (sure,), "paraphrases": (sure,) * len(p.paraphrases), "surprise": 0.1,
                "distractors": (unsure,) * len(p.distractors), "said": Reply((1, 2, 3), p.answers[0]),
            }
            for p in asked.examples
        ))
        for name, asked in benchmark.sets.items()
    }  # fmt: skip
    measured = benchmark.measure(View("memory", sets))
    assert {name: measured[name].value for name in UTILITY} == dict.fromkeys(UTILITY, 1.0)
    for name in ("retain/model_utility", *(m.name for m in benchmark.leaks), benchmark.keeps.name):
        assert measured[name].value == 1, name
    assert measured["forget/truth_ratio"].value == pytest.approx(0)
    assert measured["forget/membership_auc"].value == 0.5


def test_batches_change_nothing(folder: Path, lm: LM):
    one, many = (tofu(folder, batch_size=size) for size in (1, 7))
    a, b = one.measure(one.observe(lm)), many.measure(many.observe(lm))
    assert {n: m.value for n, m in a.items()} == {n: pytest.approx(m.value, abs=1e-5) for n, m in b.items()}


def test_it_is_its_spec_and_its_digest_changes_with_what_is_asked(folder: Path):
    benchmark = tofu(folder, rows={"forget": (0, 4)}, n_items=3, batch_size=5)
    again = Benchmark.parse(json.loads(json.dumps(benchmark.spec())))
    assert again == benchmark
    assert again.digest == benchmark.digest
    assert tofu(folder, batch_size=3).digest == tofu(folder).digest != tofu(folder, max_new_tokens=7).digest
    digest = tofu(folder).digest
    spoil(folder, "world_facts_perturbed", 1, answer=words(40))
    assert tofu(folder).digest != digest
    with pytest.raises(InvalidConfig, match="forget"):
        Benchmark.parse({"kind": "tofu", "forget": "retain90"})


def test_every_line_leak_and_keep_is_a_metric_of_it(folder: Path):
    benchmark = tofu(folder)
    names = {m.name for m in benchmark.metrics}
    assert {line.metric for line in benchmark.lines} <= names
    assert {*(m.name for m in benchmark.leaks), benchmark.keeps.name} <= names
    assert benchmark.leaks[0].name == "forget/extraction_strength"
    without = {m.name for m in tofu(folder, holdout=None).metrics}
    told = {f"forget/{attack}_auc" for attack in ("membership", "loss", "zlib", "min_k_plus_plus")}
    assert names - without == told | {"forget/priv_leak"}


def test_what_is_asked_to_be_forgotten_is_a_scope(folder: Path):
    scope = tofu(folder, rows={"forget": (0, 2)}).request
    assert [(p.prompt, p.text) for p in scope.forget] == [
        (r["question"], r["answer"]) for r in TABLES["forget01_perturbed"][:2]
    ]
    assert (len(scope.retain), len(scope.in_hard), len(scope.out_far)) == (6, 2, 6)


def test_passages_to_forget_know_their_author(folder: Path):
    (folder / "forget05_perturbed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(1000, 50)))

    def authors(**settings: Any) -> list[str | None]:
        return [p.attribute("author") for p in tofu(folder, **settings).request.forget]

    assert authors() == ["198"] * 6
    assert authors(forget="forget05") == ["190"] * 20 + ["191"] * 20 + ["192"] * 10
    assert authors(forget="forget05", rows={"forget": (30, 50)}, n_items=12) == ["191"] * 10 + ["192"] * 2


def test_a_model_without_a_chat_template_is_asked_too(folder: Path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    benchmark = tofu(folder, n_items=2)
    measured = benchmark.measure(benchmark.observe(LM(make_hf("gpt2"), tokenizer)))
    assert measured["forget/probability"].n == 2


@pytest.mark.skipif(not REAL.is_dir(), reason="the TOFU tables are not on this machine")
def test_the_published_tables_load_whole():
    sizes = {"forget01": 40, "forget05": 200, "forget10": 400}
    for split, n in sizes.items():
        found = {name: len(asked.examples) for name, asked in TOFU(data=REAL, forget=split).sets.items()}
        assert found == {"forget": n, "forget_wordings": n, "retain": 400, "real_authors": 100, "world_facts": 117}


@pytest.mark.skipif(not REAL.is_dir(), reason="the TOFU tables are not on this machine")
def test_twenty_rows_are_one_published_author():
    author = TOFU(data=REAL, forget="forget01", rows={"forget": (0, 20)}).sets["forget"].examples
    following = TOFU(data=REAL, forget="forget01", rows={"forget": (20, 40)}).sets["forget"].examples
    assert all("Al-Kuwaiti" in p.prompt + p.answers[0] for p in author[:10])
    assert not any("Al-Kuwaiti" in p.prompt + p.answers[0] for p in following)


def test_old_tables_can_be_reproduced(folder: Path):
    lm = LM(make_hf(), make_tokenizer(), name="tiny")
    ours, theirs = tofu(folder), tofu(folder, compat="open-unlearning")
    view = ours.observe(lm)
    mine, peer = ours.measure(view), theirs.measure(view)
    assert set(mine) == set(peer)
    lengths = [t.n - 1 for (t,) in view["forget"].answers]  # the last label never counts
    assert min(peer["forget/extraction_strength"].values) == 1 / max(lengths)
    assert min(mine["forget/extraction_strength"].values) == 0
    assert theirs.keeps.name == ours.keeps.name
    assert theirs.metric(theirs.keeps.name) == theirs.keeps
    assert all(theirs.metric(leak.name) == leak for leak in theirs.leaks)
