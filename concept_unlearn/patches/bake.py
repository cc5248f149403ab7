"""A weight patch made permanent: an ordinary Hugging Face checkpoint of the patched model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidConfig
from ..lm import LM
from ..lm.locate import is_hooked

if TYPE_CHECKING:
    from .weight import WeightPatch


def bake(patch: WeightPatch, lm: LM, folder: Path) -> Path:
    """Written beside ``folder`` and renamed at the end, so that a kill leaves nothing under the name itself."""
    model: Any = lm.model
    if is_hooked(model) or not hasattr(model, "save_pretrained"):
        raise InvalidConfig(
            f"{lm.name} is a {type(model).__name__}, whose weights are renamed or folded and no longer a Hugging "
            "Face checkpoint: make the patch on the Hugging Face model, and bake it there"
        )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InvalidConfig(f"{folder} is there already and not empty: bake into a new folder")
    tokenizer = lm.tokenizer
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with patch.on(lm), _plain_config(model):
            model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def _plain_config(model: Any) -> Iterator[None]:
    """Saving writes into the live config, and refuses a model that was de-quantised from GGUF: both end here."""
    config, quantizer = model.config, getattr(model, "hf_quantizer", None)
    kept = dict(vars(config))
    try:
        if quantizer is not None and quantizer.quantization_config.quant_method == "gguf":
            vars(config).pop("quantization_config", None)
            model.hf_quantizer = None
        yield
    finally:
        vars(config).clear()
        vars(config).update(kept)
        if quantizer is not None:
            model.hf_quantizer = quantizer
