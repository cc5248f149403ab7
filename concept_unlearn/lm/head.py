"""The end of a model: its last hidden state, read with gradients, and the head that turns it into logits.

Training needs logits at a few positions only, so the model runs with its head cut down to a few positions and the
head is called apart on the hidden states that matter. What a model does to its logits after the head (a soft cap, a
scale) is done here as well, and the positions the model computed itself show that it was done right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import NotExact
from .forward import forward
from .hooks import edits_logits
from .locate import is_hooked, root, text_config

_CHECKED = 8
"""Positions that the model still gives logits of itself."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Of the largest logit; half precision is held to 0.05, far below what a forgotten cap or scale does."""


class Ending(ABC):
    """What a model ends in, in two steps: ``hidden`` of tokens, and ``ending(hidden)``, their logits."""

    module: nn.Module
    """Of the model, all that the second step uses."""
    chunk: int = 2**24
    """Logits held at a time; above it they are computed anew when gradients are."""

    @property
    @abstractmethod
    def vocabulary(self) -> int: ...

    @abstractmethod
    def __call__(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
        """In float32, or in the model's own precision where that is greater."""

    @abstractmethod
    def hidden(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None
    ) -> Float[Tensor, "batch seq d"]:
        """What the second step needs of each position, with its gradient history."""

    def each(
        self, hidden: Float[Tensor, "n d"], fn: Callable[[Float[Tensor, "m vocab"], slice], Float[Tensor, " m"]]
    ) -> Float[Tensor, " n"]:
        """``fn(logits, which)`` of every hidden state, some at a time where all at once would be too many."""
        size = max(self.chunk // self.vocabulary, 1)
        if len(hidden) <= size:
            return fn(self(hidden), slice(0, len(hidden)))

        def part(rows: Tensor, which: slice) -> Tensor:
            return fn(self(rows), which)

        slices = [slice(i, min(i + size, len(hidden))) for i in range(0, len(hidden), size)]
        if not torch.is_grad_enabled():
            return torch.cat([part(hidden[s], s) for s in slices])
        return torch.cat([checkpoint(part, hidden[s], s, use_reentrant=False) for s in slices])


class Head(Ending):
    """``head(hidden)`` is what the model would make of these hidden states. Raises NotExact where it is not."""

    def __init__(self, model: nn.Module, *, chunk: int = 2**24) -> None:
        self.model, self.chunk, self._checked = model, chunk, False
        base: Any = root(model)
        self._own = is_hooked(base)
        found = base.unembed if self._own else base.get_output_embeddings()
        if not isinstance(found, nn.Module):
            raise NotExact(f"{type(base).__name__} has no language-model head")
        self.module = found
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            raise NotExact(f"{type(base).__name__} is an encoder-decoder: only decoders are trained here")
        config = base.cfg if self._own else text_config(base)
        caps = ("output_logits_soft_cap",) if self._own else ("final_logit_softcapping", "logits_soft_cap")
        cap = next((c for name in caps if (c := getattr(config, name, None)) is not None), None)
        self._cap: float | None = cap if cap is not None and cap > 0 else None
        self._scale = float(getattr(config, "logit_scale", 1.0) or 1.0) / float(
            getattr(config, "logits_scaling", 1.0) or 1.0
        )

    @property
    def vocabulary(self) -> int:
        return max(p.shape[0] if not self._own else p.shape[-1] for p in self.module.parameters())

    def __call__(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
        """In float32, or in the model's own precision where that is greater."""
        logits = self.module(hidden[None])[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self._scale != 1:
            logits = logits * self._scale
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def hidden(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None
    ) -> Float[Tensor, "batch seq d"]:
        """What goes into the head, with its gradient history."""
        if edits_logits(self.model):
            raise NotExact(
                f"a patch edits what {type(self.model).__name__} says after its head, so its logits cannot be computed "
                "at the answer alone: switch the patch off to take gradients"
            )
        seen: list[Tensor] = []

        def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(args[0])
            return (args[0][:1, :_CHECKED], *args[1:])

        handle = self.module.register_forward_pre_hook(cut)
        try:
            own = forward(self.model, ids, mask).logits
        finally:
            handle.remove()
        if not self._checked:
            self._check(seen[-1][0, :_CHECKED], own[0])
        return seen[-1]

    @torch.no_grad()
    def _check(self, hidden: Tensor, own: Tensor) -> None:
        precise = _TOLERANCE.get(own.dtype, 0.05) if not torch.is_autocast_enabled(own.device.type) else 0.05
        own = own.double()
        missing = (self(hidden).double() - own).abs().max()
        if missing > precise * own.abs().max():
            raise NotExact(
                f"{type(self.model).__name__} does more to its logits than its head, a cap and a scale: they differ by "
                f"{float(missing):.3g}, so they cannot be computed at the answer alone"
            )
        self._checked = True


class LogitsOnly(Ending):
    """Of a model that says more than its head, or whose head is out of reach: its logits are its hidden states."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.module = model, nn.Identity()
        config: Any = model.cfg if is_hooked(model) else text_config(model)
        self._vocabulary = int(config.d_vocab if is_hooked(model) else config.vocab_size)

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    def __call__(self, hidden: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
        return hidden

    def hidden(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None
    ) -> Float[Tensor, "batch seq vocab"]:
        logits = forward(self.model, ids, mask).logits
        return logits if logits.dtype == torch.float64 else logits.float()


def ending(model: nn.Module) -> Ending:
    """The head, where it is within reach and nothing edits what it says."""
    base: Any = root(model)
    far = not is_hooked(base) and base.get_output_embeddings() is None and base.can_generate()
    return LogitsOnly(model) if far or edits_logits(model) else Head(model)
