from __future__ import annotations

import json
import warnings

import pytest

from concept_unlearn.data.examples import Passage, Probe, normalise
from concept_unlearn.data.scope import CONCEPTS, PROBES, Scope, concepts
from concept_unlearn.errors import EmptyData, InvalidData, UnknownName

BUILT_IN = ["astronomy", "chess", "france", "harry_potter", "photosynthesis", "shakespeare"]


def write(folder, **parts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_the_built_in_concepts_are_there():
    assert concepts() == BUILT_IN


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_concept_has_what_was_promised(name):
    scope = Scope.load(name)
    assert len(scope.forget) >= 150
    assert len(scope.in_easy) >= 40
    assert len(scope.in_hard) >= 20
    assert len(scope.out_near) >= 40
    assert len(scope.out_far) >= 40
    assert len(scope.near) >= 50
    assert len(scope.retain) >= 200
    for part in PROBES:
        probes = getattr(scope, part)
        assert any(p.chat for p in probes)
        assert not all(p.chat for p in probes)
        assert all(p.distractors for p in probes)
        assert not any(p.answered_by(p.prompt) for p in probes), "the prompt gives the answer away"
        assert len({normalise(p.prompt) for p in probes}) == len(probes)
    assert any(p.prompt for p in scope.forget)
    assert any(p.prompt is None for p in scope.forget)


def test_no_built_in_file_is_left_out_of_a_wheel():
    assert all(p.suffix == ".jsonl" for p in CONCEPTS.glob("*/*"))


def test_halves_are_disjoint_complete_and_equal():
    scope = Scope.load("chess")
    tune, test = scope.halves()
    for part in ("forget", "near", "retain", *PROBES):
        a, b, whole = getattr(tune, part), getattr(test, part), getattr(scope, part)
        assert sorted(map(repr, a + b)) == sorted(map(repr, whole))
        assert len(a) - len(b) in (0, 1)
        assert not set(a) & set(b)


def test_halves_do_not_depend_on_the_order_of_the_file():
    scope = Scope.load("chess")
    turned = Scope.of("chess", forget=scope.forget[::-1], retain=scope.retain[::-1], in_easy=scope.in_easy[::-1])
    assert turned.halves().tune.in_easy == scope.halves().tune.in_easy


def test_a_folder_of_the_same_files_is_a_scope(tmp_path):
    folder = write(
        tmp_path / "mine", forget=[{"text": "a"}, {"text": "b", "prompt": "q"}],
        in_easy=[{"prompt": "Who?", "answers": ["me"], "chat": True}], retain=[{"text": "c"}],
    )  # fmt: skip
    scope = Scope.load(folder)
    assert scope.name == "mine"
    assert scope.forget == (Passage(text="a"), Passage(text="b", prompt="q"))
    assert scope.in_easy == (Probe(prompt="Who?", answers=("me",), chat=True),)
    assert scope.retain == (Passage(text="c"),)
    assert scope.out_far == Scope.load("chess").out_far


def test_forget_text_alone_is_a_scope(tmp_path):
    path = tmp_path / "volcanoes.jsonl"
    lines = [
        '{"text": "Lava is hot."}',
        "",
        '"A bare string is a passage too."',
        '{"question": "Why?", "answer": "Because."}',
    ]
    path.write_text("\n".join(lines))
    scope = Scope.load(path)
    assert scope.name == "volcanoes"
    assert [p.text for p in scope.forget] == ["Lava is hot.", "A bare string is a passage too.", "Because."]
    assert scope.forget[2].prompt == "Why?"
    assert len(scope.retain) >= 200


def test_datasets_rows_are_taken_as_they_are():
    from datasets import Dataset

    rows = Dataset.from_list([{"question": "Who wrote it?", "answer": "She did."}])
    scope = Scope.of("tofu", forget=rows, in_easy=rows)
    assert scope.forget == (Passage(text="She did.", prompt="Who wrote it?"),)
    assert scope.in_easy == (Probe(prompt="Who wrote it?", answers=("She did.",), chat=True),)


def test_a_dataset_of_the_hub_is_read_by_its_splits(monkeypatch):
    import datasets

    splits = datasets.DatasetDict(
        forget=datasets.Dataset.from_list([{"text": "a"}]), retain=datasets.Dataset.from_list([{"text": "b"}])
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    scope = Scope.load("user/concept")
    assert (scope.forget, scope.retain) == ((Passage(text="a"),), (Passage(text="b"),))


@pytest.mark.parametrize(
    ("part", "line", "says"),
    [
        ("forget", "{not json", "line 2: not JSON"),
        ("forget", '{"txt": "a"}', "line 2: passage has no 'txt'; known: text, prompt"),
        ("forget", '{"text": "  "}', "line 2: .*the text is empty"),
        ("forget", "3", "line 2: a passage is a mapping"),
        ("in_easy", '{"prompt": "Who?"}', "line 2: probe: answers: Field required"),
        ("in_easy", '{"prompt": "Who?", "answers": []}', "line 2: .*needs an answer"),
        ("in_easy", '{"prompt": "Who?", "answers": ["..."]}', "line 2: .*letter or digit"),
        ("in_easy", '{"prompt": " ", "answers": ["a"]}', "line 2: .*the prompt is empty"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, part, line, says):
    good = {"forget": '{"text": "fine"}', "in_easy": '{"prompt": "Fine?", "answers": "yes"}'}
    folder = write(tmp_path / "mine", forget=[{"text": "fine"}])
    (folder / f"{part}.jsonl").write_text(f"{good[part]}\n{line}\n")
    with pytest.raises(InvalidData, match=rf"{part}\.jsonl, {says}"):
        Scope.load(folder)


def test_unknown_and_empty_sources_are_named(tmp_path):
    with pytest.raises(UnknownName, match=r"no concept named 'chest'; known: astronomy.*Did you mean 'chess'"):
        Scope.load("chest")
    for path in ("my_concpt/", "../concpt", "/concpt"):  # none is a Hub id
        with pytest.raises(UnknownName, match=r"no concept named '.*a folder or a \.jsonl file"):
            Scope.load(path)
    with pytest.raises(InvalidData, match=r"no forget\.jsonl"):
        Scope.load(tmp_path)
    with pytest.raises(EmptyData, match="nothing to unlearn"):
        Scope.load(write(tmp_path / "empty", forget=[]))
    with pytest.raises(EmptyData, match="two halves need at least two"):
        Scope.of("one", forget=["a"]).halves()


def test_a_prompt_both_in_and_out_of_scope_is_an_error():
    with pytest.raises(InvalidData, match=r"asked both in and out of scope, by in_easy and by out_far \(built in"):
        Scope.of(
            "x", forget=["a"], in_easy=[{"prompt": "Who?", "answers": "a"}], out_far=[{"prompt": "who", "answers": "b"}]
        )


def test_passages_both_to_forget_and_to_keep_are_counted():
    with pytest.warns(UserWarning, match=r"1 of 2 passages to forget are also to be kept, such as 'The same\.'"):
        Scope.of("x", forget=["The same.", "Other."], near=["the same"])


def test_the_same_answer_to_another_question_is_another_passage():
    with warnings.catch_warnings(record=True, action="always") as told:
        Scope.of("x", forget=[{"question": "A?", "answer": "Yes."}], retain=[{"question": "B?", "answer": "Yes."}])
    assert told == []


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("It is Paris.", True), ("PARIS!", True), ("It is Párìs", True), ("Parisian", False), ("", False),
        ("the city of light", True), ("city lights", False),
    ],
)  # fmt: skip
def test_an_answer_counts_as_whole_words_whatever_the_case_and_accents(text, right):
    assert Probe(prompt="?", answers=("Paris", "City of Light")).answered_by(text) == right
