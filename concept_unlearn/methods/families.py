"""Many tokens to few classes: what an answer begins with, what a refusal begins with (BAR, arXiv 2007.08714).

    h_j = mean_{s in S_j} F_s,    loss = -sum_j omega_j (1 - h_j)^g y_j log h_j

F_s is the probability of token s, S_j the tokens of class j, no token in two classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import EmptyData, InvalidConfig

_TOP = 30
"""Labels of an example that take part in the frequency mapping."""


def check_families(families: Mapping[str, Sequence[int]]) -> None:
    """Raises EmptyData or InvalidConfig, which name the family and the token."""
    owner: dict[int, str] = {}
    for name, tokens in families.items():
        if not tokens:
            raise EmptyData(f"the family of {name} tokens is empty: there is nothing to tell the classes apart by")
        for token in tokens:
            if owner.setdefault(token, name) != name:
                raise InvalidConfig(
                    f"token {token} is in the families of both {owner[token]} and {name} tokens, which must be "
                    'disjoint: mapping="frequency" gives it to the one that wants it more'
                )


def map_labels(
    F: Float[Tensor, "n vocab"], families: Sequence[Sequence[int]], *, normalise: bool = False
) -> Float[Tensor, "n classes"]:
    """h, which need not sum to 1 over the classes; ``normalise`` makes it."""
    h = torch.stack([F[:, list(tokens)].mean(1) for tokens in families], dim=1)
    return h / h.sum(1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny) if normalise else h


def frequency_mapping(scores: Sequence[Float[Tensor, "n vocab"]], m: int, *, top: int = _TOP) -> list[tuple[int, ...]]:
    """The m tokens of each class that the model itself, unmodified, says most on data of the class: ``scores[j]``.

    Each example's scores of its ``top`` tokens are averaged and ranked. A token that several classes want goes to the
    one that ranks it highest, at equal ranks to the one that scores it higher. Raises InvalidConfig for too few.
    """
    means = torch.stack([_of_top(rows, top).mean(0) for rows in scores])
    order = means.argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1)
    wants = means > 0
    found = []
    for j, ranked in enumerate(order.tolist()):
        own = [s for s in ranked if wants[j, s] and _owner(s, ranks, means, wants) == j]
        if len(own) < m:
            raise InvalidConfig(f"class {j} has {len(own)} tokens that no other class wants more; asked for {m}")
        found.append(tuple(own[:m]))
    return found


def focal(
    h: Float[Tensor, "n classes"],
    label: Int[Tensor, " n"],
    *,
    g: float = 2.0,
    omega: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, " n"]:
    """One loss an example; g = 0 is cross-entropy. omega_j = 1 / n_j evens out classes of n_j examples."""
    own = h.gather(1, label[:, None])[:, 0]
    loss = -((1 - own) ** g) * own.clamp(min=torch.finfo(h.dtype).tiny).log()
    return loss if omega is None else omega[label] * loss


def _of_top(rows: Float[Tensor, "n vocab"], top: int) -> Float[Tensor, "n vocab"]:
    best = rows.topk(min(top, rows.shape[1]), dim=1)
    return torch.zeros_like(rows).scatter(1, best.indices, best.values)


def _owner(token: int, ranks: Tensor, means: Tensor, wants: Tensor) -> int:
    classes = [j for j in range(len(ranks)) if wants[j, token]]
    return min(classes, key=lambda j: (int(ranks[j, token]), -float(means[j, token]), j))
