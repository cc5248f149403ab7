"""What is finished of a long piece of work, each stage known by everything that can change it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import to_json

from ..activations.processes import Processes
from ..component import Frozen
from ..data.scope import Scope
from ..files import write_atomically

T = TypeVar("T", bound=Frozen)


class Stages:
    """``kept`` looks into the folder first; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, model: Any) -> None:
        self.folder, self.here = folder, Processes.here()
        self._model = [model, importlib.metadata.version("concept-unlearn")]

    def kept(
        self, name: str, kind: type[T], what: Any, make: Callable[[], T], holds: Callable[[T], bool] = lambda _: True
    ) -> T:
        """``make()``, or what it made when the same was asked before, if that still ``holds``."""
        if self.folder is None:
            return make()
        key, path = digest([self._model, what]), self.folder / f"{name}.json"
        saved = json.loads(path.read_bytes()) if path.is_file() else {}
        found = kind.model_validate(saved["value"]) if saved.get("key") == key else None
        if found is not None and not holds(found):
            found = None
        self.here.wait()  # nobody writes before all have looked
        if found is None:
            found = make()
            if self.here.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, to_json({"key": key, "value": found}, inf_nan_mode="strings"))
        return found

    def clear(self, pattern: str) -> None:
        """Folders of work that is done go."""
        if self.folder is not None and self.here.rank == 0:
            for left in self.folder.glob(pattern):
                shutil.rmtree(left)


def digest(what: Any) -> str:
    """Of plain data, and of a scope whatever it was loaded from."""
    if isinstance(what, Scope):
        what = {name: part for name, part in asdict(what).items() if name != "source"}
    text = json.dumps(what, default=lambda e: e.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
