"""Changes of a live model's parameters laid one over another, each to be switched off and on by itself.

A parameter's own tensor lies at the bottom and is never written to; with the last layer off it is back, the very same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from .base import Switch

Change = Callable[[Tensor], Tensor]
"""From what it finds to a new tensor."""


@contextmanager
def changing(changes: Sequence[tuple[nn.Parameter, Change]]) -> Iterator[Switch]:
    """Inside the block the parameters are what these make of what they find there."""
    layers: list[_Layer] = []
    try:
        for parameter, change in changes:
            layers.append(_Layer(parameter, change))
        yield _Layers(layers)
    finally:
        for layer in reversed(layers):
            layer.take_off()


class _Layer:
    """One change of one parameter, at work from the start."""

    def __init__(self, parameter: nn.Parameter, change: Change) -> None:
        self._parameter, self._change = parameter, change
        self._enabled = True
        self._below = parameter.data
        self._changed: Tensor | None = self._compute()
        self._stack = _STACKS.setdefault(id(parameter), [])
        self._stack.append(self)
        self._carry_up()

    def switch(self, enabled: bool) -> None:
        if enabled != self._enabled and self in self._stack:
            self._enabled = enabled
            self._carry_up()

    def take_off(self) -> None:
        place = self._stack.index(self)
        self._stack.remove(self)
        self._parameter.data = self._below
        if above := self._stack[place:]:
            above[0]._rest_on(self._below)
            above[0]._carry_up()
        elif not self._stack:
            del _STACKS[id(self._parameter)]

    def _carry_up(self) -> None:
        """Every layer above on what now lies below it, and the uppermost in the model."""
        for lower, upper in pairwise(self._stack[self._stack.index(self) :]):
            upper._rest_on(lower._value())
        self._parameter.data = self._stack[-1]._value()

    def _rest_on(self, below: Tensor) -> None:
        if below.data_ptr() != self._below.data_ptr():
            self._below, self._changed = below, None

    def _value(self) -> Tensor:
        """The parameter as it is seen from above."""
        if not self._enabled:
            return self._below
        if self._changed is None:
            self._changed = self._compute()
        return self._changed

    def _compute(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self._change(self._below)


_STACKS: dict[int, list[_Layer]] = {}
"""Of each changed parameter, by its id, the layers from the lowest up. An entry lives as long as a layer does."""


class _Layers(Switch):
    """One switch for the layers of a patch."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self._layers, self._enabled = layers, True

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        for layer in self._layers:
            layer.switch(value)
