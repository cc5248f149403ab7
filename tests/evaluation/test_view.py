"""A view is plain data: it gives what was observed, and says what was not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from workers import ASKED, tiny_lm, tiny_sets

from concept_unlearn.data.examples import Passage, Probe
from concept_unlearn.errors import InvalidData, UnknownName
from concept_unlearn.evaluation.metrics import AnswerLogprob, GeneratedAccuracy, Gibberish, RankedAccuracy, Touched
from concept_unlearn.evaluation.observe import observe
from concept_unlearn.evaluation.view import Asked, Reply, Seen, Tokens, View

TOKENS = Tokens((-0.5, -1.0, -2.0, -0.25), (True, False, True, True), 1, (-1.0, -2.0, -3.0, -4.0), (0.1, 0.2, 0.3, 0.4))
PROBES = (Probe(prompt="a", answers=("yes", "yeah"), distractors=("no",)), Probe(prompt="b", answers=("no",)))


@pytest.fixture(scope="module")
def observed():
    return observe(tiny_lm(), tiny_sets(), ASKED)


class TestTokens:
    def test_sum_and_average(self):
        assert TOKENS.nll == pytest.approx(3.75)
        assert TOKENS.mean_logprob == pytest.approx(-3.75 / 4)
        assert Tokens((), ()).mean_logprob is None
        assert Tokens((), ()).nll == 0

    def test_have_a_body_without_the_end_token(self):
        assert TOKENS.body == Tokens(TOKENS.logprobs[:3], TOKENS.greedy[:3], 0, TOKENS.mean[:3], TOKENS.std[:3])
        assert TOKENS.body.body == TOKENS.body

    @pytest.mark.parametrize(("n", "end"), [(0, 0), (3, 0), (4, 1), (9, 1)])
    def test_keep_the_end_token_as_long_as_it_is_there(self, n, end):
        assert TOKENS.cut(n).n == min(n, 4)
        assert TOKENS.cut(n).n_end == end

    def test_survive_json(self):
        assert Tokens.of_json(TOKENS.as_json()) == TOKENS


class TestBlackBox:
    @pytest.fixture
    def view(self):
        return View.of_replies("api", {"a": Asked(PROBES)}, {"a": ["Yes, it is.", "I cannot say."]})

    def test_is_judged_by_what_it_said(self, view):
        assert view["a"].said == (Reply((), "Yes, it is."), Reply((), "I cannot say."))
        assert GeneratedAccuracy(on="a")(view).values == (1.0, 0.0)

    @pytest.mark.parametrize("metric", [AnswerLogprob(on="a"), RankedAccuracy(on="a"), Touched(on="a")])
    def test_has_no_logits(self, view, metric):
        with pytest.raises(InvalidData, match=r"set 'a' this view holds no answers: .*log-probabilities can be read"):
            metric(view.beside(original=view))

    def test_was_not_judged(self, view):
        with pytest.raises(InvalidData, match="holds no surprise: its replies were not judged"):
            Gibberish(on="all", sets=("a",))(view)

    @pytest.mark.parametrize("read", ["paraphrases", "distractors", "gradnorm", "surprise", "answers"])
    def test_says_what_it_lacks(self, view, read):
        with pytest.raises(InvalidData, match=f"holds no {read}: "):
            getattr(view["a"], read)
        assert not view["a"].holds(read)
        with pytest.raises(InvalidData, match="holds no moments"):
            view["a"].require("moments")

    def test_must_reply_to_every_question_of_a_known_set(self):
        with pytest.raises(InvalidData, match="set 'a' asks 2 questions; given 1 replies"):
            View.of_replies("api", {"a": Asked(PROBES)}, {"a": ["yes"]})
        with pytest.raises(UnknownName, match="no set named 'b'; known: a"):
            View.of_replies("api", {"a": Asked(PROBES)}, {"b": ["yes"]})


class TestSeen:
    def test_offers_options_in_their_order_with_their_scores(self):
        yes, yeah, no = (Tokens((x,), (True,)) for x in (-1.0, -2.0, -3.0))
        record = {"answers": (yes, yeah), "distractors": (no,)}
        plain = Seen("a", Asked(PROBES[:1]), (record,))
        assert plain.options(0) == [("yes", yes), ("yeah", yeah), ("no", no)]
        ordered = PROBES[0].model_copy(update={"options": ("no", "yes", "yeah")})
        assert Seen("a", Asked((ordered,)), (record,)).options(0) == [("no", no), ("yes", yes), ("yeah", yeah)]

    def test_of_passages_is_not_asked_questions(self):
        seen = Seen("a", Asked((Passage(text="w7"),)), ({},))
        with pytest.raises(InvalidData, match="set 'a' holds passages, and this metric asks questions"):
            _ = seen.probes

    def test_asks_a_cloze_for_fewer_tokens(self):
        chat, cloze = Probe(prompt="a", answers=("b",), chat=True), PROBES[0]
        assert [Asked((), 9, 3).reply_tokens(p) for p in (chat, cloze)] == [9, 3]
        assert [Asked((), 9).reply_tokens(p) for p in (chat, cloze)] == [9, 9]


class TestBeside:
    def test_the_same_model_nothing_was_touched(self, observed):
        both = observed.beside(original=observed, retrained=observed)
        assert both.original is both.retrained is observed
        assert Touched(on="forget")(both).value == 0
        assert Touched(on="forget")(observed).value is None
        assert observed.original is None

    def test_one_that_was_asked_something_else_is_refused(self, observed):
        other = replace(observed["retain"], asked=replace(observed["retain"].asked, max_new_tokens=9))
        with pytest.raises(InvalidData, match="asked another set 'retain'"):
            observed.beside(original=replace(observed, sets={"retain": other}))
        with pytest.raises(InvalidData, match="asked none of the sets"):
            observed.beside(retrained=View("none", {}))

    def test_one_of_another_tokenizer_is_refused(self, observed):
        longer = tuple({**r, "answers": (TOKENS,) * len(r["answers"])} for r in observed["retain"].records)
        other = replace(observed, sets={"retain": replace(observed["retain"], records=longer)})
        with pytest.raises(InvalidData, match="other lengths in set 'retain': it is of another tokenizer"):
            observed.beside(original=other)


def test_an_unknown_set_is_told_with_the_known_ones():
    with pytest.raises(UnknownName, match="no set named 'forgot'; known: forget"):
        View("m", {"forget": Seen("forget", Asked(()), ())})["forgot"]
