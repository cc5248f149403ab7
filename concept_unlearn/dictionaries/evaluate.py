"""How good a dictionary is, on text that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..component import Frozen
from ..errors import DictionaryMismatch, EmptyData
from ..lm import LM, Context
from ..tracking import Progress
from .base import Dictionary, check_width


class Quality(Frozen):
    """Of one dictionary on one text."""

    variance_explained: float
    """1 - sum |x - y|^2 / sum |x - mean x|^2 over content tokens, sinks left out."""
    l0: float
    """Features that fire on a token."""
    dead: float
    """Share of features that fire on no token."""
    loss: float
    """Nats a token of the model as it is."""
    loss_spliced: float
    """With the site replaced by its reconstruction, sinks kept."""
    loss_zeroed: float
    loss_recovered: float
    """(zeroed - spliced) / (zeroed - model)."""
    n_tokens: int


@torch.no_grad()
def evaluate_dictionary(
    lm: LM,
    dictionary: Dictionary,
    texts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Quality:
    """Three passes over encoded ``texts``: the model as it is, with the reconstruction, with nothing at the site.

    ``progress`` hears of texts, three times. Raises EmptyData where no token is left, DictionaryMismatch for a
    dictionary of another width and for a transcoder.
    """
    if dictionary.site_out != dictionary.site:
        raise DictionaryMismatch(
            f"{dictionary.name} writes {dictionary.site_out}: it cannot stand in for {dictionary.site}"
        )
    dictionary = dictionary.to(lm.device)
    sums = _Sums(dictionary)
    losses = [_loss(lm, dictionary, how, texts, batch_size, progress) for how in (sums.see, sums.splice, _zero)]
    if not sums.n:
        raise EmptyData("no token was left to evaluate the dictionary on")
    plain, spliced, zeroed = losses
    return Quality(
        variance_explained=1 - sums.missed / float((sums.squares - sums.total.square() / sums.n).sum()),
        l0=sums.active / sums.n,
        dead=float((sums.fired == 0).float().mean()),
        loss=plain,
        loss_spliced=spliced,
        loss_zeroed=zeroed,
        loss_recovered=(zeroed - spliced) / (zeroed - plain),
        n_tokens=sums.n,
    )


class _Sums:
    def __init__(self, dictionary: Dictionary) -> None:
        self._dictionary = dictionary
        self.n, self.missed, self.active = 0, 0.0, 0.0
        self.fired = torch.zeros(dictionary.n_features)
        self.total = torch.zeros(dictionary.d_in, dtype=torch.float64)
        self.squares = torch.zeros(dictionary.d_in, dtype=torch.float64)

    def see(self, x: Float[Tensor, "tokens d"]) -> Tensor:
        check_width(self._dictionary, x)
        acts = self._dictionary.encode(x)
        wide = x.double()
        self.n += len(x)
        self.missed += float((x - self._dictionary.decode(acts, x)).double().square().sum())
        self.active += float((acts > 0).sum())
        self.fired += (acts > 0).sum(0).cpu()
        self.total += wide.sum(0).cpu()
        self.squares += wide.square().sum(0).cpu()
        return x

    def splice(self, x: Float[Tensor, "tokens d"]) -> Tensor:
        return self._dictionary.decode(self._dictionary.encode(x), x)


def _zero(x: Float[Tensor, "tokens d"]) -> Tensor:
    return torch.zeros_like(x)


def _loss(
    lm: LM,
    dictionary: Dictionary,
    how: Callable[[Tensor], Tensor],
    texts: Sequence[Sequence[int]],
    batch_size: int,
    progress: Progress | None,
) -> float:
    """Nats a token with the dictionary's site edited by ``how``, on content tokens that are no sinks."""

    def edit(x: Tensor, context: Context) -> Tensor:
        tokens = context.tokens & (x.float().norm(dim=-1) <= dictionary.max_norm)
        y = x.clone()
        y[tokens] = how(x[tokens].float()).to(x.dtype)
        return y

    with lm.edit({dictionary.site: edit}):
        scored = lm.score_texts(texts, batch_size=batch_size, progress=progress)
    return -float(sum(s.logprobs.double().sum() for s in scored)) / sum(len(s.logprobs) for s in scored)
