"""Config files: YAML with ``key.inner=value`` overrides, validated into a frozen record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .component import Frozen, build
from .errors import InvalidConfig
from .lm import LM

T = TypeVar("T", bound=Frozen)


class ModelSpec(Frozen):
    name: str = "smollm2"
    """The embedded default, a Hub id, a folder or a .gguf file."""
    dtype: str = "auto"
    device: str | None = None
    revision: str | None = None

    def load(self) -> LM:
        return LM.load(self.name, dtype=self.dtype, device=self.device, revision=self.revision)


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Raises InvalidConfig or UnknownName."""
    data = read_mapping(Path(path))
    for line in overrides:
        override(data, line)
    return build(cls, data)


def read_mapping(path: Path) -> dict[str, Any]:
    """What a YAML file holds. Raises InvalidConfig."""
    if not path.is_file():
        raise InvalidConfig(f"no config file {path}")
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise InvalidConfig(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise InvalidConfig(f"{path} should hold a mapping; it holds {type(data).__name__}")
    return data


def override(data: dict[str, Any], line: str) -> None:
    """Set ``key.inner=value`` in a nested mapping, in place. Raises InvalidConfig."""
    key, equals, value = line.partition("=")
    if not equals:
        raise InvalidConfig(f"an override is key=value; given: {line!r}")
    *parents, leaf = key.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InvalidConfig(f"{line!r}: {parent} is no mapping")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"{line!r}: the value is not YAML ({str(error).splitlines()[0]})") from None
