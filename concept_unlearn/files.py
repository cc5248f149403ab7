"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: Path, content: bytes) -> None:
    """All of it or nothing: a full disk or a kill leaves the old file."""
    _replace(path, lambda scratch: scratch.write_bytes(content))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, likewise whole or not at all."""
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    _replace(path, lambda scratch: save_file(kept, scratch, metadata))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(scratch)
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
