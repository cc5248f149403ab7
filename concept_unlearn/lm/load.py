"""A model from its name: the embedded default, a folder, a GGUF file or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ModelNotFound
from .embedded import EMBEDDED, find_embedded


class Loaded(NamedTuple):
    model: nn.Module
    tokenizer: Any
    name: str


def load(
    name: str,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, known_as, extra = _resolve(name)
    extra |= {"revision": revision} if revision else {}
    extra |= {"trust_remote_code": True} if trust_remote_code else {}
    target = torch.device(device) if device is not None else _best_device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        if "gguf_file" in extra:
            from transformers import GgufConfig

            extra["quantization_config"] = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=_dtype(dtype), **extra)
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"no model {name!r}: not embedded ({', '.join(EMBEDDED)}), not a folder, not a .gguf file, "
            f"and the Hub or its cache gave: {str(error).splitlines()[0]}"
        ) from error
    if dtype == "auto":
        model = model.to(_fastest_exact(model.dtype, target))
    return Loaded(model.to(target).eval(), tokenizer, known_as)


def _resolve(name: str) -> tuple[str, str, dict[str, Any]]:
    """(where to load from, what to call it, extra arguments)"""
    if name in EMBEDDED:
        return str(find_embedded(name)), EMBEDDED[name].name, {}
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), name, {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelNotFound(f"{path} is a folder without config.json, so not a saved model")
    return str(path) if path.is_dir() else name, name, {}


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype not in known:
        from ..errors import UnknownName

        raise UnknownName("dtype", dtype, ["auto", *known])
    return known[dtype]


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _fastest_exact(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cpu" and half and not torch.cpu._is_amx_tile_supported():
        return torch.float32
    return dtype
