"""Labels in place of text: objectives act on p(label), the sum of the probabilities of its words' first tokens."""

from __future__ import annotations

import math
import random

import pytest
import torch
from conftest import words

from concept_unlearn import Scope
from concept_unlearn.errors import InvalidConfig, InvalidData
from concept_unlearn.lm.head import Head
from concept_unlearn.lm.labels import Labels, first_tokens
from concept_unlearn.methods import EUL, Method, Study
from concept_unlearn.objectives import GA, IDK, ME, Depart, RetainKL, RetainNLL
from concept_unlearn.step import Read, Step
from concept_unlearn.training.data import make_data

LABELS = {"good": ("w20", "w21"), "bad": ("w22",), "none": ("w23", "w24")}
IDS = [[20, 21], [22], [23, 24]]


def make_scope(n=8):
    rng = random.Random(0)

    def draw(pool, label):
        return [{"prompt": words(*rng.choices(pool, k=4)), "text": label(i)} for i in range(n)]

    names = list(LABELS)
    return Scope.of(
        "reviews", forget=draw(range(30, 46), lambda i: "good"), retain=draw(range(8, 19), lambda i: names[i % 3]),
        out_far=[],
    )  # fmt: skip


@pytest.fixture
def scope():
    return make_scope()


def method(**settings):
    return EUL(**{"labels": LABELS, "lr": 2e-2, "epochs": 6, "batch_size": 4, "width": 3} | settings)


def likelihoods(lm, scope, split):
    """p(label) of every passage, from whole distributions, without anything of the package's training."""
    found = []
    for passage in getattr(scope, split):
        ids = torch.tensor([lm.encode(passage.prompt, chat=True)])
        with torch.no_grad():
            p = lm.logits(ids)[0, -1].double().softmax(-1)
        each = torch.stack([p[own].sum() for own in IDS])
        found.append(float(each[list(LABELS).index(passage.text)] / each.sum()))
    return torch.tensor(found)


def test_the_loss_is_that_of_the_label_among_the_labels(lm, scope):
    split = make_data(lm, scope, ["retain"], method(), labels=tuple(LABELS)).splits["retain"]
    head = Labels(Head(lm.model), first_tokens(lm.tokenizer, LABELS))
    step = Step(lm, {"retain": split.batch(range(len(split.rows)))}, [Read("retain")], head=head)
    torch.testing.assert_close(
        (-step.nll("retain")).exp().double(), likelihoods(lm, scope, "retain"), rtol=1e-4, atol=1e-5, check_dtype=False
    )
    assert head.vocabulary == 3
    assert split.batch([0]).lengths().tolist() == [1]


def test_many_passages_are_asked_some_at_a_time(lm):
    whole, cut = (Labels(head, IDS) for head in (Head(lm.model), Head(lm.model, chunk=96)))
    hidden = torch.randn(9, 16)
    seen = []

    def first(z, which):
        seen.append(len(z))
        return z[:, 0]

    torch.testing.assert_close(cut.each(hidden, first), whole.each(hidden, lambda z, _: z[:, 0]))
    assert max(seen) <= 2


def test_what_is_to_be_forgotten_is_no_longer_known_and_the_rest_is(lm, scope):
    lesson = method(objectives=(GA(weight=-1.0), RetainNLL()), epochs=30, alternate=False, adapter="linear", width=None)
    with lesson(lm, scope).on(lm):  # a model that knows both, which an adapter of its own then makes forget
        assert min(likelihoods(lm, scope, "forget").mean(), likelihoods(lm, scope, "retain").mean()) > 0.8
        patch = method(objectives=(RetainKL(), Depart(), RetainNLL(), GA()), epochs=15)(lm, scope)
        with patch.on(lm):
            assert likelihoods(lm, scope, "forget").mean() < 0.4
            assert likelihoods(lm, scope, "retain").mean() > 0.7


def test_the_bound_of_departing_is_of_the_labels(lm, scope):
    seen = []
    method(epochs=20).fit(Study(lm, scope), log=lambda _, values: seen.append(values.get("depart", 0.0)))
    assert -math.log(3) - 1e-6 <= min(seen) < -0.1


def test_only_a_verbaliser_changes_what_is_trained_on(lm, scope):
    text = make_data(lm, scope, ["forget"], method()).splits["forget"].rows[0]
    label = make_data(lm, scope, ["forget"], method(), labels=tuple(LABELS)).splits["forget"].rows[0]
    assert label.ids[:-1] == text.ids[: text.n_prompt]
    assert label.ids[-1] == list(LABELS).index("good")


def test_every_method_says_what_its_passages_may_be():
    for member in Method.members.values():
        assert member.data_kinds
        assert member.data_kinds <= {"text", "classification"}
    assert EUL.data_kinds == {"text", "classification"}
    assert "data_kinds" not in EUL().spec()


class TestBadInput:
    def test_labels_that_begin_alike(self, lm, scope):
        with pytest.raises(InvalidConfig, match=r"words of 'a' and 'b' begin with the same token, 'w20'"):
            method(labels={"a": ("w20 w21",), "b": ("w20",)})(lm, make_scope())

    def test_a_text_that_is_no_label(self, lm):
        odd = Scope.of("odd", forget=[{"prompt": "w7", "text": "fine"}], retain=[words(8, 9)], out_far=[])
        with pytest.raises(InvalidData, match="one of good, bad, none; given: 'fine'"):
            method()(lm, odd)

    def test_a_text_without_a_prompt(self, lm):
        odd = Scope.of("odd", forget=["good"], retain=[{"prompt": "w9", "text": "bad"}], out_far=[])
        with pytest.raises(InvalidData, match="without a prompt"):
            method()(lm, odd)

    def test_objectives_that_read_more_than_the_answer(self, lm, scope):
        with pytest.raises(InvalidConfig, match="reads logits at content"):
            method(objectives=(ME(), RetainNLL()))(lm, scope)

    def test_refusals(self, lm, scope):
        with pytest.raises(InvalidConfig, match="a label has no refusal"):
            method(objectives=(IDK(), RetainNLL()))(lm, scope)

    @pytest.mark.parametrize("labels", [{"one": ("w20",)}, {"one": ("w20",), "two": ()}])
    def test_too_few_of_them(self, labels):
        with pytest.raises(InvalidConfig, match=r"one label says nothing|at least 1 item"):
            Method.parse({"kind": "eul", "labels": labels})
