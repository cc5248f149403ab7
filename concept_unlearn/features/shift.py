"""Which blocks' feed-forwards behave otherwise on forget text: their shift, and the blocks where it varies most.

After MoExtend (arXiv 2408.03511), which extends the half of the blocks whose routing shifted most unevenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..activations import stream
from ..data.encode import encode_text
from ..data.examples import Passage
from ..data.scope import Scope
from ..errors import InvalidConfig, SiteNotFound
from ..lm import LM, Context, Site
from ..lm.locate import find_router, locate_units, text_config
from ..tracking import Progress

_PASSAGES = 50
"""Of each kind, evenly spread over what the scope has."""


def feed_forward_shift(
    lm: LM, scope: Scope, *, layers: Iterable[int] | None = None, progress: Progress | None = None
) -> dict[int, Float[Tensor, " units"]]:
    """By block, forget text less retained text: the mean absolute activation of each hidden unit of the feed-forward,
    or the share of tokens sent to each expert of a mixture.

    Raises SiteNotFound for a block without a feed-forward.
    """
    chosen = tuple(range(lm.n_layers) if layers is None else layers)
    forget, retain = (
        _usage(lm, sampled(lm, passages, _PASSAGES), chosen, progress)
        for passages in (scope.forget, (*scope.retain, *scope.near))
    )
    return {layer: forget[layer] - retain[layer] for layer in chosen}


def most_shifted(shift: Mapping[int, Float[Tensor, " units"]], n: int | None = None) -> tuple[int, ...]:
    """The ``n`` blocks, half of them where not given, with the largest standard deviation of the shift over units."""
    n = max(len(shift) // 2, 1) if n is None else n
    if not 0 < n <= len(shift):
        raise InvalidConfig(f"n_layers is from 1 to {len(shift)}, the blocks that there are; given: {n}")
    spread = {layer: float(x.double().std(correction=0)) for layer, x in shift.items()}
    return tuple(sorted(sorted(spread, key=lambda layer: (-spread[layer], layer))[:n]))


def sampled(lm: LM, passages: Sequence[Passage], n: int) -> list[list[int]]:
    """At most ``n`` evenly spread passages, encoded."""
    kept = passages[:: max(math.ceil(len(passages) / n), 1)]
    return [encode_text(lm.tokenizer, p.text, p.prompt) for p in kept]


def routed(output: Any, top_k: int) -> tuple[Int[Tensor, "*tokens k"], int]:
    """The experts that a router's output sends each token to, those of the ``top_k`` largest logits, and how many
    there are.
    """
    parts = output if isinstance(output, tuple) else (output,)
    tensors = [t for t in parts if isinstance(t, Tensor)]
    logits = [t for t in tensors if t.is_floating_point() and t.ndim > 1]
    if not logits:
        raise SiteNotFound("a router gave no logits to read")
    chosen = [t for t in tensors if not t.is_floating_point()]
    return chosen[-1] if chosen else logits[0].topk(top_k, dim=-1, largest=True).indices, logits[0].shape[-1]


def _usage(
    lm: LM, texts: Sequence[Sequence[int]], layers: Sequence[int], progress: Progress | None
) -> dict[int, Float[Tensor, " units"]]:
    """The mean over content tokens."""
    taps = {layer: _Tap(lm, layer) for layer in layers}
    with ExitStack() as stack:
        stack.enter_context(lm.edit({Site("mlp_in", layer): tap.begin for layer, tap in taps.items()}))
        for tap in taps.values():
            stack.callback(tap.hook().remove)
        for _ in stream(lm, [Site("mlp_out", max(layers))], texts, progress=progress):
            pass
    return {layer: tap.total / tap.n_tokens for layer, tap in taps.items()}


class _Tap:
    """Sums what one block's feed-forward does, token by token."""

    def __init__(self, lm: LM, layer: int) -> None:
        self.total: Any = 0.0
        self.n_tokens = 0
        self._context: Context | None = None
        self._router = find_router(lm.model, layer)
        self._units = None if self._router else locate_units(lm.model, layer)
        config: Any = text_config(lm.model) if self._router else None
        self._top_k = int(getattr(config, "num_experts_per_tok", 1) or 1)

    def begin(self, x: Tensor, context: Context) -> Tensor:
        self._context = context
        return x

    def hook(self) -> Any:
        if self._router is not None:
            return self._router.register_forward_hook(lambda _, __, output: self._add_routes(output))
        assert self._units is not None
        if self._units.side == "in":
            return self._units.module.register_forward_pre_hook(lambda _, args: self._add_units(args[0]))
        return self._units.module.register_forward_hook(lambda _, __, output: self._add_units(output))

    def _add_units(self, units: Tensor) -> None:
        tokens = self._tokens()
        self._add(units.reshape(*tokens.shape, -1)[tokens].float().abs())

    def _add_routes(self, output: Any) -> None:
        tokens, (chosen, n) = self._tokens(), routed(output, self._top_k)
        chosen = chosen.reshape(*tokens.shape, -1)[tokens]
        self._add(chosen.new_zeros(len(chosen), n, dtype=torch.float32).scatter(1, chosen.long(), 1.0))

    def _add(self, rows: Float[Tensor, "tokens units"]) -> None:
        self.total = self.total + rows.double().sum(0).cpu()
        self.n_tokens += len(rows)

    def _tokens(self) -> Tensor:
        assert self._context is not None
        return self._context.tokens
