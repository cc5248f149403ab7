"""The real SmolLM2 and real text, from a corpus to a dictionary that explains what it was not trained on."""

from __future__ import annotations

import pytest

from concept_unlearn import BatchtopkArchitecture, Corpus, Harvest, Training, evaluate_dictionary, harvest, train
from concept_unlearn.data.corpus import sequences
from concept_unlearn.data.scope import Scope

pytestmark = pytest.mark.slow


def test_text_becomes_a_dictionary(lm, tmp_path):
    passages = [p.text for p in (*Scope.load("chess").near, *Scope.load("chess").retain)]
    rows = Harvest(sites=("resid_post.2",), tokens=20_000, context=128, shard_tokens=8192)
    store = harvest(lm, Corpus.of(passages[20:]), rows, tmp_path / "store")
    assert store.n_rows == 20_000
    architecture = BatchtopkArchitecture(d_sae=1152, k=32, topk_threshold_lr=0.05)
    training = Training(architecture=architecture, tokens=80_000, batch=512, lr=1e-3)
    (dictionary,) = train(store, training, tmp_path / "out").values()
    held_out = list(sequences(Corpus.of(passages[:20]), lm.tokenizer, context=128))
    quality = evaluate_dictionary(lm, dictionary, held_out)
    assert quality.variance_explained > 0.5
    assert quality.loss_recovered > 0.8
    assert 16 < quality.l0 < 64
