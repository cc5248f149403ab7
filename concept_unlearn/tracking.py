"""Who is told how far long work has come: callbacks that the caller passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[int], None]
"""Told after each bit of work how much that was."""
Tracker = Callable[[str, int | None], AbstractContextManager[Progress | None]]
"""``with tracker(title, total) as progress:`` opens a stage; nobody knows the total where it is None."""


@contextmanager
def silent(title: str, total: int | None) -> Iterator[None]:
    """A tracker that tells nobody."""
    yield None
