"""What comes to the adapters of a patch while it is on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations import stream
from ..lm import LM, Context, EditFn, Site
from ..tracking import Progress
from .adapter import AdapterPatch
from .base import Switch

Inputs = Mapping[Site, Float[Tensor, "n d"]]
"""By the site of an adapter, what came to it."""
N_INPUTS = 1024


def inputs_of(
    patch: AdapterPatch,
    lm: LM,
    texts: Sequence[Sequence[int]],
    *,
    n: int = N_INPUTS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[Site, Float[Tensor, "n d"]]:
    """What comes to each adapter on content tokens of encoded texts, at most ``n`` of them, at random.

    They are activations of the texts themselves, where a Gram matrix holds their second moments alone.
    Raises EmptyData where there is no text.
    """
    found: dict[Site, list[Tensor]] = {site: [] for site in patch.adapters}
    hear_inputs(patch, lm, texts, lambda site, x: found[site].append(x.float().cpu()), progress=progress)
    rows = {site: torch.cat(parts) for site, parts in found.items()}
    total = len(next(iter(rows.values())))
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n]
    return {site: x[chosen] for site, x in rows.items()}


def hear_inputs(
    patch: AdapterPatch,
    lm: LM,
    texts: Sequence[Sequence[int]],
    hear: Callable[[Site, Float[Tensor, "n d"]], object],
    *,
    progress: Progress | None = None,
) -> None:
    """Tells ``hear`` what comes to each adapter on the content tokens of encoded texts, batch by batch."""

    def hearing(site: Site, edit: EditFn) -> EditFn:
        def fn(x: Tensor, context: Context) -> Tensor:
            hear(site, x[context.tokens])
            return edit(x, context)

        return fn

    edits = patch.edits(lm, Switch())
    edits |= {site: hearing(site, edits[site]) for site in patch.adapters}
    with lm.edit(edits):
        for _ in stream(lm, [max(patch.adapters)], texts, progress=progress):
            pass
