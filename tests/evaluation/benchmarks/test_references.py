from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import make_hf, make_tokenizer, words

from concept_unlearn.data.examples import Passage, Probe
from concept_unlearn.errors import InvalidData
from concept_unlearn.evaluation.observe import observe
from concept_unlearn.evaluation.view import Asked, View
from concept_unlearn.lm import LM

PROBES = tuple(Probe(prompt=words(i, 7), answers=words(i, i + 1), distractors=words(9, 8)) for i in (10, 11))
SETS = {"forget": Asked(PROBES), "text": Asked((Passage(text=words(*range(10, 20))),))}
READS = {"forget": frozenset({"answers", "distractors"}), "text": frozenset({"answers"})}


def seen(lm: LM, sets: dict[str, Asked] | None = None) -> View:
    sets = sets or SETS
    return observe(lm, sets, {name: READS[name] for name in sets})


@pytest.mark.parametrize("role", ["original", "retrained"])
def test_a_view_is_compared_with_any_model_that_was_asked_the_same(lm: LM, role: str):
    view, other = seen(lm), seen(LM(make_hf(seed=1), make_tokenizer(), name="other"))
    assert getattr(view.beside(**{role: other}), role) is other
    some = seen(lm, {"text": SETS["text"]})
    assert getattr(view.beside(**{role: some}), role) is some


@pytest.mark.parametrize("role", ["original", "retrained"])
def test_a_reference_of_another_benchmark_is_refused(lm: LM, role: str):
    view = seen(lm)
    fewer = replace(SETS["forget"], examples=PROBES[:1])
    longer = replace(SETS["forget"], max_new_tokens=3)
    for other in (fewer, longer):
        with pytest.raises(InvalidData, match=rf"the {role} model, 'tiny-llama', was asked another set 'forget'"):
            view.beside(**{role: seen(lm, {**SETS, "forget": other})})
    with pytest.raises(InvalidData, match="was asked none of the sets forget, text: it is of another benchmark"):
        view.beside(**{role: View("elsewhere", {})})


@pytest.mark.parametrize("part", ["answers", "distractors", "text"])
def test_a_reference_of_another_tokenizer_is_refused(lm: LM, part: str):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens({"answers": "w10w11", "distractors": "w9w8", "text": "w18w19"}[part])
    joined = {"answers": ("w10 w11", "w10w11"), "distractors": ("w9 w8", "w9w8"), "text": ("w18 w19", "w18w19")}[part]
    tokenizer.backend_tokenizer.normalizer = _replace(*joined)
    model = make_hf()
    model.resize_token_embeddings(len(tokenizer))
    with pytest.raises(
        InvalidData, match=r"'other', has \w+ of other lengths in set '\w+': it is of another tokenizer"
    ):
        seen(lm).beside(retrained=seen(LM(model, tokenizer, name="other")))


def _replace(old: str, new: str) -> object:
    from tokenizers import normalizers

    return normalizers.Replace(old, new)
