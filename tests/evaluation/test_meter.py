"""What work costs is counted as it is done, and counting leaves nothing behind."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import n_hooks

from concept_unlearn.evaluation.meter import Meter, metered


def test_tokens_are_those_that_went_in(lm, ids):
    with metered(lm) as meter:
        with torch.no_grad():
            lm.logits(ids)
        lm.logits(ids[:, :4])
        lm.model(ids[:1])
    assert meter.forward_tokens == ids.numel() + 2 * 4 + ids.shape[1]
    assert meter.backward_tokens == 2 * 4 + ids.shape[1]


def test_time_is_of_the_block(lm):
    with metered(lm) as meter:
        time.sleep(0.1)
    assert 0.1 <= meter.seconds < 5
    assert meter.cpu_seconds < meter.seconds


def test_memory_is_what_the_block_took_at_most(lm):
    with metered(lm) as meter:
        block = torch.ones(64, 2**20 // 4)  # 64 MiB, written to
        time.sleep(0.4)
        del block
    assert meter.peak_mb > 48


def test_an_exception_leaves_no_hook(lm):
    before = n_hooks(lm.model)
    with pytest.raises(KeyError), metered(lm) as meter:
        raise KeyError
    assert n_hooks(lm.model) == before
    assert meter.seconds > 0


def test_what_came_before_counts_too_but_memory_is_the_larger():
    first, then = Meter(1.0, 2.0, 30.0, 4, 5), Meter(10.0, 20.0, 3.0, 40, 50)
    assert then.after(first) == Meter(11.0, 22.0, 30.0, 44, 55)
