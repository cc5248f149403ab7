"""A patch: the one thing that every unlearning method leaves behind."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import InvalidConfig
from ..lm import LM
from .origin import Origin


class Switch:
    """Turns a patch that is on off and on again without touching a hook: compiled code stays valid."""

    def __init__(self) -> None:
        self.enabled = True


class Patch(ABC):
    """Inside ``with patch.on(lm):`` the live model behaves as unlearned; afterwards it is bit for bit what it was."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Patch]]] = {}
    access: ClassVar[str]
    """What of the model it needs while it runs: weights, activations, logits or prompts."""
    strength: float
    """0 is off, exactly; 1 is as made, exactly."""
    origin: Origin | None
    """The model it was made on, and a canary; None until it has met one."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "kind"):
            Patch.kinds[cls.kind] = cls

    @abstractmethod
    def on(self, lm: LM) -> AbstractContextManager[Switch]: ...

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What ``tensors`` leaves out, as plain data."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]: ...

    @classmethod
    @abstractmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> Self: ...

    def at(self, strength: float) -> Self:
        """The same patch, weaker or stronger."""
        return replace(self, strength=strength)  # type: ignore[type-var]

    def met(self, lm: LM, texts: Sequence[str] = ()) -> Self:
        """The patch with its origin: this model, and as canary the text that it changes most."""
        return replace(self, origin=Origin.of(self, lm, texts))  # type: ignore[type-var]

    def save(self, folder: str | Path, lm: LM | None = None, *, made: Mapping[str, Any] | None = None) -> Path:
        """``config.json`` and safetensors. Give the model if the patch was neither calibrated on it nor made
        by a method; raises InvalidConfig if it has met none. ``made`` is how it was made, ``Method.record``: it
        stands in the config for whoever reads it.
        """
        from .io import save

        return save(self if lm is None else self.met(lm), Path(folder), made)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Returns the commit's address."""
        from .io import push_to_hub

        return push_to_hub(self, repo_id, private=private)

    @property
    def digest(self) -> str:
        """Changes with everything that the patch does."""
        found = hashlib.sha256(json.dumps([self.kind, self.spec()], sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()[:16]

    @property
    def n_bytes(self) -> int:
        """Size of what is saved."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def check_strength(strength: float) -> None:
    if not 0 <= strength < float("inf"):
        raise InvalidConfig(f"strength is 0 (off), 1 (as made) or another positive number; given: {strength}")


@dataclass(frozen=True)
class Stack(Patch):
    """Several patches at once, the first one innermost."""

    patches: tuple[Patch, ...]
    strength: float = 1.0
    origin: Origin | None = None
    kind = "stack"
    access = "that of its parts"

    def __post_init__(self) -> None:
        check_strength(self.strength)

    @contextmanager
    def on(self, lm: LM) -> Iterator[Switch]:
        outer = _Switches()
        with ExitStack() as stack:
            for patch in self.patches:
                outer.inner.append(stack.enter_context(patch.at(patch.strength * self.strength).on(lm)))
            yield outer

    def spec(self) -> dict[str, Any]:
        return {"strength": self.strength, "patches": [{"kind": p.kind} | p.spec() for p in self.patches]}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, patch in enumerate(self.patches) for name, t in patch.tensors().items()}

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> Stack:
        patches = tuple(
            Patch.kinds[inner["kind"]].restore(
                inner, {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}, None
            )
            for i, inner in enumerate(spec["patches"])
        )
        return cls(patches, spec["strength"], origin)


class _Switches(Switch):
    """One switch for several."""

    def __init__(self) -> None:
        self.inner: list[Switch] = []

    @property
    def enabled(self) -> bool:
        return all(switch.enabled for switch in self.inner)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for switch in self.inner:
            switch.enabled = value


def parts(patch: Patch) -> Iterator[Patch]:
    """Of a stack those that are in it."""
    if isinstance(patch, Stack):
        for inner in patch.patches:
            yield from parts(inner)
    else:
        yield patch
