"""Metrics of what a real, tiny model was observed to do, against the plain way."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import words

from concept_unlearn.data.examples import Passage, Probe
from concept_unlearn.evaluation.benchmark import reads_of
from concept_unlearn.evaluation.metrics import (
    ExactMemorisation,
    ExtractionStrength,
    MembershipAUC,
    Perplexity,
    Probability,
    Rouge,
    membership_scores,
)
from concept_unlearn.evaluation.observe import observe
from concept_unlearn.evaluation.question import encode_probe
from concept_unlearn.evaluation.view import Asked, View


def look(lm, examples, *metrics, name="forget") -> View:
    return observe(lm, {name: Asked(tuple(examples), max_new_tokens=8)}, reads_of(metrics))


@pytest.mark.parametrize("chat", [True, False])
def test_probability_is_exp_of_minus_the_loss_of_hugging_face(lm, chat):
    probe = Probe(prompt=words(7, 8, 9), answers=(words(20, 21, 22),), chat=chat)
    prompt, answer = (
        encode_probe(lm, probe).prompt,
        [20, 21, 22, *([lm.tokenizer.convert_tokens_to_ids("w5")] if chat else [])],
    )
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        loss = lm.model(input_ids=ids, labels=labels).loss
    assert Probability()(look(lm, [probe], Probability())).value == pytest.approx(math.exp(-loss), rel=1e-5)


def written(lm, ids: list[int], n: int) -> list[int]:
    return lm.generate_ids([ids], max_new_tokens=n, batch_size=1)[0]


def told(lm, start: int, change: int | None = None, n: int = 6) -> tuple[Probe, list[int], list[int]] | None:
    """An answer that the model gives itself, but for one word; none where it stops early."""
    prompt = lm.encode(words(start, start + 1), chat=False)
    answer = written(lm, prompt, n)
    if change is not None:
        answer = [*answer[:change], 7 + start % 40]
        answer += written(lm, [*prompt, *answer], n - change - 1) if change < n - 1 else []
    if len(answer) < n or min(answer) < 4:
        return None
    return Probe(prompt=words(start, start + 1), answers=(words(*answer),)), prompt, answer


@pytest.mark.parametrize("change", [None, 0, 2, 4])
def test_extraction_strength_is_what_greedy_generation_says(lm, change):
    strengths = []
    for probe, prompt, answer in filter(None, (told(lm, start, change) for start in range(8, 40))):
        n = len(answer)
        k = next(k for k in range(n + 1) if k == n or written(lm, [*prompt, *answer[:k]], n - k) == answer[k:])
        view = look(lm, [probe], ExtractionStrength(), ExactMemorisation())
        strengths.append(ExtractionStrength()(view).value)
        assert strengths[-1] == pytest.approx(1 - k / n)
        assert strengths[-1] <= ExactMemorisation()(view).value
    assert len(strengths) >= 5
    assert max(strengths) == pytest.approx(1 if change is None else 1 - (change + 1) / 6)


def test_an_answer_that_the_model_gives_itself_is_memorised_whole(lm):
    probe, *_ = next(filter(None, (told(lm, start) for start in range(8, 40))))
    view = look(lm, [probe], ExtractionStrength(), ExactMemorisation(), Rouge())
    assert ExtractionStrength()(view).value == ExactMemorisation()(view).value == 1
    assert Rouge()(view).value == 1


def test_memorisation_does_not_ask_for_the_end_of_a_chat_reply_and_a_peer_agrees_there(lm):
    probe = Probe(prompt=words(9), answers=(words(20, 21),), chat=True)
    view = look(lm, [probe], ExtractionStrength())
    (found,) = view["forget"].answers[0]
    assert (found.n, found.n_end) == (3, 1)
    assert ExactMemorisation()(view) == ExactMemorisation(compat="open-unlearning")(view)


def test_perplexity_of_a_passage_is_exp_of_its_loss_and_a_uniform_model_has_the_vocabulary(lm):
    text = words(*range(8, 20))
    ids = torch.tensor([lm.encode(text, chat=False)])
    with torch.no_grad():
        loss = lm.model(input_ids=ids, labels=ids).loss
    assert Perplexity()(look(lm, [Passage(text=text)], Perplexity())).value == pytest.approx(math.exp(loss), rel=1e-5)
    with torch.no_grad():
        lm.model.lm_head.weight.zero_()
    assert Perplexity()(look(lm, [Passage(text=text)], Perplexity())).value == pytest.approx(48, rel=1e-5)


def test_moments_are_of_the_models_own_distribution_at_each_token(lm):
    probe = Probe(prompt=words(7, 8), answers=(words(20, 21),))
    metric = MembershipAUC(attack="min_k_plus_plus", k=1.0, others="forget")
    found = membership_scores(look(lm, [probe], metric)["forget"], "min_k_plus_plus", k=1.0)
    ids = torch.tensor([[*lm.encode(probe.prompt, chat=False), 20, 21]])
    with torch.no_grad():
        logs = lm.model(input_ids=ids).logits[0, -3:-1].double().log_softmax(-1)
    mu = (logs.exp() * logs).sum(-1)
    sigma = ((logs.exp() * logs.square()).sum(-1) - mu.square()).sqrt()
    wanted = (logs[[0, 1], [20, 21]] - mu) / sigma
    assert found == pytest.approx([-float(wanted.mean())], rel=1e-4)


def test_gradnorm_is_the_size_of_the_gradient_and_leaves_no_trace(lm):
    probe = Probe(prompt=words(7, 8), answers=(words(20, 21),), chat=False)
    metric = MembershipAUC(attack="gradnorm", others="forget")
    view = look(lm, [probe], metric)["forget"]
    assert all(p.grad is None for p in lm.model.parameters())
    ids = torch.tensor([[*lm.encode(probe.prompt, chat=False), 20, 21]])
    labels = ids.clone()
    labels[:, :-2] = -100
    lm.model(input_ids=ids, labels=labels).loss.backward()
    norms = torch.stack([p.grad.norm() for p in lm.model.parameters()])
    assert membership_scores(view, "gradnorm", norm="mean") == pytest.approx([float(norms.mean())], rel=1e-4)
    assert membership_scores(view, "gradnorm", norm="global") == pytest.approx([float(norms.norm())], rel=1e-4)
