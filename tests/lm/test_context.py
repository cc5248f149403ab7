"""What a gate may read of a pass: the text, without what every chat begins with, however the passes cut it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from concept_unlearn.lm.context import Context, Memory

HEAD = [1, 7, 8, 1, 9]
BOS, PAD = 1, 0
ROWS = {
    "chat": ([1, 7, 8, 1, 9, 5, 6, 7], [5, 6, 7]),
    "strays in the head": ([1, 7, 5, 1, 9, 5, 6, 7], [5, 9, 5, 6, 7]),
    "plain": ([5, 6, 7, 8, 9, 5, 6, 7], [5, 6, 7, 8, 9, 5, 6, 7]),
    "padded chat": ([0, 0, 1, 7, 8, 1, 9, 5], [5]),
    "padded plain": ([0, 0, 0, 0, 9, 5, 6, 7], [9, 5, 6, 7]),
    "the head alone": ([0, 0, 0, 1, 7, 8, 1, 9], []),
}


def text(ids, cuts):
    """The mask of the whole, read in passes that end at ``cuts``."""
    memory, found = Memory(), []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part = ids[:, start:end]
        real = part != PAD
        found.append(Context(real & (part != BOS), real, memory, real, part, HEAD).text)
    return torch.cat(found, dim=1)


@given(st.lists(st.integers(1, 7), unique=True).map(sorted))
def test_the_head_of_a_chat_is_left_out_however_the_passes_cut_it(cuts):
    ids = torch.tensor([row for row, _ in ROWS.values()])
    found = text(ids, cuts)
    for (name, (_, want)), row, mask in zip(ROWS.items(), ids, found, strict=True):
        assert row[mask].tolist() == want, name


def test_without_ids_all_content_is_text():
    real = torch.ones(2, 4, dtype=torch.bool)
    assert Context(real, real, Memory(), real, None, HEAD).text.all()


def test_a_patch_that_came_in_mid_sequence_reads_everything():
    memory = Memory()
    memory.clear(3)
    ids = torch.tensor([HEAD])
    real = torch.ones_like(ids, dtype=torch.bool)
    assert Context(real, real, memory, real, ids, HEAD).text.all()
