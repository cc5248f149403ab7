"""Named parameters changed: what every gradient method, weight mask and merge of models leaves behind."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InvalidConfig, NonFinite, PatchMismatch, UnknownName
from ..lm import LM
from ..lm.fingerprint import _plain
from ..weights import Delta, Dense, restore_delta
from ..weights.merge import mean, task_arithmetic, ties, total
from .activation import part
from .base import Patch, Switch, check_strength
from .layers import changing
from .origin import Origin

Rule = Literal["sum", "mean", "task_arithmetic", "ties"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class WeightPatch(Patch):
    """theta + strength * delta over the named parameters; tied parameters are one, under any of their names.

    The names are those of ``named_parameters()``; a TransformerBridge also answers to the names of its Hugging Face
    model. Inside the block the parameters hold new tensors, so their own are never written to.
    """

    deltas: Mapping[str, Delta] = field(repr=False)
    _: KW_ONLY
    strength: float = 1.0
    origin: Origin | None = None
    kind = "weight"
    access = "weights"

    def __post_init__(self) -> None:
        check_strength(self.strength)
        object.__setattr__(self, "deltas", dict(self.deltas))
        if wrong := [name for name, delta in self.deltas.items() if not isinstance(delta, Delta)]:
            raise InvalidConfig(f"{wrong[0]}: a change is Dense, LowRank or Sparse; given: {self.deltas[wrong[0]]!r}")

    @classmethod
    def between(
        cls, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
    ) -> WeightPatch:
        """What leads from one checkpoint to the other, dense, without the tensors that are equal in both.

        Of names that share their tensor in both (tied parameters) the first is taken. Raises PatchMismatch where names
        or shapes differ, InvalidConfig where integers do, NonFinite for a change that is NaN or infinite.
        """
        if odd := sorted(set(before) ^ set(after)):
            raise PatchMismatch(f"{odd[0]} and {len(odd) - 1} others are in only one of the two checkpoints")
        deltas: dict[str, Delta] = {}
        seen = set()
        for name, old in before.items():
            new = after[name]
            if old.shape != new.shape:
                raise PatchMismatch(f"{name} has shape {tuple(old.shape)} before and {tuple(new.shape)} after")
            if (tensors := (old.data_ptr(), new.data_ptr(), old.shape)) in seen:
                continue
            seen.add(tensors)
            if old.dtype not in FLOATS or new.dtype not in FLOATS:
                if old.dtype != new.dtype or not torch.equal(old, new.to(old.device)):
                    raise InvalidConfig(f"{name} is of {old.dtype} before, {new.dtype} after: only floats can change")
                continue
            wide = torch.float64 if torch.float64 in (old.dtype, new.dtype) else torch.float32
            change = new.detach().to(old.device, wide) - old.detach().to(wide)
            if not change.isfinite().all():
                raise NonFinite(f"the change of {name} is NaN or infinite")
            if change.any():
                deltas[name] = Dense(change).to(dtype)
        return cls(deltas)

    @contextmanager
    def on(self, lm: LM) -> Iterator[Switch]:
        """Raises PatchMismatch for a parameter that the model has not or has in another shape, and InvalidConfig
        for one that is quantised or offloaded; nothing is changed then.
        """
        if self.strength == 0:
            yield Switch()
            return
        found = self._found(lm)
        _ = lm.fingerprint  # it is remembered, so it must be taken of the model as it is
        adds = [(parameter, partial(delta.added_to, strength=self.strength)) for parameter, delta in found]
        with changing(adds) as switch:
            yield switch

    def to(self, dtype: torch.dtype) -> WeightPatch:
        """The same patch held in another dtype, bfloat16 or float32."""
        return replace(self, deltas={name: delta.to(dtype) for name, delta in self.deltas.items()})

    def bake(self, lm: LM, folder: str | Path) -> Path:
        """An ordinary Hugging Face checkpoint of the patched model and its tokenizer, in the model's dtype.

        It appears under its name when it is whole. Raises InvalidConfig for a folder that is not empty and for a model
        of TransformerLens.
        """
        from .bake import bake

        return bake(self, lm, Path(folder).expanduser())

    def spec(self) -> dict[str, Any]:
        return {"strength": self.strength, "deltas": {name: delta.spec() for name, delta in self.deltas.items()}}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{field}": t for name, delta in self.deltas.items() for field, t in delta.tensors().items()}

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> WeightPatch:
        deltas = {name: restore_delta(delta, part(tensors, f"{name}.")) for name, delta in spec["deltas"].items()}
        return cls(deltas, strength=spec["strength"], origin=origin)

    @property
    def n_parameters(self) -> int:
        """How many numbers it holds."""
        return sum(delta.n_parameters for delta in self.deltas.values())

    def _found(self, lm: LM) -> list[tuple[nn.Parameter, Delta]]:
        own = dict(lm.model.named_parameters(remove_duplicate=False))
        known = {_plain(name).replace(".base_layer.", "."): p for name, p in own.items()} | own  # under PEFT's adapter
        found: dict[nn.Parameter, tuple[str, Delta]] = {}
        for name, delta in self.deltas.items():
            parameter = known.get(name, known.get(_plain(name)))
            if parameter is None:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or list(own)[:3]
                raise PatchMismatch(f"{lm.name} has no parameter {name!r}; it has {', '.join(close)}, ...")
            if not delta.fits(shape := tuple(parameter.shape)):
                raise PatchMismatch(f"{lm.name}: {name} has shape {shape}, the change of it {delta.shape}")
            if parameter.dtype not in FLOATS or parameter.is_meta:
                held = "offloaded" if parameter.is_meta else f"quantised to {parameter.dtype}"
                raise InvalidConfig(f"{lm.name}: {name} is {held}, and a weight patch needs the weight itself")
            if parameter in found:
                raise InvalidConfig(f"{found[parameter][0]} and {name} are one tied parameter of {lm.name}: change one")
            found[parameter] = (name, delta)
        return [(parameter, delta) for parameter, (_, delta) in found.items()]


def merge(
    patches: Sequence[WeightPatch],
    how: Rule = "ties",
    *,
    density: float = 1.0,
    weights: Sequence[float] | None = None,
) -> WeightPatch:
    """One patch of several made on the same model, each at its strength; low-rank changes merge as their products.

    A parameter that a patch leaves alone counts as a change of zero. ``density`` belongs to ``ties`` and ``weights``
    to ``task_arithmetic``. A rule that makes nothing of a single patch returns the patch itself; any other result is
    dense, in float32, and has to meet its model again. Raises PatchMismatch for patches of different models.
    """
    rules: dict[str, Callable[[Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]] = {
        "sum": total,
        "mean": mean,
        "task_arithmetic": partial(task_arithmetic, weights=weights or ()),
        "ties": partial(ties, density=density),
    }
    if how not in rules:
        raise UnknownName("way to merge", how, rules)
    if (weights is not None and how != "task_arithmetic") or (density != 1 and how != "ties"):
        raise InvalidConfig(f"weights= goes with task_arithmetic and density= with ties; given with {how}")
    if wrong := [p for p in patches if not isinstance(p, WeightPatch)]:
        raise InvalidConfig(f"only weight patches can be merged; given: {type(wrong[0]).__name__}")
    if len(origins := {p.origin.fingerprint: p.origin.model for p in patches if p.origin is not None}) > 1:
        raise PatchMismatch(f"these patches were made on different models: {origins}")
    if not patches:
        raise InvalidConfig("there is nothing to merge")
    if len(patches) == 1 and density == 1 and list(weights or [1]) == [1]:
        return patches[0]
    deltas: dict[str, Delta] = {}
    for name in dict.fromkeys(name for patch in patches for name in patch.deltas):
        changes = [{name: p.strength * p.deltas[name].dense()} if name in p.deltas else {} for p in patches]
        change = rules[how](changes)[name]
        if change.any():
            deltas[name] = Dense(change)
    return WeightPatch(deltas)
