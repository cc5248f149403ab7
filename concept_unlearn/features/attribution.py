"""The effect of each feature on the answers to be forgotten, by one backward pass a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.encode import encode_answer, encode_text, pad
from ..data.scope import Scope
from ..dictionaries import Dictionary, Slice
from ..errors import NonFinite
from ..lm import LM, Context
from ..tracking import Progress
from .stats import Stats


def attribute(
    lm: LM,
    dictionary: Dictionary,
    scope: Scope,
    stats: Stats,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Stats:
    """``stats`` with sum_t a_i(t) (W_dec[i] . d log p / d x(t)) / n, the first-order effect of the feature on
    the log-probability of an answer, averaged over answers: those of the easy probes, or without probes the
    second halves of the forget passages.
    """
    rows = _questions(lm, scope)
    dictionary = dictionary.to(lm.device)
    whole = dictionary.slice(range(dictionary.n_features))
    total = torch.zeros(dictionary.n_features, dtype=torch.float64)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        total += _attribute_batch(lm, whole, batch).double().cpu()
        if progress:
            progress(len(batch))
    if not total.isfinite().all():
        raise NonFinite(f"attribution at {dictionary.site} is not finite")
    return replace(stats, attribution=(total / len(rows)).float())


def _questions(lm: LM, scope: Scope) -> list[tuple[list[int], list[int]]]:
    if scope.in_easy:
        return [
            (lm.encode(p.prompt, chat=p.chat), encode_answer(lm.tokenizer, p.answers[0], after_space=not p.chat))
            for p in scope.in_easy
        ]
    texts = [encode_text(lm.tokenizer, p.text, p.prompt) for p in scope.forget]
    return [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in texts if len(ids) >= 2]


def _attribute_batch(lm: LM, whole: Slice, batch: list[tuple[list[int], list[int]]]) -> Float[Tensor, " n_features"]:
    ids, mask = pad([prompt + answer for prompt, answer in batch], side="right", device=lm.device)
    written: list[Tensor] = []

    def hold(x: Tensor, _: Context) -> Tensor:
        written.append(x.detach().requires_grad_())
        return written[-1]

    with torch.enable_grad(), lm.read(whole.site) as read, lm.edit({whole.site_out: hold}):
        logprobs = lm.logits(ids, mask)[:, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        is_answer = torch.zeros_like(chosen, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(batch):
            is_answer[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
        (gradient,) = torch.autograd.grad(chosen[is_answer].sum(), written)
    x = read[whole.site].detach()
    content = mask & (x.float().norm(dim=-1) <= whole.max_norm)
    if lm.bos_id is not None:
        content &= ids != lm.bos_id
    acts, scale = whole.encode(x[content])
    effect = acts * (gradient[content].float() @ whole.W_dec.T)
    return (effect if scale is None else effect * scale).sum(0)
