"""The weights that are trained, in full precision, in place of the model's own, and the change that is left of them."""

from __future__ import annotations

import fnmatch
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InvalidConfig, UnknownName
from ..lm import LM
from ..lm.locate import blocks
from ..weights import Delta, Dense, LowRank

_HALF = (torch.bfloat16, torch.float16)


class Trainable(ABC):
    """``parameters`` by name, while they are in the model."""

    parameters: dict[str, nn.Parameter]

    @abstractmethod
    def as_it_was(self, only: nn.Module | None = None) -> AbstractContextManager[object]:
        """Inside the block the model is the untouched one, or this module of it."""

    @abstractmethod
    def deltas(self) -> dict[str, Delta]:
        """What training has changed, by the names of the model's own parameters."""


class Weights(Trainable):
    """Some or all of the model's own weights, in float32 (float64 stays)."""

    def __init__(self, lm: LM, parameters: dict[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
        """``kept`` is what the weights were, exactly, in the smallest dtype that holds it."""
        self.parameters, self._lm, self._kept = parameters, lm, kept
        self._unpacked: dict[nn.Module, dict[str, Tensor]] = {}

    def as_it_was(self, only: nn.Module | None = None) -> AbstractContextManager[object]:
        if only is None:
            return self._lm.swap({name: self._kept[name].to(p.dtype) for name, p in self.parameters.items()})
        if only not in self._unpacked:  # a head is asked for at every step
            inner = {id(p) for p in only.parameters()}
            named = {name: p for name, p in self.parameters.items() if id(p) in inner}
            self._unpacked[only] = {name: self._kept[name].to(p.dtype) for name, p in named.items()}
        return self._lm.swap(self._unpacked[only])

    def deltas(self) -> dict[str, Delta]:
        changes = {name: p.data - self._kept[name].to(p.dtype) for name, p in self.parameters.items()}
        return {name: Dense(change) for name, change in changes.items() if change.any()}


class Adapter(Trainable):
    """A PEFT adapter on the model, which is its own reference with the adapter off."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        self.parameters = {name: p for name, p in wrapped.model.named_parameters() if p.requires_grad}

    def as_it_was(self, only: nn.Module | None = None) -> AbstractContextManager[object]:
        found: AbstractContextManager[object] = self._wrapped.disable_adapter()
        return found

    @torch.no_grad()
    def deltas(self) -> dict[str, Delta]:
        found: dict[str, Delta] = {}
        for path, layer in self._wrapped.model.named_modules():
            if hasattr(layer, "base_layer") and hasattr(layer, "merge"):
                found |= {f"{path}.{name}": delta for name, delta in _adapter_deltas(layer).items()}
        return found


@contextmanager
def train_weights(lm: LM, patterns: Sequence[str] | None) -> Iterator[Weights]:
    """Raises UnknownName for a pattern that matches no parameter."""
    parameters = {name: p for name, p in lm.model.named_parameters() if p.is_floating_point()}
    if patterns is not None:
        for pattern in patterns:
            if not fnmatch.filter(parameters, pattern):
                raise UnknownName("parameter", pattern, parameters)
        chosen = {name for pattern in patterns for name in fnmatch.filter(parameters, pattern)}
        parameters = {name: p for name, p in parameters.items() if name in chosen}
    own = {name: p.data for name, p in parameters.items()}
    wide = {name: t.float() for name, t in own.items() if t.dtype in _HALF}
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
def train_adapter(lm: LM, settings: Mapping[str, Any], *, seed: int) -> Iterator[Adapter]:
    """``settings`` are PEFT's own, e.g. ``{"peft_type": "LORA", "r": 16}``. Raises InvalidConfig, in PEFT's words."""
    import peft

    try:
        config = peft.get_peft_config({"task_type": "CAUSAL_LM", "peft_type": "LORA", **settings})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidConfig(f"adapter: PEFT takes no such settings: {error}") from None
    if getattr(config, "modules_to_save", None) or config.is_prompt_learning:
        raise InvalidConfig("adapter: only adapters that come down to a change of weights (LoRA and its like) are kept")
    had = set(vars(lm.model))
    with flags_restored(lm.model):
        try:
            with (
                torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []),
                warnings.catch_warnings(action="ignore", category=FutureWarning),  # PEFT's own, of transformers
            ):
                torch.manual_seed(seed)
                wrapped = peft.get_peft_model(lm.model, config)
        except ValueError as error:
            _unload(lm.model, had)
            raise InvalidConfig(f"adapter: {error}") from None
        for p in lm.model.parameters():
            if p.requires_grad and p.dtype in _HALF:
                p.data = p.data.float()
        try:
            yield Adapter(wrapped)
        finally:
            wrapped.unload()
            _unload(lm.model, had)


@contextmanager
def checkpointed(lm: LM, active: bool) -> Iterator[None]:
    """Blocks forget what they computed and compute it again in the backward pass."""
    with ExitStack() as stack:
        for block in blocks(lm.model) if active else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            stack.callback(block.__dict__.pop, "forward")
        yield


def autocast(lm: LM, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """bfloat16 arithmetic on float32 weights, where the model came in half precision or it is asked for."""
    half = lm.dtype in _HALF if precision == "auto" else precision == "bf16"
    return partial(torch.autocast, lm.device.type, torch.bfloat16) if half else nullcontext


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


def _adapter_deltas(layer: Any) -> dict[str, Delta]:
    """Of one layer: low-rank where it is plain LoRA, otherwise what merging changes."""
    active = layer.active_adapters[0]
    plain_lora = active in getattr(layer, "lora_A", ()) and not getattr(layer, "use_dora", {}).get(active, False)
    if plain_lora and not getattr(layer.lora_B[active], "bias", None):
        down, up = layer.lora_A[active].weight, layer.lora_B[active].weight * layer.scaling[active]
        up, down = (down.T, up.T) if layer.fan_in_fan_out else (up, down)
        return {"weight": LowRank(up.detach().clone(), down.detach().clone())} if up.any() and down.any() else {}
    base = layer.get_base_layer()
    own = {name: p.data for name, p in base.named_parameters(recurse=False)}
    try:
        for name, p in base.named_parameters(recurse=False):
            p.data = own[name].to(torch.float32, copy=True)
        layer.merge(adapter_names=[active])
        changes = {name: p.data - own[name] for name, p in base.named_parameters(recurse=False)}
    finally:
        layer.merged_adapters.clear()
        for name, p in base.named_parameters(recurse=False):
            p.data = own[name]
    return {name: Dense(change) for name, change in changes.items() if change.any()}


def _unload(model: nn.Module, had: set[str]) -> None:
    for name in set(vars(model)) - had:
        delattr(model, name)
