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
from .locate import is_hooked, root, text_config


class Scored(NamedTuple):
    """One answer's tokens under the model."""

    logprobs: Float[Tensor, " answer"]
    greedy: Bool[Tensor, " answer"]
    """True where the token is the model's first choice after the prompt and the answer's earlier tokens."""
    mean: Float[Tensor, " answer"] | None = None
    """Of the log-probability of a token drawn from the model itself: sum p log p."""
    std: Float[Tensor, " answer"] | None = None
    """The square root of sum p log^2 p - mean^2, at least 1e-3."""


_MIN_VARIANCE = 1e-6
_MAX_LOGITS = 2**28
"""Logits of one pass, however many rows would be allowed: 1 GB in float32."""


def score_answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    device: torch.device,
    batch_size: int,
    moments: bool = False,
    progress: Progress | None = None,
) -> list[list[Scored]]:
    """``answers[i]`` are the candidates of ``prompts[i]``. Rows of a batch are answers, at least one prompt's."""
    results: list[list[Scored]] = [[] for _ in prompts]
    for batch in answer_batches(model, prompts, answers, batch_size):
        scored = _score_batch(model, [prompts[i] for i in batch], [answers[i] for i in batch], device, moments)
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
    moments: bool = False,
    progress: Progress | None = None,
) -> list[Scored]:
    """Every token but the first of each text, which has nothing to its left."""
    results: list[Scored | None] = [None] * len(texts)
    for batch in text_batches(model, texts, batch_size):
        ids, mask = pad([texts[i] for i in batch], side="right", device=device)
        logits = forward(model, ids, mask).logits
        for row, i in enumerate(batch):
            n = len(texts[i])
            results[i] = _read(logits[row, : n - 1], ids[row, 1:n], moments)
        if progress:
            progress(len(batch))
    return [r for r in results if r is not None]


def answer_batches(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
) -> list[list[int]]:
    """Which prompts are scored together: answers of like length, since they cost most, then prompts."""
    longest = [max(map(len, group), default=0) for group in answers]
    keys = [(n, len(p)) for n, p in zip(longest, prompts, strict=True)]
    return _batches(keys, [len(a) for a in answers], longest, batch_size, _vocabulary(model))


def text_batches(model: nn.Module, texts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Which texts are scored together."""
    lengths = [len(t) for t in texts]
    return _batches([(n, 0) for n in lengths], [1] * len(texts), lengths, batch_size, _vocabulary(model))


def _vocabulary(model: nn.Module) -> int:
    base = root(model)
    config: Any = base.cfg if is_hooked(base) else text_config(base)
    return int(config.d_vocab if is_hooked(base) else config.vocab_size)


def _score_batch(
    model: nn.Module,
    prompts: list[Sequence[int]],
    answers: list[Sequence[Sequence[int]]],
    device: torch.device,
    moments: bool,
) -> list[list[Scored]]:
    owner = torch.tensor([i for i, group in enumerate(answers) for _ in group], device=device)
    flat = [answer for group in answers for answer in group]
    cache = new_cache(model, len(flat))
    shares_prefix = hasattr(cache, "batch_select_indices")
    rows = prompts if shares_prefix else [prompts[i] for i in owner.tolist()]
    prompt = pad(rows, side="left", device=device)
    first = forward(model, prompt.ids, prompt.mask, cache=cache, keep=1).logits[:, 0]
    if shares_prefix:
        first = first[owner]
    rest = _score_rest(model, cache, prompt, owner if shares_prefix else None, flat, device)
    scored = []
    for row, answer in enumerate(flat):
        logits = first[row : row + 1]
        if rest is not None:
            logits = torch.cat([logits, rest[row, : len(answer) - 1]])
        scored.append(_read(logits, torch.tensor(answer, device=device), moments))
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
    """Logits after the first answer token and on; None where every answer is a single token."""
    if max(map(len, answers)) == 1:
        return None
    if owner is not None:
        cache.batch_select_indices(owner)
    mask = prompt.mask if owner is None else prompt.mask[owner]
    answer = pad([a[:-1] or a for a in answers], side="right", device=device)
    with answering():
        return forward(model, answer.ids, torch.cat([mask, answer.mask], 1), cache=cache).logits


def _read(logits: Float[Tensor, "n vocab"], ids: Tensor, moments: bool) -> Scored:
    logprobs = log_softmax(logits)
    chosen, greedy = logprobs.gather(-1, ids[:, None])[:, 0].cpu(), (logprobs.argmax(-1) == ids).cpu()
    if not moments:
        return Scored(chosen, greedy)
    p = logprobs.exp()
    mean = torch.xlogy(p, p).sum(-1)  # 0 where p is 0, however far below the logarithm is
    square = (p * logprobs.clamp(min=-1e4).square()).sum(-1)
    return Scored(chosen, greedy, mean.cpu(), (square - mean.square()).clamp(min=_MIN_VARIANCE).sqrt().cpu())


def _batches(
    keys: Sequence[tuple[int, int]], rows: Sequence[int], lengths: Sequence[int], batch_size: int, vocabulary: int
) -> list[list[int]]:
    """Indices in batches of like ``keys``, largest first, each of at most ``batch_size`` rows if it can be."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(keys)), key=lambda i: (-keys[i][0], -keys[i][1], i)):
        if rows[i] > room or not batches:
            batches.append([])
            room = max(min(batch_size, _MAX_LOGITS // (max(lengths[i], 1) * vocabulary)), 1)
        batches[-1].append(i)
        room -= rows[i]
    return batches
