"""What a dictionary is worth: perfect, useless, and the same in any batch."""

from __future__ import annotations

import pytest
import torch
from conftest import make_perfect_sae, make_sae
from workers import tiny_corpus

from concept_unlearn import SAEDictionary
from concept_unlearn.data.corpus import sequences
from concept_unlearn.dictionaries import evaluate_dictionary
from concept_unlearn.errors import DictionaryMismatch, EmptyData


@pytest.fixture
def texts(lm):
    return list(sequences(tiny_corpus(20), lm.tokenizer, context=16))


def test_a_perfect_dictionary_loses_nothing(lm, texts):
    quality = evaluate_dictionary(lm, SAEDictionary(make_perfect_sae()), texts)
    assert quality.variance_explained == pytest.approx(1, abs=1e-6)
    assert quality.loss_recovered == pytest.approx(1, abs=1e-4)
    assert quality.loss_spliced == pytest.approx(quality.loss, abs=1e-4)
    assert quality.l0 == pytest.approx(lm.d_model)
    assert quality.n_tokens == sum(map(len, texts))


def test_a_dictionary_that_says_nothing_recovers_nothing(lm, texts):
    sae = make_sae().to(dtype=torch.float32)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.b_dec.zero_()
    quality = evaluate_dictionary(lm, SAEDictionary(sae), texts)
    assert quality.loss_recovered == pytest.approx(0, abs=1e-6)
    assert quality.variance_explained < 0.05
    assert (quality.l0, quality.dead) == (0, 1)


def test_batches_and_order_do_not_matter(lm, texts):
    dictionary = SAEDictionary(make_sae().to(dtype=torch.float32))
    a = evaluate_dictionary(lm, dictionary, texts, batch_size=3).model_dump()
    b = evaluate_dictionary(lm, dictionary, texts[::-1], batch_size=64).model_dump()
    assert a == pytest.approx(b, rel=1e-4)


def test_variance_explained_is_that_of_all_rows_at_once(lm, texts):
    dictionary = SAEDictionary(make_sae().to(dtype=torch.float32))
    rows = []
    for ids in texts:
        row = torch.tensor([ids])
        rows.append(lm.activations(row, torch.ones_like(row, dtype=torch.bool), dictionary.site)[dictionary.site][0])
    x = torch.cat(rows)
    y = dictionary.decode(dictionary.encode(x), x)
    expected = 1 - (x - y).square().sum() / (x - x.mean(0)).square().sum()
    quality = evaluate_dictionary(lm, dictionary, texts)
    assert quality.variance_explained == pytest.approx(float(expected), rel=1e-4)
    assert quality.l0 == pytest.approx(float((dictionary.encode(x) > 0).sum() / len(x)), rel=1e-5)


def test_nothing_left_to_measure_is_an_error(lm):
    sae = make_perfect_sae()
    sae.cfg.metadata.max_norm = 1e-9
    with pytest.raises(EmptyData):
        evaluate_dictionary(lm, SAEDictionary(sae), [[7, 8, 9]])


def test_a_dictionary_that_cannot_stand_in_is_refused(lm, texts):
    transcoder = make_sae("transcoder", d_out=lm.d_model, hook_name="blocks.1.ln2.hook_normalized",
                          hook_name_out="blocks.1.hook_mlp_out")  # fmt: skip
    with pytest.raises(DictionaryMismatch, match="cannot stand in for"):
        evaluate_dictionary(lm, SAEDictionary(transcoder), texts)
    with pytest.raises(DictionaryMismatch, match="reads 24 numbers a token"):
        evaluate_dictionary(lm, SAEDictionary(make_sae(d_in=24)), texts)
