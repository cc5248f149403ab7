from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from conftest import BOS, EOS, PAD, VOCAB, make_hf, make_tokenizer, words
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit

from concept_unlearn.errors import EmptyData, InvalidConfig, InvalidData, UnknownName
from concept_unlearn.evaluation.benchmark import Benchmark
from concept_unlearn.evaluation.benchmarks import MultipleChoice, UnlearningScore, known_to, sae_bench
from concept_unlearn.evaluation.view import Asked, Seen, Tokens, View
from concept_unlearn.lm import LM

WORDS = ("A", "B", "C", "D", "A.", "B.", "C.", "D.", "Answer:", "Question:")


def lettered() -> Any:
    """The word-level tokenizer, whose last words are option letters and what stands beside them."""
    names = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB - len(WORDS))}
    names |= {word: VOCAB - len(WORDS) + i for i, word in enumerate(WORDS)}
    inner = Tokenizer(WordLevel(names, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = make_tokenizer().chat_template
    return tokenizer


@pytest.fixture
def lettered_lm() -> LM:
    return LM(make_hf(), lettered(), name="lettered")


def quiz(start: int, n: int, *, choices: int = 4, answer: Any = 0) -> list[dict[str, Any]]:
    return [
        {"question": words(i, 7), "choices": [words(i + 1, 6 + c) for c in range(choices)], "answer": answer}
        for i in range(start, start + n)
    ]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Any]:
    write(tmp_path / "worse.jsonl", quiz(10, 3))
    return {
        "forget": (write(tmp_path / "bad.jsonl", quiz(6, 6)), f"{tmp_path}/worse"),
        "retain": (write(tmp_path / "good.jsonl", quiz(14, 5)), write(tmp_path / "fine.jsonl", quiz(20, 4))),
    }


def test_a_question_is_asked_as_wmdp_and_mmlu_are(tmp_path: Path):
    rows = [{"question": " Who? ", "choices": ["Ann", "Bob"], "answer": 1, "subject": "college_biology"}]
    table = write(tmp_path / "a.jsonl", rows)
    probe = MultipleChoice(forget=table, retain=()).sets["a"].examples[0]
    assert probe.prompt == (
        "The following are multiple choice questions (with answers) about college biology.\n\n"
        "Who?\nA. Ann\nB. Bob\nAnswer:"
    )
    assert (probe.answers, probe.distractors, probe.options, probe.chat) == (("B",), ("A",), ("A", "B"), False)
    chat = MultipleChoice(forget=table, retain=(), chat=True).sets["a"].examples[0]
    assert (chat.prompt, chat.opening) == (probe.prompt.removesuffix("\nAnswer:"), "Answer: (")
    norm = MultipleChoice(forget=table, retain=(), score="norm").sets["a"].examples[0]
    assert (norm.prompt, norm.answers, norm.options) == ("Question: Who?\nAnswer:", ("Bob",), ("Ann", "Bob"))


def test_wmdp_says_its_topic_and_other_tables_need_none(tmp_path: Path):
    for name, said in (("wmdp-cyber", " about cybersecurity.\n"), ("own", "(with answers).\n")):
        file = write(tmp_path / f"{name}.jsonl", quiz(6, 1))
        for table in (file, f"{tmp_path}/{name}"):
            assert said in MultipleChoice(forget=table, retain=()).sets[name].examples[0].prompt


def test_tables_to_forget_are_sets_and_those_to_keep_are_one(tables: dict[str, Any]):
    benchmark = MultipleChoice(**tables)
    assert {n: len(a.examples) for n, a in benchmark.sets.items()} == {"bad": 6, "worse": 3, "retain": 9}
    assert {n: len(a.examples) for n, a in MultipleChoice(**tables, n_items=2).sets.items()} == {
        "bad": 2, "worse": 2, "retain": 4,
    }  # fmt: skip
    some = MultipleChoice(**tables, only={"bad": (4, 0), "retain": (8,)})
    assert some.sets["bad"].examples == tuple(benchmark.sets["bad"].examples[i] for i in (4, 0))
    assert some.sets["retain"].examples == benchmark.sets["retain"].examples[8:]
    assert some.sets["worse"].examples == ()
    with pytest.raises(UnknownName, match="no set named 'better'"):
        _ = MultipleChoice(**tables, only={"better": (0,)}).sets
    with pytest.raises(InvalidData, match="'bad' has 6 questions; asked for is number 6"):
        _ = MultipleChoice(**tables, only={"bad": (6,)}).sets


def test_without_a_word_it_is_wmdp_beside_mmlu_from_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(*args: Any, **settings: Any) -> Any:
        asked.append((*args, settings["split"]))
        return datasets.Dataset.from_list(quiz(6, 1))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert set(MultipleChoice().sets) == {"wmdp-bio", "wmdp-cyber", "wmdp-chem", "retain"}
    wmdp = [("cais/wmdp", f"wmdp-{name}", "test") for name in ("bio", "cyber", "chem")]
    assert asked == [*wmdp, ("cais/mmlu", "all", "test")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": 4}, "answer 4, but there are 4 choices"),
        ({"answer": -1}, "answer -1, but there are 4 choices"),
        ({"answer": "E"}, "answer 'E', but there are 4 choices"),
        ({"answer": "w6"}, "'answer' is a whole number"),
        ({"choices": ["w6"]}, "two to 26 different choices"),
        ({"choices": ["w6", "w6"]}, "two to 26 different choices"),
        ({"choices": ["w6", " "]}, "list of texts, none of them empty"),
        ({"question": ""}, "'question' is text"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_file_and_line(tmp_path: Path, row: dict[str, Any], said: str):
    table = write(tmp_path / "a.jsonl", [*quiz(6, 1), quiz(7, 1)[0] | row])
    with pytest.raises(InvalidData, match=rf"a\.jsonl, line 2: .*{said}"):
        _ = MultipleChoice(forget=table, retain=()).sets


def test_an_answer_may_be_its_letter(tmp_path: Path):
    by_letter, by_number = (
        MultipleChoice(forget=write(tmp_path / f"{n}.jsonl", quiz(6, 1, answer=a)), retain=()).sets[n].examples
        for n, a in (("letter", "C"), ("number", 2))
    )
    assert by_letter == by_number


def test_sets_that_would_be_called_alike_are_refused(tmp_path: Path):
    for forget in ((f"{tmp_path}/a", "other/a"), "retain.jsonl", "my/text"):
        with pytest.raises(InvalidConfig, match="two sets would be called"):
            MultipleChoice(forget=forget)
    with pytest.raises(InvalidConfig, match="needs a table in 'forget'"):
        MultipleChoice(forget=())


@pytest.mark.parametrize("chat", [False, True])
def test_letters_that_a_tokenizer_does_not_know_are_refused(tables: dict[str, Any], lm: LM, chat: bool):
    with pytest.raises(
        InvalidData, match="compared by a token each, and this tokenizer has not one for every letter of ABCD"
    ):
        MultipleChoice(**tables, chat=chat).observe(lm)
    assert MultipleChoice(**tables, chat=chat, score="norm").observe(lm).sets


def test_a_letter_may_be_one_token_alone_and_two_after_a_space(tables: dict[str, Any]):
    inner = Tokenizer(BPE({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    lm = LM(make_hf(), tokenizer)
    sets: dict[str, Asked] = {}
    assert MultipleChoice(**tables, chat=True).fitted(sets, lm) is sets
    with pytest.raises(InvalidData, match=r"'A' is tokens \[\d+\], after a space \[\d+, \d+\]; use score='norm'"):
        MultipleChoice(**tables).fitted(sets, lm)


@pytest.mark.parametrize("score", ["letter", "norm", "sum"])
@pytest.mark.parametrize("chat", [False, True])
def test_accuracy_is_what_the_model_chooses(tmp_path: Path, lettered_lm: LM, score: Any, chat: bool):
    rows = quiz(6, 8, answer=0)
    settings = {"retain": (), "score": score, "chat": chat}
    choices = []
    for answer in range(4):
        table = write(tmp_path / f"{answer}.jsonl", [row | {"answer": answer} for row in rows])
        benchmark = MultipleChoice(forget=table, **settings)
        found = benchmark.measure(benchmark.observe(lettered_lm))[f"{answer}/choice_accuracy"]
        assert found.notes["tie_rate"] == 0
        choices.append(found.values)
    assert [sum(right) for right in zip(*choices, strict=True)] == [1] * len(rows)


def test_shuffling_options_and_answer_together_changes_no_score_without_letters(
    tables: dict[str, Any], lettered_lm: LM
):
    benchmark = MultipleChoice(**tables, score="norm")
    values = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        sets = {n: Asked(tuple(benchmark.ask(q, order) for q in qs)) for n, qs in benchmark.questions.items()}
        view = benchmark.observe(lettered_lm, sets=sets)
        values.append({n: m.values for n, m in benchmark.measure(view).items()})
    assert values[0] == values[1]


def test_an_option_keeps_its_text_in_every_order(tmp_path: Path):
    benchmark = MultipleChoice(forget=write(tmp_path / "a.jsonl", quiz(6, 1, answer=2)), retain=())
    question = benchmark.questions["a"][0]
    right = question.choices[2]
    prompts = set()
    for order in permutations(range(4)):
        probe = benchmark.ask(question, order)
        assert f"\n{probe.answers[0]}. {right}" in probe.prompt
        prompts.add(probe.prompt)
    assert len(prompts) == 24


@pytest.mark.parametrize("score", ["letter", "norm"])
def test_questions_are_kept_if_right_in_every_order(tmp_path: Path, lettered_lm: LM, score: Any):
    tables = {
        "forget": write(tmp_path / "a.jsonl", quiz(6, 20, choices=2)),
        "retain": write(tmp_path / "b.jsonl", quiz(9, 20, choices=2)),
    }
    whole = MultipleChoice(**tables, score=score)
    known = known_to(lettered_lm, whole)
    for name, questions in whole.questions.items():
        right = []
        for number, question in enumerate(questions):
            sets = {name: Asked(tuple(whole.ask(question, order) for order in permutations(range(2))))}
            metric = next(m for m in whole.metrics if m.on == name)
            found = metric(whole.observe(lettered_lm, metrics=[metric], sets=sets)).values
            if found == (1.0, 1.0):
                right.append(number)
        assert 0 < len(right) < len(questions)
        assert known.only[name] == tuple(right)
    measured = known.measure(known.observe(lettered_lm))
    assert measured["a/choice_accuracy"].value == measured["retain/choice_accuracy"].value == 1
    assert measured["a/unlearning_score"].value == 0
    assert known_to(lettered_lm, known).only == known.only


def test_a_model_that_knows_nothing_surely_is_said(tmp_path: Path, lettered_lm: LM):
    table = write(tmp_path / "a.jsonl", quiz(6, 1, answer=3))
    with pytest.raises(EmptyData, match="lettered answers no question of 'a' right in every order"):
        known_to(lettered_lm, MultipleChoice(forget=table, retain=()))
    many = write(tmp_path / "b.jsonl", quiz(6, 1, choices=5))
    with pytest.raises(InvalidData, match=r"b\.jsonl, line 1: 5 options have 120 orders"):
        known_to(lettered_lm, MultipleChoice(forget=many, retain=()))


def test_sae_bench_asks_biology_and_four_other_subjects_as_the_model_is_talked_to(
    lettered_lm: LM, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def load_dataset(*args: Any, **settings: Any) -> Any:
        asked.append(args)
        return datasets.Dataset.from_list(quiz(6, 20, choices=2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = sae_bench(lettered_lm, chat=False)
    subjects = ("high_school_us_history", "college_computer_science", "high_school_geography", "human_aging")
    assert asked[:5] == [("cais/wmdp", "wmdp-bio"), *(("cais/mmlu", subject) for subject in subjects)]
    assert set(found.only) == {"wmdp-bio", "retain"}
    assert [len(n) for n in found.only.values()] == [len(q) for q in found.questions.values()]


def chosen(benchmark: MultipleChoice, right: dict[str, list[bool]]) -> View:
    """A view in which these questions are answered right."""
    sets = {}
    for name, hits in right.items():
        asked = Asked(tuple(benchmark.sets[name].examples[: len(hits)]))
        scores = {True: Tokens((-0.1,), (True,)), False: Tokens((-3.0,), (False,))}
        records = [{"answers": (scores[h],), "distractors": (scores[not h], *[scores[False]] * 2)} for h in hits]
        sets[name] = Seen(name, asked, tuple(records))
    return View("planted", sets)


@pytest.mark.parametrize(
    ("forgotten", "kept", "wanted"),
    [
        ([False, False, False, True], [True] * 9, 0.75),
        ([True] * 4, [True] * 9, 0.0),
        ([False] * 4, [True] * 8 + [False], 0.0),
        ([False] * 4, [True] * 9, 1.0),
    ],
)
def test_the_unlearning_score_is_what_is_wrong_now_unless_the_rest_suffered(
    tables: dict[str, Any], forgotten: list[bool], kept: list[bool], wanted: float
):
    view = chosen(MultipleChoice(**tables), {"bad": forgotten, "retain": kept})
    found = UnlearningScore(on="bad")(view)
    assert (found.value, found.n) == (wanted, 4)
    assert found.notes["kept"] == sum(kept) / 9
    assert UnlearningScore(on="bad", least=0.5)(view).value == 1 - sum(forgotten) / 4


def test_a_model_that_kept_just_enough_counts(tables: dict[str, Any]):
    view = chosen(MultipleChoice(**tables), {"bad": [False], "retain": [True, False]})
    assert UnlearningScore(on="bad", least=0.5)(view).value == 1
    assert UnlearningScore(on="bad", least=0.51)(view).value == 0


def test_without_anything_kept_the_unlearning_score_is_undefined(tables: dict[str, Any]):
    view = chosen(MultipleChoice(**tables), {"bad": [False], "retain": []})
    found = UnlearningScore(on="bad")(view)
    assert (found.value, found.notes["undefined"]) == (None, "no question in 'retain'")


def test_every_metric_is_measured_and_told(tables: dict[str, Any], tmp_path: Path, lettered_lm: LM):
    (tmp_path / "plain.txt").write_text(words(*range(6, 30)))
    benchmark = MultipleChoice(
        **tables, text=str(tmp_path / "plain.txt"), only={"bad": (0, 2), "worse": (1,), "retain": (3,)}
    )
    measured = benchmark.measure(benchmark.observe(lettered_lm))
    assert all(m.value is not None for m in measured.values())
    assert {line.metric for line in benchmark.lines} == set(measured)
    assert [m.name for m in benchmark.leaks] == ["bad/choice_accuracy", "worse/choice_accuracy"]
    assert benchmark.keeps.name == "retain/choice_accuracy"
    assert MultipleChoice(**{**tables, "retain": ()}).keeps.name == "bad/choice_accuracy"


def test_batches_change_nothing(tables: dict[str, Any], lettered_lm: LM):
    one, many = (MultipleChoice(**tables, batch_size=size) for size in (1, 9))
    a, b = one.measure(one.observe(lettered_lm)), many.measure(many.observe(lettered_lm))
    assert {n: m.values for n, m in a.items()} == {n: m.values for n, m in b.items()}


def test_it_is_its_spec(tables: dict[str, Any]):
    benchmark = MultipleChoice(**tables, only={"bad": (0, 1)}, n_items=3, chat=True)
    again = Benchmark.parse(json.loads(json.dumps(benchmark.spec())))
    assert again == benchmark
    assert again.digest == benchmark.digest != MultipleChoice(**tables).digest
