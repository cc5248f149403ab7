"""Token by token, it is the text that the model writes in one go."""

from __future__ import annotations

import pytest
from conftest import make_perfect_sae, n_hooks, words

from concept_unlearn.dictionaries import as_dictionary
from concept_unlearn.edits import Clamp
from concept_unlearn.errors import InvalidData
from concept_unlearn.gates import SequenceGate
from concept_unlearn.patches import FeaturePatch, Stack
from concept_unlearn.ui.stream import Spelling, stream

PROMPT = words(36, 12, 37, 9)


def ids_of(lm, prompt, **settings):
    return [step.id for step in stream(lm, prompt, max_new_tokens=24, **settings)]


@pytest.fixture(params=["none", "clamp", "gate"])
def patch(request):
    if request.param == "none":
        return Stack(())
    gate = SequenceGate(above=0.1) if request.param == "gate" else "always"
    return FeaturePatch(dictionary=as_dictionary(make_perfect_sae()), features=range(6), edit=Clamp(to=-4.0), gate=gate)


def test_a_stream_is_what_generate_writes_patched_or_not(any_lm, patch):
    prompt = any_lm.encode(PROMPT, chat=True)
    with patch.on(any_lm):
        want = any_lm.generate_ids([prompt], max_new_tokens=24)[0]
        assert ids_of(any_lm, prompt) == want
    assert want


def test_a_stream_that_is_left_in_the_middle_leaves_no_hook(lm, patch):
    prompt = lm.encode(PROMPT, chat=True)
    with patch.on(lm):
        next(stream(lm, prompt, max_new_tokens=24))
    assert n_hooks(lm.model) == 0


def test_a_seed_draws_the_same_text_again(lm):
    prompt = lm.encode(PROMPT, chat=True)
    drawn = [ids_of(lm, prompt, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stream_ends_where_the_model_can_read_no_more(lm):
    assert len(list(stream(lm, [7] * 250, max_new_tokens=50))) <= 6
    with pytest.raises(InvalidData, match="256"):
        next(stream(lm, [7] * 256, max_new_tokens=1))


class Bytes:
    """A tokenizer whose tokens are single bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


def test_half_a_character_waits_for_its_other_half():
    spelling = Spelling(Bytes())
    assert [spelling(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert spelling("é".encode()[0]) == ""
    assert spelling.rest() == "\N{REPLACEMENT CHARACTER}"
