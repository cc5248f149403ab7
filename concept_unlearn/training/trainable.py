"""The weights that are trained, in full precision, in place of the model's own, and the change that is left of them."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InvalidConfig, UnknownName
from ..lm import LM
from ..lm.head import Ending, ending
from ..lm.locate import blocks
from ..step import LiveReference
from ..weights import Delta, Dense
from ..weights.masks import Masks, under

HALF = (torch.bfloat16, torch.float16)


class Trainable(ABC):
    """``parameters`` by name, while they are in the model ``lm``."""

    lm: LM
    parameters: dict[str, nn.Parameter]
    sharded: ClassVar[bool] = False
    """True where every process holds a share of each parameter, and gradients come averaged over all."""
    masks: Masks = MappingProxyType({})
    """By parameter, the entries that are trained; a parameter without one is trained as a whole."""

    def head(self) -> Ending:
        """What makes logits of what the model ends in."""
        return ending(self.lm.model)

    @abstractmethod
    def reference(self, head: Ending) -> LiveReference:
        """The untouched model; ``head`` is that of ``lm``."""

    def untouched(self) -> AbstractContextManager[None]:
        """Before training begins, the model inside the block is what it was when it was given."""
        return nullcontext()

    def whole(self, tensor: Tensor) -> Tensor:
        """Of a share, the tensor that all processes hold together."""
        return tensor

    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        """Of a tensor, the share that ``like`` is."""
        return whole.to(like.device)

    def written(self) -> None:  # noqa: B027 (most have nothing to do)
        """Called after parameters were given other values by anything but the optimiser."""

    @abstractmethod
    def deltas(self) -> dict[str, Delta]:
        """What training has changed, by the names of the model's own parameters."""


class Weights(Trainable):
    """Some or all of the model's own weights, in float32 (float64 stays)."""

    def __init__(self, lm: LM, parameters: dict[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
        """``kept`` is what the weights were, exactly, in the smallest dtype that holds it."""
        self.parameters, self.lm, self._kept = parameters, lm, kept
        self._unpacked: dict[nn.Module, dict[str, Tensor]] = {}

    def reference(self, head: Ending) -> LiveReference:
        return LiveReference(self.lm, head, self._as_it_was)

    def _as_it_was(self, only: nn.Module | None) -> AbstractContextManager[object]:
        if only is None:
            return self.lm.swap({name: self._kept[name].to(p.dtype) for name, p in self.parameters.items()})
        if only not in self._unpacked:  # a head is asked for at every step
            inner = {id(p) for p in only.parameters()}
            named = {name: p for name, p in self.parameters.items() if id(p) in inner}
            self._unpacked[only] = {name: self._kept[name].to(p.dtype) for name, p in named.items()}
        return self.lm.swap(self._unpacked[only])

    def deltas(self) -> dict[str, Delta]:
        """What a mask keeps as it was is as it was, whatever an optimiser did to it."""
        changes = {name: p.data - self._kept[name].to(p.dtype) for name, p in self.parameters.items()}
        changed = {name: change for name, change in changes.items() if change.any()}
        return {name: under(self.masks[name], c) if name in self.masks else Dense(c) for name, c in changed.items()}


def matching(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by name. Raises UnknownName for a pattern that matches none, InvalidConfig for quantised ones."""
    parameters = dict(model.named_parameters())
    if patterns is not None:
        for pattern in patterns:
            if not fnmatch.filter(parameters, pattern):
                raise UnknownName("parameter", pattern, parameters)
        chosen = {name for pattern in patterns for name in fnmatch.filter(parameters, pattern)}
        parameters = {name: p for name, p in parameters.items() if name in chosen}
    refuse_quantised(parameters)
    return parameters


@contextmanager
def train_weights(lm: LM, patterns: Sequence[str] | None) -> Iterator[Weights]:
    """Raises UnknownName for a pattern that matches no parameter."""
    parameters = matching(lm.model, patterns)
    own = {name: p.data for name, p in parameters.items()}
    wide = {name: t.float() for name, t in own.items() if t.dtype in HALF}
    kept = {name: t if name in wide else _packed(t) for name, t in own.items()}
    with flags_restored(lm.model), lm.swap(wide):
        for p in lm.model.parameters():
            p.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)
        try:
            yield Weights(lm, parameters, kept)
        finally:
            with torch.no_grad():
                for name in own.keys() - wide.keys():
                    own[name].copy_(kept[name])


@contextmanager
def checkpointed(lm: LM, active: bool) -> Iterator[None]:
    """Blocks forget what they computed and compute it again in the backward pass."""
    with ExitStack() as stack:
        for block in blocks(lm.model) if active else ():
            inner = getattr(block, "_original_component", block)  # a bridge's block hands its attributes on
            own = vars(inner).get("forward")
            inner.forward = partial(checkpoint, inner.forward, use_reentrant=False)
            undo = partial(vars(inner).__setitem__, "forward", own) if own else partial(vars(inner).pop, "forward")
            stack.callback(undo)
        yield


def autocast(lm: LM, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """bfloat16 arithmetic on float32 weights, where the model came in half precision or it is asked for."""
    half = lm.dtype in HALF if precision == "auto" else precision == "bf16"
    # Without its cache: it would hand out the cast of a weight after other weights were put in its place.
    return partial(torch.autocast, lm.device.type, torch.bfloat16, enabled=half, cache_enabled=False)


@contextmanager
def flags_restored(model: nn.Module) -> Iterator[None]:
    """Mode, gradients and what requires them are as before afterwards; inside, dropout is off."""
    modes = {module: module.training for module in model.modules()}
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    try:
        model.eval()
        for p in model.parameters():
            p.grad = None
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for p, (flag, grad) in flags.items():
            p.grad = None
            p.requires_grad_(flag)
            p.grad = grad


def _packed(weight: Tensor) -> Tensor:
    """A copy, in bfloat16 where that loses nothing: what was loaded from a half-precision checkpoint."""
    half = weight.to(torch.bfloat16)
    return half if torch.equal(half.to(weight.dtype), weight) else weight.clone()


def refuse_quantised(parameters: Mapping[str, nn.Parameter]) -> None:
    if odd := [name for name, p in parameters.items() if not p.is_floating_point()]:
        raise InvalidConfig(
            f"{odd[0]} and {len(odd) - 1} others are quantised ({parameters[odd[0]].dtype}): load the model in a float "
            "dtype"
        )
