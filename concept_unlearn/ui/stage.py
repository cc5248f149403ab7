"""The model on stage with its patches, and the one thread that may run it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ..errors import ConceptUnlearnError, InvalidConfig
from ..features import Inspection
from ..features.show.decoder import lens
from ..features.show.inspection import Shown
from ..features.show.pieces import Pieces
from ..lm import LM
from ..patches import FeaturePatch, Patch, load_patch
from ..patches.base import parts
from .answer import Question
from .muted import Named

T = TypeVar("T")
_WORDS = 4
"""Tokens that tell what a feature is about."""


class Stage:
    """Questions are served one at a time, in the order in which they came, whichever page they came from."""

    def __init__(self, lm: LM, patches: Mapping[str, Patch], inspections: Sequence[Inspection] = ()) -> None:
        """``inspections`` say what features are about; of the others, the page says what they raise."""
        if not patches:
            raise InvalidConfig("the page compares a model with its patched self: give at least one patch")
        self.lm, self.patches = lm, dict(patches)
        known = {(seen.site, f.feature): _about(f) for seen in inspections for f in seen.features if f.fires}
        raised = {name: feature_words(lm, patch) for name, patch in patches.items()}
        self.words = {name: {f: known.get(f, words) for f, words in own.items()} for name, own in raised.items()}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._open: set[Question] = set()
        self._lock = threading.Lock()

    def ask(self, question: Question) -> None:
        """Returns at once; the question's replies grow from another thread."""
        with self._lock:
            self._open.add(question)
            question.future = self._thread.submit(self._serve, question)

    def run(self, what: Callable[[LM], T]) -> Future[T]:
        """Anything else that needs the model."""
        return self._thread.submit(what, self.lm)

    def close(self) -> None:
        """Stops what is under way, and waits until the model is as it was."""
        with self._lock:
            for question in self._open:
                question.stop()
        self._thread.shutdown(wait=True)

    def _serve(self, question: Question) -> None:
        try:
            question.ask(self.lm)
        finally:
            with self._lock:
                self._open.discard(question)


def load_patches(folders: Sequence[Path | str], lm: LM) -> dict[str, Patch]:
    """By the names of their folders; by what was given where two are called the same.

    Raises InvalidConfig, which names the folder that holds no patch for this model.
    """
    found: dict[str, Patch] = {}
    for folder in folders:
        try:
            patch = load_patch(folder, lm)
        except ConceptUnlearnError as error:
            raise InvalidConfig(f"--patch {folder}: {type(error).__name__}: {error}") from error
        path = Path(folder).expanduser().resolve()
        names = (path.name, str(folder), str(path))
        found[next((name for name in names if name not in found), names[-1])] = patch
    return found


def feature_words(lm: LM, patch: Patch) -> dict[Named, tuple[str, ...]]:
    """Of each feature the tokens that it raises most, where the unembedding can tell."""
    pieces, words = Pieces(lm.tokenizer), dict[Named, tuple[str, ...]]()
    for part in parts(patch):
        for chosen in part.slices if isinstance(part, FeaturePatch) else ():
            seen = lens(lm, chosen.W_dec, chosen.site_out, _WORDS)
            for feature, raised in zip(chosen.features, seen[0] if seen else (), strict=False):
                words[str(chosen.site), feature] = tuple(pieces.one(token) for token, _ in raised)
    return words


def _about(shown: Shown) -> tuple[str, ...]:
    return (shown.label,) if shown.label else shown.strongest[:_WORDS]
