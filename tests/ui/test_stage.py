"""Questions, served one at a time."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
from conftest import CONCEPT, FAR, PLANTED, n_hooks, words

from concept_unlearn.dictionaries import load_dictionary
from concept_unlearn.edits import Clamp
from concept_unlearn.errors import InvalidConfig
from concept_unlearn.features import inspect_features
from concept_unlearn.gates import TokenGate
from concept_unlearn.lm.fingerprint import fingerprint
from concept_unlearn.patches import FeaturePatch
from concept_unlearn.ui import Question, Reply, Stage, load_patches

ASKED = words(*CONCEPT[3:6], FAR[1])


@pytest.fixture(scope="module")
def patch(planted):
    dictionary = load_dictionary(planted.first)
    return FeaturePatch(dictionary=dictionary, features=PLANTED, edit=Clamp(to=-3.0), gate=TokenGate(above=0.5))


@pytest.fixture
def stage(planted, patch):
    stage = Stage(planted.lm, {"planted": patch})
    yield stage
    stage.close()


class Slow:
    """A model that waits to be let go before each pass."""

    def __init__(self, lm):
        self.go, self.begun = threading.Event(), threading.Event()
        self._handle = lm.model.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        self.begun.set()
        assert self.go.wait(10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.go.set()
        self._handle.remove()


def served(stage, question):
    stage.ask(question)
    question.future.result(10)
    return question


def test_both_replies_are_what_generate_says(planted, patch, stage):
    question = served(stage, Question(ASKED, patch, max_new_tokens=12))
    assert question.original.text == planted.lm.generate(ASKED, max_new_tokens=12)[0]
    with patch.on(planted.lm):
        assert question.patched.text == planted.lm.generate(ASKED, max_new_tokens=12)[0]
    assert question.original.text != question.patched.text
    assert (question.original.state, question.patched.state, question.error) == ("done", "done", None)


def test_tokens_are_marked_where_a_feature_fires_in_prompt_and_reply(patch, stage):
    question = served(stage, Question(ASKED, patch, max_new_tokens=40))
    by_word = {moment.text.strip(): bool(moment.fired) for moment in question.explanation.moments}
    assert [by_word[word] for word in ASKED.split()] == [True, True, True, False]
    concept = {f"w{i}" for i in CONCEPT}
    for reply in (question.original, question.patched):
        assert all((said.text.strip() in concept) == bool(said.fired) for said in reply.said[:-1])


def test_what_could_have_been_said_begins_with_what_was(patch, stage):
    question = served(stage, Question(ASKED, patch, max_new_tokens=5))
    for said in question.original.said:
        assert said.guesses[0].text.strip() == (said.text.strip() or "<unk>")
        assert sum(guess.probability for guess in said.guesses) <= 1 + 1e-5


def test_a_stopped_question_stops_and_leaves_the_model_bit_for_bit(planted, patch, stage):
    before, hooks = fingerprint(planted.lm.model), n_hooks(planted.lm.model)
    question = Question(ASKED, patch, max_new_tokens=200)
    with Slow(planted.lm) as slow:
        stage.ask(question)
        assert slow.begun.wait(10)
        question.stop()
        slow.go.set()
        question.future.result(10)
    assert {question.original.state, question.patched.state} == {"stopped"}
    assert len(question.original.said) <= 1
    assert (fingerprint(planted.lm.model), n_hooks(planted.lm.model)) == (before, hooks)
    assert served(stage, Question(ASKED, patch, max_new_tokens=3)).error is None


def test_the_second_waits_for_the_first_and_one_that_is_stopped_is_never_asked(planted, patch, stage):
    first, second, third = (Question(ASKED, patch, max_new_tokens=3) for _ in range(3))
    with Slow(planted.lm) as slow:
        for question in (first, second, third):
            stage.ask(question)
        assert slow.begun.wait(10)
        second.stop()
        assert (second.original.state, third.original.state) == ("waiting", "waiting")
        slow.go.set()
        third.future.result(10)
    assert first.original.state == third.original.state == "done"
    assert (second.original.state, second.original.said, second.explanation) == ("stopped", [], None)


def test_a_question_that_fails_says_why_and_the_next_is_served(patch, stage):
    too_long = served(stage, Question(words(*[9] * 300), patch, max_new_tokens=3))
    assert "256" in too_long.error
    assert too_long.original.state == "failed"
    assert served(stage, Question(ASKED, patch, max_new_tokens=3)).error is None


def test_whatever_fails_is_told(planted, patch, stage, monkeypatch):
    monkeypatch.setattr(planted.lm.tokenizer, "chat_template", "{{ raise_exception('no such talk') }}")
    refused = served(stage, Question(ASKED, patch, max_new_tokens=3))
    assert "no such talk" in refused.error
    assert (refused.original.state, refused.patched.state) == ("failed", "failed")


def test_a_talk_goes_on_from_what_each_side_said(planted, patch, stage):
    history = (ASKED, "w20 w21")
    question = served(stage, Question("w22", patch, max_new_tokens=6, original=Reply(history)))
    ids = planted.lm.tokenizer(f"w4 {ASKED} w5 w4 w20 w21 w5 w4 w22 w5 w6", add_special_tokens=False)["input_ids"]
    said = planted.lm.generate_ids([ids], max_new_tokens=6)[0]
    assert question.original.text == planted.lm.tokenizer.decode(said, skip_special_tokens=True)


def test_closing_stops_what_is_under_way(planted, patch):
    stage, question = Stage(planted.lm, {"planted": patch}), Question(ASKED, patch, max_new_tokens=200)
    with Slow(planted.lm) as slow:
        stage.ask(question)
        assert slow.begun.wait(10)
        threading.Timer(0.05, slow.go.set).start()
        stage.close()
    assert question.finished
    assert question.patched.state == "stopped"


def test_an_inspection_says_better_what_features_are_about(planted, patch):
    dictionary, feature = load_dictionary(planted.first), PLANTED[0]
    seen = inspect_features(planted.lm, dictionary, planted.scope, [feature])
    for inspection, about in (
        (seen, seen.features[0].strongest[:4]),
        (seen.labelled({feature: "suns"}, "me"), ("suns",)),
    ):
        with closing(Stage(planted.lm, {"planted": patch}, [inspection])) as stage:
            assert stage.words["planted"][str(dictionary.site), feature] == about


def test_words_of_features_are_what_they_raise(planted, patch, stage):
    head = planted.lm.model.lm_head.weight.detach()
    (site, feature) = ("blocks.0.hook_resid_pre", PLANTED[0])
    assert stage.words["planted"][site, feature][0].strip() == f"w{int(head[:, feature].argmax())}"


def test_a_patch_that_cannot_be_loaded_is_named(planted, patch, workplace, tmp_path):
    good = patch.save(tmp_path / "good", planted.lm)
    with pytest.raises(InvalidConfig, match=r"bad: CorruptArtifact: .*bad"):
        load_patches([good, tmp_path / "bad"], planted.lm)
    (tmp_path / "bad").mkdir()
    with pytest.raises(InvalidConfig, match=r"bad: CorruptArtifact: .*no config.json"):
        load_patches([tmp_path / "bad"], planted.lm)
    other = patch.met(planted.lm)
    foreign = type(other)(
        slices=other.slices, origin=other.origin.model_copy(update={"fingerprint": "0" * 16}), edit=other.edit
    ).save(tmp_path / "foreign")
    with pytest.raises(InvalidConfig, match=r"foreign: PatchMismatch: .*made on"):
        load_patches([foreign], planted.lm)


def test_patches_of_one_name_are_told_apart(planted, patch, tmp_path):
    folders = [patch.save(tmp_path / run / "patch", planted.lm) for run in ("one", "two")]
    assert list(load_patches(folders, planted.lm)) == ["patch", str(folders[1])]


def test_a_name_that_is_another_ones_folder_takes_no_patch_away(planted, patch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("one/patch", "patch"):
        patch.save(tmp_path / folder, planted.lm)
    assert list(load_patches(["one/patch", "patch"], planted.lm)) == ["patch", str(tmp_path / "patch")]
    assert list(load_patches(["patch"] * 4, planted.lm)) == ["patch", str(tmp_path / "patch")]
