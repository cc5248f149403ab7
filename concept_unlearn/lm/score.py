"""How likely a model finds given answers and given text; each prompt is read once for all its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..data.encode import Padded, pad
from ..tracking import Progress
from .context import answering
from .forward import forward, log_softmax, new_cache


class Scored(NamedTuple):
    """One answer's tokens under the model."""

    logprobs: Float[Tensor, " answer"]
    greedy: Bool[Tensor, " answer"]
    """True where the token is the model's first choice after the prompt and the answer's earlier tokens."""


def score_answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    device: torch.device,
    batch_size: int,
    progress: Progress | None = None,
) -> list[list[Scored]]:
    """``answers[i]`` are the candidates of ``prompts[i]``. Rows of a batch are answers, at least one prompt's."""
    results: list[list[Scored]] = [[] for _ in prompts]
    for batch in _by_length([len(p) for p in prompts], [len(a) for a in answers], batch_size):
        scored = _score_batch(model, [prompts[i] for i in batch], [answers[i] for i in batch], device)
        for i, group in zip(batch, scored, strict=True):
            results[i] = group
        if progress:
            progress(len(batch))
    return results


def score_texts(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    *,
    device: torch.device,
    batch_size: int,
    progress: Progress | None = None,
) -> list[Scored]:
    """Every token but the first of each text, which has nothing to its left."""
    results: list[Scored | None] = [None] * len(texts)
    for batch in _by_length([len(t) for t in texts], [1] * len(texts), batch_size):
        ids, mask = pad([texts[i] for i in batch], side="right", device=device)
        logits = forward(model, ids, mask).logits
        for row, i in enumerate(batch):
            n = len(texts[i])
            results[i] = _read(log_softmax(logits[row, : n - 1]), ids[row, 1:n])
        if progress:
            progress(len(batch))
    return [r for r in results if r is not None]


def _score_batch(
    model: nn.Module, prompts: list[Sequence[int]], answers: list[Sequence[Sequence[int]]], device: torch.device
) -> list[list[Scored]]:
    owner = torch.tensor([i for i, group in enumerate(answers) for _ in group], device=device)
    flat = [answer for group in answers for answer in group]
    cache = new_cache(model, len(flat))
    shares_prefix = hasattr(cache, "batch_select_indices")
    rows = prompts if shares_prefix else [prompts[i] for i in owner.tolist()]
    prompt = pad(rows, side="left", device=device)
    first = log_softmax(forward(model, prompt.ids, prompt.mask, cache=cache, keep=1).logits[:, 0])
    if shares_prefix:
        first = first[owner]
    rest = _score_rest(model, cache, prompt, owner if shares_prefix else None, flat, device)
    scored = []
    for row, answer in enumerate(flat):
        logprobs = first[row : row + 1] if rest is None else torch.cat([first[row : row + 1], rest[row]])
        scored.append(_read(logprobs[: len(answer)], torch.tensor(answer, device=device)))
    groups = iter(scored)
    return [[next(groups) for _ in group] for group in answers]


def _score_rest(
    model: nn.Module,
    cache: Any,
    prompt: Padded,
    owner: Tensor | None,
    answers: list[Sequence[int]],
    device: torch.device,
) -> Float[Tensor, "answers longest-1 vocab"] | None:
    """Log-probabilities after the first answer token and on; None where every answer is a single token."""
    if max(map(len, answers)) == 1:
        return None
    if owner is not None:
        cache.batch_select_indices(owner)
    mask = prompt.mask if owner is None else prompt.mask[owner]
    answer = pad([a[:-1] or a for a in answers], side="right", device=device)
    with answering():
        return log_softmax(forward(model, answer.ids, torch.cat([mask, answer.mask], 1), cache=cache).logits)


def _read(logprobs: Float[Tensor, "n vocab"], ids: Tensor) -> Scored:
    chosen = logprobs.gather(-1, ids[:, None])[:, 0]
    return Scored(chosen.cpu(), (logprobs.argmax(-1) == ids).cpu())


def _by_length(lengths: Sequence[int], rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each of at most ``batch_size`` rows if it can be."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if rows[i] > room or not batches:
            batches.append([])
            room = batch_size
        batches[-1].append(i)
        room -= rows[i]
    return batches
