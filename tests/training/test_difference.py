"""How far two patched models are apart: nothing from themselves, and what is summed is what theory says."""

from __future__ import annotations

import pytest
import torch
from conftest import words

from concept_unlearn.data.examples import Passage
from concept_unlearn.errors import EmptyData
from concept_unlearn.patches import WeightPatch
from concept_unlearn.training.difference import difference
from concept_unlearn.weights import Dense

PASSAGES = [Passage(text=words(*range(10, 10 + n))) for n in (9, 3, 6, 12)]


@pytest.fixture
def patch(lm):
    generator = torch.Generator().manual_seed(0)
    weight = lm.model.lm_head.weight
    return WeightPatch({"lm_head.weight": Dense(torch.randn(weight.shape, generator=generator) * 0.1)})


def test_a_model_is_no_different_from_itself(lm, patch):
    for one in (None, patch):
        found = difference(lm, one, one, PASSAGES)
        assert (found.kl, found.same, found.n_tokens) == (pytest.approx(0, abs=1e-7), 1.0, 8 + 2 + 5 + 11)


def test_it_is_the_kl_of_the_first_from_the_second_a_token(lm, patch):
    want, same, n = 0.0, 0, 0
    for passage in PASSAGES:
        ids = torch.tensor([lm.encode(passage.text, chat=False)])
        with torch.no_grad():
            p = lm.logits(ids)[0, :-1].log_softmax(-1)
            with patch.on(lm):
                q = lm.logits(ids)[0, :-1].log_softmax(-1)
        want += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        n += len(p)
    found = difference(lm, None, patch, PASSAGES, batch_size=3)
    assert found == (pytest.approx(want / n, rel=1e-4), same / n, n)
    assert 0 < found.same < 1
    assert found.kl != pytest.approx(difference(lm, patch, None, PASSAGES).kl, rel=1e-3)


def test_batches_change_nothing(lm, patch):
    one, many = (difference(lm, patch, None, PASSAGES, batch_size=size) for size in (1, 4))
    assert one == (pytest.approx(many.kl, rel=1e-4), many.same, many.n_tokens)


def test_of_a_reply_only_the_answer_counts(lm, patch):
    reply = Passage(prompt=words(10, 11, 12), text=words(20, 21))
    assert difference(lm, None, patch, [reply]).n_tokens == 3  # and the token that ends it


def test_nothing_to_compare_on_is_an_error(lm):
    with pytest.raises(EmptyData, match="none is given"):
        difference(lm, None, None, [])
