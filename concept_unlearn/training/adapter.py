"""A PEFT adapter as what is trained: put on the live model, taken off again, and kept as a change of weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidConfig
from ..lm import LM
from ..lm.head import Ending
from ..step import LiveReference
from ..weights import Delta, Dense, LowRank
from .trainable import HALF, Trainable, flags_restored, refuse_quantised

_NO_CHANGE_OF_WEIGHTS = ("modules_to_save", "layer_replication", "trainable_token_indices", "lora_bias")


class Adapter(Trainable):
    """A PEFT adapter on the model, which is its own reference with the adapter off."""

    def __init__(self, lm: LM, wrapped: Any) -> None:
        self.lm, self._wrapped = lm, wrapped
        self.parameters = {name: p for name, p in wrapped.model.named_parameters() if p.requires_grad}

    def reference(self, head: Ending) -> LiveReference:
        return LiveReference(self.lm, head, lambda _: self._wrapped.disable_adapter())

    @torch.no_grad()
    def deltas(self) -> dict[str, Delta]:
        found: dict[str, Delta] = {}
        for path, layer in self.layers():
            found |= {f"{path}.{name}": delta for name, delta in _adapter_deltas(layer).items()}
        return found

    def layers(self) -> list[tuple[str, Any]]:
        """The adapted layers, by the names that the model has for them."""
        modules = self._wrapped.model.named_modules()
        return [(path, layer) for path, layer in modules if hasattr(layer, "base_layer") and hasattr(layer, "merge")]


@contextmanager
def train_adapter(lm: LM, settings: Mapping[str, Any], *, seed: int) -> Iterator[Adapter]:
    """``settings`` are PEFT's own, e.g. ``{"peft_type": "LORA", "r": 16}``.

    Raises InvalidConfig, in PEFT's words where it refuses them, and for adapters that would not come down to a change
    of the weights they are on, or would not leave the model as it was.
    """
    import peft

    try:
        config = peft.get_peft_config({"task_type": "CAUSAL_LM", "peft_type": "LORA", **settings})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidConfig(f"adapter: PEFT takes no such settings: {error}") from None
    odd = [name for name in _NO_CHANGE_OF_WEIGHTS if getattr(config, name, None)]
    if odd or config.is_prompt_learning or config.peft_type == "LN_TUNING":
        what = odd[0] if odd else settings["peft_type"]
        raise InvalidConfig(f"adapter: {what} is no change of weights, as LoRA and its like are; only those are kept")
    if any(hasattr(module, "base_layer") for module in lm.model.modules()):
        raise InvalidConfig("adapter: this model has one already: merge it into the weights, or take it off")
    own = dict(lm.model.named_parameters(remove_duplicate=False))
    refuse_quantised(own)
    data, had = {p: p.data for p in own.values()}, set(vars(lm.model))
    with flags_restored(lm.model):
        try:
            with (
                torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []),
                warnings.catch_warnings(action="ignore", category=FutureWarning),  # PEFT's own, of transformers
            ):
                torch.manual_seed(seed)
                wrapped = peft.get_peft_model(lm.model, config)
        except ValueError as error:
            _take_off(lm.model, had)
            raise InvalidConfig(f"adapter: {error}") from None
        try:
            wrapped.eval()
            adapter = Adapter(lm, wrapped)
            _check(adapter, own, data)
            for p in adapter.parameters.values():
                if p.dtype in HALF:
                    p.data = p.data.float()
            yield adapter
        finally:
            for p, tensor in data.items():
                p.data = tensor
            wrapped.unload()
            _take_off(lm.model, had)


def _check(adapter: Adapter, own: Mapping[str, nn.Parameter], data: Mapping[nn.Parameter, Tensor]) -> None:
    names = {p: [name for name, other in own.items() if other is p] for p in data}
    for p, tensor in data.items():
        if p.requires_grad:
            raise InvalidConfig(f"adapter: it would train {names[p][0]} itself: that is done without an adapter")
        if p.data_ptr() != tensor.data_ptr():
            raise InvalidConfig(f"adapter: it begins by changing {names[p][0]}: use the usual init_lora_weights")
    for path, layer in adapter.layers():
        for name, p in layer.get_base_layer().named_parameters(recurse=False):
            if names.get(p) != [f"{path}.{name}"]:
                also = [other for other in names.get(p, ()) if other != f"{path}.{name}"]
                what = f"is also {also[0]}" if also else "is no parameter of the model"
                raise InvalidConfig(f"adapter: {path}.{name} {what}: leave it out")
    if not adapter.parameters:
        raise InvalidConfig("adapter: no module of this model is adapted by these settings")


def _adapter_deltas(layer: Any) -> dict[str, Delta]:
    """Of one layer: low-rank where it is plain LoRA, otherwise what merging changes."""
    active = layer.active_adapters[0]
    if _is_plain_lora(layer, active):
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


def _is_plain_lora(layer: Any, active: str) -> bool:
    if active not in getattr(layer, "lora_A", ()) or getattr(layer, "use_dora", {}).get(active, False):
        return False
    return isinstance(layer.lora_A[active], nn.Linear) and layer.lora_B[active].bias is None


def _take_off(model: nn.Module, had: set[str]) -> None:
    for name in set(vars(model)) - had:
        delattr(model, name)
