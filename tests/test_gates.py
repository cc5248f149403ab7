"""A gate decides the same in one pass, in steps, in a batch and padded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concept_unlearn.errors import EmptyData, InvalidConfig
from concept_unlearn.gates import (
    Always,
    Gate,
    ProbeGate,
    SequenceGate,
    Signal,
    StreamingGate,
    TokenGate,
    conformal_threshold,
)
from concept_unlearn.lm.context import Memory

HOT = [1, 0, 1, 1, 0, 0, 0, 1]


def signal(hot, *, tokens=None, prompt=None):
    acts = torch.tensor(hot, dtype=torch.float32)[None, :, None]
    everywhere = torch.ones(1, acts.shape[1], dtype=torch.bool)
    return Signal(
        acts,
        everywhere if tokens is None else torch.tensor([tokens], dtype=torch.bool),
        everywhere if prompt is None else torch.tensor([prompt], dtype=torch.bool),
    )


def decide(gate: Gate, hot, **masks):
    return gate(signal(hot, **masks), Memory())[0].tolist()


def test_always_and_token_gates():
    assert decide(Always(), HOT) == [True] * 8
    assert decide(TokenGate(above=0.5), HOT) == [bool(h) for h in HOT]
    strong = Signal(
        torch.tensor([[[0.4, 0.4]]]), torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    )
    assert not TokenGate(above=0.5)(strong, Memory()).any()


def test_a_sequence_gate_opens_above_its_share_and_for_the_whole_sequence():
    assert decide(SequenceGate(above=0.49), HOT) == [True] * 8
    assert decide(SequenceGate(above=0.5), HOT) == [False] * 8


def test_padding_is_no_token():
    padded = [1, 1, 1, *HOT]
    tokens = [0, 0, 0, *[1] * 8]
    assert decide(SequenceGate(above=0.5), padded, tokens=tokens) == [False] * 11
    for pool in ("soft", "mean"):
        gate = ProbeGate(pool=pool).fitted(ProbeGate(pool=pool).statistic(signal(HOT)))
        assert decide(gate, padded, tokens=tokens) == [False] * 11
    assert decide(ProbeGate(above=0.9, pool="max"), [5, 0, 0], tokens=[0, 1, 1]) == [False] * 3


@pytest.mark.parametrize(
    "gate", [SequenceGate(above=0.3), *(ProbeGate(above=0.3, pool=pool) for pool in ("soft", "mean", "max"))], ids=repr
)
def test_a_prompt_gate_may_leave_the_answer_alone(gate):
    gate, memory = gate.model_copy(update={"prompt_only": True}), Memory()
    assert gate(signal([1, 0]), memory).all()
    assert not gate(signal([1], prompt=[0]), memory).any()
    assert gate(signal([0, 1], prompt=[1, 0]), memory)[0].tolist() == [True, False]
    assert not gate(signal([0, 0]), Memory()).any()


@pytest.mark.parametrize(
    "gate", [SequenceGate(above=0.3), *(ProbeGate(above=0.3, pool=pool) for pool in ("soft", "mean", "max"))], ids=repr
)
def test_a_decision_is_made_on_the_prompt_and_held(gate):
    memory = Memory()
    assert gate(signal([1, 0]), memory).all()
    answer = signal([0], prompt=[0])
    assert all(gate(answer, memory).all() for _ in range(20))
    memory = Memory()
    assert not gate(signal([0, 0]), memory).any()
    assert not any(gate(signal([1], prompt=[0]), memory).any() for _ in range(20))


def test_the_soft_pool_lies_between_the_mean_and_the_maximum_and_moves_with_the_score():
    scores = [-40.0, 3.0, 9.5, -2.0]
    mean, soft, highest = (float(ProbeGate(pool=p).statistic(signal(scores))) for p in ("mean", "soft", "max"))
    assert mean < soft < highest
    assert float(ProbeGate().statistic(signal([s + 5 for s in scores]))) == pytest.approx(soft + 5)
    assert float(ProbeGate().statistic(signal([s / 1e4 for s in scores]))) == pytest.approx(mean / 1e4, rel=1e-2)
    assert float(ProbeGate().statistic(signal([s * 1e4 for s in scores]))) == pytest.approx(highest * 1e4, rel=1e-2)
    assert soft == pytest.approx(8 * math.log(sum(math.exp(s / 8) for s in scores) / 4))


@settings(deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40))
def test_a_text_that_set_the_threshold_does_not_open_the_gate(scores):
    for empty in (SequenceGate(), StreamingGate(), ProbeGate(), ProbeGate(pool="mean"), ProbeGate(pool="max")):
        assert not any(decide(empty.fitted(empty.statistic(signal(scores))), scores))


def test_more_prompt_may_open_a_gate_and_never_close_it():
    memory = Memory()
    assert not SequenceGate(above=0.5)(signal([0, 0, 0]), memory).any()
    assert SequenceGate(above=0.5)(signal([1, 1, 1, 1]), memory).all()
    assert SequenceGate(above=0.5)(signal([0] * 50), memory).all()


def test_a_one_token_prompt_is_a_prompt():
    assert decide(SequenceGate(above=0.5), [1]) == [True]


def cusum(hot, drift):
    level, out = 0.0, []
    for h in hot:
        level = max(0.0, level + h - drift)
        out.append(level)
    return out


@settings(deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.floats(0.05, 0.9))
def test_the_streaming_level_is_the_cusum(hot, drift):
    found = StreamingGate(above=1.0, drift=drift)._cusum(signal(hot), None)[0]
    torch.testing.assert_close(found, torch.tensor(cusum(hot, drift), dtype=torch.float64), rtol=0, atol=1e-12)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1), min_size=2, max_size=30), st.data())
def test_a_streaming_gate_decides_the_same_in_steps(hot, data):
    """Prompt in one pass, then one token a pass, against everything in one pass with the prompt known."""
    width = data.draw(st.integers(1, len(hot)))
    gate = StreamingGate(above=0.7, drift=0.3)
    prompt = [i < width for i in range(len(hot))]
    assert step_by_step(gate, hot, width) == decide(gate, hot, prompt=prompt)


def test_a_level_on_the_threshold_is_not_over_it_however_it_was_summed():
    hot = [0] * 7 + [1]
    gate = StreamingGate(above=0.7, drift=0.3)
    assert not any(step_by_step(gate, hot, 1))
    assert not any(decide(gate, hot))


def step_by_step(gate, hot, width):
    memory = Memory()
    found = gate(signal(hot[:width]), memory)[0].tolist()
    for h in hot[width:]:
        found += gate(signal([h], prompt=[0]), memory)[0].tolist()
    return found


def test_filler_dilutes_the_share_and_not_the_stream():
    """The published attack: 1,600 tokens of filler."""
    concept, filler = [1] * 12, [0] * 1600
    for attacked in (concept + filler, filler + concept, filler + concept + filler):
        assert not any(decide(SequenceGate(above=0.05), attacked))
        assert all(decide(StreamingGate(above=3.0), attacked))
        assert all(decide(ProbeGate(above=0.5, pool="max"), attacked))
        assert not any(decide(ProbeGate(above=0.5, pool="mean"), attacked))
    assert not any(decide(StreamingGate(above=3.0), [1, 0, 0, 0, 0] * 200))


def test_a_cropped_cache_takes_the_streams_history_back():
    gate, memory = StreamingGate(above=1.5, drift=0.2), Memory()
    gate(signal([0, 0]), memory)
    assert gate(signal([1, 1, 1], prompt=[0, 0, 0]), memory)[0].tolist() == [False, True, True]
    memory.crop(3)
    assert gate(signal([0], prompt=[0]), memory)[0].tolist() == [False]


@pytest.mark.parametrize("gate", [SequenceGate(above=0.4), StreamingGate(above=1.0), ProbeGate(above=0.4)], ids=repr)
def test_memory_follows_the_rows_of_a_batch(gate):
    memory = Memory()
    both = Signal(torch.tensor([[[1.0], [1.0]], [[0.0], [0.0]]]), *[torch.ones(2, 2, dtype=torch.bool)] * 2)
    assert gate(both, memory)[:, 0].tolist() == [True, False]
    memory.apply(lambda rows: rows[torch.tensor([1, 0, 0])])
    step = Signal(torch.zeros(3, 1, 1), torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.bool))
    assert gate(step, memory)[:, 0].tolist() == [False, True, True]


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=60), st.floats(0.01, 0.5))
@settings(deadline=None)
def test_a_conformal_threshold_lets_at_most_alpha_of_its_own_sample_through(values, alpha):
    threshold = conformal_threshold(torch.tensor(values), alpha)
    assert sum(v > threshold for v in values) <= alpha * (len(values) + 1)
    assert threshold in torch.tensor(values).tolist()


def test_a_conformal_threshold_keeps_its_promise_on_new_draws():
    generator = torch.Generator().manual_seed(0)
    opened = [
        float(
            (torch.randn(200, generator=generator) > conformal_threshold(torch.randn(99, generator=generator), 0.05))
            .float()
            .mean()
        )
        for _ in range(200)
    ]
    assert sum(opened) / 200 == pytest.approx(0.05, abs=0.008)


def test_a_gate_without_a_threshold_says_so():
    for gate in (SequenceGate(), StreamingGate(), ProbeGate()):
        with pytest.raises(InvalidConfig, match="has no threshold yet"):
            decide(gate, HOT)
    with pytest.raises(InvalidConfig, match="no threshold to fit"):
        Always().statistic(signal(HOT))
    with pytest.raises(EmptyData):
        conformal_threshold(torch.tensor([]), 0.05)


def test_fitting_sets_a_threshold_once():
    fitted = SequenceGate(alpha=0.5).fitted(torch.arange(9.0))
    assert fitted.above == 4.0
    assert fitted.fitted(torch.zeros(3)) == fitted


WINDOWED = [ProbeGate(above=0.3, pool=pool, window=3) for pool in ("soft", "mean")]


def pooled(scores, pool):
    return float(ProbeGate(pool=pool).statistic(signal(scores)))


@settings(deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20), st.integers(1, 8))
@pytest.mark.parametrize("pool", ["soft", "mean", "max"])
def test_a_window_takes_the_highest_of_all_stretches(pool, scores, width):
    stretches = [scores[i : i + width] for i in range(max(len(scores) - width, 0) + 1)]
    found = float(ProbeGate(pool=pool, window=width).statistic(signal(scores)))
    assert found == pytest.approx(max(pooled(part, pool) for part in stretches), abs=1e-6)


@pytest.mark.parametrize("pool", ["soft", "mean"])
def test_a_window_reads_past_what_is_no_token(pool):
    scores, tokens = [9.0, -1.0, 9.0, 4.0, 9.0, 2.0, 3.0, 9.0], [0, 1, 0, 1, 0, 1, 1, 0]
    gate = ProbeGate(pool=pool, window=2)
    found = float(gate.statistic(signal(scores, tokens=tokens)))
    assert found == pytest.approx(max(pooled(part, pool) for part in ([-1.0, 4.0], [4.0, 2.0], [2.0, 3.0])), abs=1e-6)
    assert float(gate.statistic(signal(scores, tokens=[0] * 8))) == -math.inf
    assert not any(decide(gate.model_copy(update={"above": -1e9}), scores, tokens=[0] * 8))


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=24), st.integers(1, 6), st.data())
@pytest.mark.parametrize("pool", ["soft", "mean", "max"])
def test_a_window_decides_on_a_prompt_in_pieces_as_on_the_whole(pool, scores, width, data):
    """Where the first piece fills the window: a shorter one is judged by itself, like any short prompt."""
    cut = data.draw(st.integers(width, len(scores)))
    gate, memory = ProbeGate(above=1.0, pool=pool, window=width), Memory()
    for piece in (scores[:cut], scores[cut:]):
        found = gate(signal(piece), memory).any() if piece else found
    assert bool(found) == any(decide(gate, scores))


@pytest.mark.parametrize("pool", ["soft", "mean"])
def test_filler_does_not_dilute_what_a_window_reads(pool):
    concept, filler = [1] * 12, [0] * 1600
    for attacked in (concept + filler, filler + concept, filler + concept + filler):
        assert all(decide(ProbeGate(above=0.5, pool=pool, window=8), attacked))
        assert not any(decide(ProbeGate(above=0.5, pool=pool), attacked))
    assert not any(decide(ProbeGate(above=0.5, pool=pool, window=8), [1, 0, 0, 0, 0] * 200))


@pytest.mark.parametrize("gate", WINDOWED, ids=repr)
def test_what_a_window_remembers_follows_the_rows_of_a_batch(gate):
    memory = Memory()
    both = Signal(torch.tensor([[[2.0], [2.0]], [[-9.0], [-9.0]]]), *[torch.ones(2, 2, dtype=torch.bool)] * 2)
    shut = gate.model_copy(update={"above": 100.0})
    shut(both, memory)
    memory.apply(lambda rows: rows[torch.tensor([1, 0, 0])])
    step = Signal(torch.full((3, 1, 1), -3.0), *[torch.ones(3, 1, dtype=torch.bool)] * 2)
    assert gate.model_copy(update={"above": -1.5})(step, memory)[:, 0].tolist() == [False, True, True]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("pool", ["soft", "mean", "max"])
def test_a_threshold_or_score_of_any_size_is_compared(pool, window):
    """exp(1e6 / 8) is more than a float holds."""
    gate = ProbeGate(pool=pool, window=window)
    for above, is_open in ((1e6, False), (-1e6, True), (math.inf, False), (1e300, False)):
        assert decide(gate.model_copy(update={"above": above}), [3.0, -2.0, 1.0]) == [is_open] * 3
    huge = gate.model_copy(update={"above": 1e5})
    assert decide(huge, [1e7] * 3) == [True] * 3
    assert decide(huge, [-1e7] * 3) == [False] * 3
