"""What an edit may know about the forward pass it runs in, and what it remembers from one pass to the next.

A pass belongs to a sequence that began earlier when it comes with a key-value cache that was not empty, or
when its ids are those of the last pass plus one token (generation without a cache). Memory lives as long as
the sequence: it follows the cache through beam reordering, repetition, selection and cropping, and is
emptied when a new sequence begins.
"""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import PatchNotReached

_answering: contextvars.ContextVar[bool] = contextvars.ContextVar("answering", default=False)


@contextmanager
def answering() -> Iterator[None]:
    """Inside the block, tokens that extend a cache are the model's answer, not more of the prompt."""
    token = _answering.set(True)
    try:
        yield
    finally:
        _answering.reset(token)


@dataclass
class Memory:
    """Per-sequence tensors, one row a sequence of the batch."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    histories: dict[str, Float[Tensor, "batch time"]] = field(default_factory=dict)
    start: int = 0
    """Position at which the histories begin: above 0 when the patch was switched on in mid-sequence."""
    caches: dict[str, Any] = field(default_factory=dict)
    """Key-value caches of other models that read the same sequences."""

    def add(self, name: str, value: Tensor) -> Tensor:
        """The running total of ``value``."""
        self.rows[name] = self.rows[name] + value if name in self.rows else value
        return self.rows[name]

    def latch(self, name: str, value: Bool[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """True from the first time that ``value`` was."""
        self.rows[name] = self.rows[name] | value if name in self.rows else value
        return self.rows[name]

    def history(self, name: str) -> Float[Tensor, "batch time"] | None:
        return self.histories.get(name)

    def extend(self, name: str, values: Float[Tensor, "batch seq"]) -> None:
        old = self.histories.get(name)
        self.histories[name] = values if old is None else torch.cat([old, values], dim=1)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rows = {name: change(value) for name, value in self.rows.items()}
        self.histories = {name: change(value) for name, value in self.histories.items()}
        for cache in self.caches.values():
            for layer in cache.layers:
                if layer.keys is not None:
                    layer.keys, layer.values = change(layer.keys), change(layer.values)

    def crop(self, length: int) -> None:
        self.histories = {n: value[:, : max(length - self.start, 0)] for n, value in self.histories.items()}
        for name, cache in list(self.caches.items()):
            if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
                del self.caches[name]  # it has let go of what the window left behind
            else:
                cache.crop(-max(cache.get_seq_length() - length, 0))

    def clear(self, start: int = 0) -> None:
        self.rows, self.histories, self.caches, self.start = {}, {}, {}, start

    @property
    def batch(self) -> int | None:
        return next((len(value) for value in (*self.rows.values(), *self.histories.values())), None)


@dataclass(frozen=True)
class Context:
    tokens: Bool[Tensor, "batch seq"]
    """True where the position holds content: no padding, no BOS."""
    prompt: Bool[Tensor, "batch seq"]
    """True where the position belongs to what the model was given, False where it is the model's answer."""
    memory: Memory
    real: Bool[Tensor, "batch seq"]
    """True where the position is no padding."""
    ids: Int[Tensor, "batch seq"] | None
    chat_head: Sequence[int]

    @cached_property
    def text(self) -> Bool[Tensor, "batch seq"]:
        """Content without what every chat begins with, however the passes cut it: as far as a sequence agrees with
        ``chat_head``.
        """
        if self.ids is None or not self.chat_head or self.memory.start:
            return self.tokens
        past = self.memory.rows.get("real", 0)
        position = self.real.long().cumsum(1) - 1 + (past[:, None] if isinstance(past, Tensor) else past)
        head = torch.tensor(list(self.chat_head), device=self.ids.device)
        same = (self.ids == head[position.clamp(0, len(head) - 1)]) & (position < len(head))
        agrees = (same | ~self.real).long().cummin(1).values.bool()
        agrees &= ~self.memory.rows.get("strayed", torch.zeros_like(agrees[:, 0]))[:, None]
        self.memory.add("real", self.real.sum(1))
        self.memory.latch("strayed", ~agrees[:, -1])
        return self.tokens & ~agrees


class Follower:
    """Follows the passes of one model. ``context(x)`` describes the pass that is under way."""

    def __init__(self, bos_id: int | None, chat_head: Sequence[int] = ()) -> None:
        self.memory = Memory()
        self._bos_id, self._chat_head = bos_id, chat_head
        self._mask: Tensor | None = None
        self._cache: Any = None
        self._start = 0
        self.ids: Int[Tensor, "batch seq"] | None = None
        """Of the pass under way, as the embedding saw them; None where it saw none."""
        self._known: weakref.ref[Any] | None = None
        self._length = 0
        self._last_ids: Int[Tensor, "batch seq"] | None = None
        self._prompt_width = 0
        self._current: Context | None = None
        self._unwrap: list[Callable[[], None]] = []

    def begin(self, mask: Tensor | None, cache: Any) -> None:
        self._mask, self._cache, self._current = mask, cache, None
        self._start = cache_length(cache)  # now: the first block will have added to it by the time a site is reached

    def see_ids(self, ids: Tensor) -> None:
        self.ids = ids if ids.ndim == 2 and not ids.is_floating_point() else None

    def context(self, x: Tensor) -> Context:
        """``x`` is the first activation of the pass that an edit sees, ``[batch, seq, ...]``."""
        if self._current is None:
            self._current = self._describe(x)
        return self._current

    def close(self) -> None:
        for unwrap in self._unwrap:
            unwrap()
        self._unwrap.clear()

    def _describe(self, x: Tensor) -> Context:
        batch, seq = x.shape[:2]
        start = self._start
        ids, self.ids = self._whole_ids(batch, seq), None
        tokens = real = _real(self._mask, batch, seq, start, x.device)
        ids = None if ids is None else ids.to(x.device)
        if ids is not None and self._bos_id is not None:
            tokens = tokens & (ids != self._bos_id)
        if start == 0:
            prompt = self._begin_sequence(ids, batch, seq, x.device)
        else:
            prompt = self._continue_sequence(batch, seq, start, x.device)
        self._length = start + seq
        if self._cache is not None and (self._known is None or self._known() is not self._cache):
            self._follow(self._cache)
        return Context(tokens, prompt, self.memory, real, ids, self._chat_head)

    def _whole_ids(self, batch: int, seq: int) -> Int[Tensor, "batch seq"] | None:
        """A HookedTransformer that generates without a cache embeds the new token only."""
        ids, last = self.ids, self._last_ids
        if ids is not None and last is not None and ids.shape == (batch, 1) and last.shape == (batch, seq - 1):
            return torch.cat([last, ids], dim=1)
        return ids if ids is not None and ids.shape == (batch, seq) else None

    def _begin_sequence(
        self, ids: Tensor | None, batch: int, seq: int, device: torch.device
    ) -> Bool[Tensor, "batch seq"]:
        last, self._last_ids = self._last_ids, ids
        grew = (
            last is not None
            and ids is not None
            and ids.shape == (last.shape[0], last.shape[1] + 1)
            and _extends(ids, last)
        )
        if not grew:
            self._prompt_width = seq
        self.memory.clear()
        self._known = None
        prompt = torch.zeros(batch, seq, dtype=torch.bool, device=device)
        prompt[:, : self._prompt_width] = True
        return prompt

    def _continue_sequence(self, batch: int, seq: int, start: int, device: torch.device) -> Bool[Tensor, "batch seq"]:
        known = self._known() if self._known is not None else None
        self._last_ids = None
        ours = known is self._cache or (known is None and start == self._length)
        if not ours:
            self.memory.clear(start)
        elif start < self._length:
            self.memory.crop(start)
        if self.memory.batch not in (None, batch):
            raise PatchNotReached(
                f"the cache went from {self.memory.batch} to {batch} sequences in a way the gate could not follow; "
                "give the first forward pass a cache object, so that it can"
            )
        is_prompt = not ours or (seq > 1 and not _answering.get())
        return torch.full((batch, seq), is_prompt, dtype=torch.bool, device=device)

    def _follow(self, cache: Any) -> None:
        """Make the memory do what the cache's rows do. Undone by ``close``."""
        self.close()
        self._known = weakref.ref(cache)
        for name, change in _ROW_CHANGES.items():
            if hasattr(cache, name):
                self._unwrap.append(_listen(cache, name, partial(self._change, change)))

    def _change(self, change: Callable[[Tensor, Any], Tensor], argument: Any) -> None:
        self.memory.apply(lambda value: change(value, argument))


def _listen(cache: Any, name: str, listener: Callable[[Any], None]) -> Callable[[], None]:
    """Have ``listener`` hear the argument of every call of this method. Returns what takes it away again."""
    if name not in vars(cache):
        setattr(cache, name, _Heard(getattr(cache, name)))
    vars(cache)[name].listeners.append(listener)
    ref = weakref.ref(cache)  # whoever listens does not keep the cache alive

    def take_away() -> None:
        if (followed := ref()) is not None:
            listeners = vars(followed)[name].listeners
            listeners.remove(listener)
            if not listeners:
                del vars(followed)[name]

    return take_away


class _Heard:
    """A cache's method, and who hears of its calls: followers of one cache do not stand in each other's way."""

    def __init__(self, original: Callable[[Any], Any]) -> None:
        self.original, self.listeners = original, list[Callable[[Any], None]]()

    def __call__(self, argument: Any) -> Any:
        for listener in self.listeners:
            listener(argument)
        return self.original(argument)


_ROW_CHANGES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda value, index: value.index_select(0, index.to(value.device)),
    "batch_select_indices": lambda value, index: value[index.to(value.device)],
    "batch_repeat_interleave": lambda value, repeats: value.repeat_interleave(repeats, dim=0),
}


def cache_length(cache: Any) -> int:
    """Tokens that a key-value cache holds: of transformers, a TransformerLens entry, or a tuple of tensors."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, tuple):
        return int(cache[0][0].shape[-2]) if cache else 0
    return int(cache.past_keys.shape[1])


def _extends(ids: Int[Tensor, "batch longer"], last: Int[Tensor, "batch seq"]) -> bool:
    """Each row of ``ids`` begins with some row of ``last``: the same one, or another after a beam search."""
    head = ids[:, :-1]
    if torch.equal(head, last):
        return True
    return bool((head[:, None] == last[None]).all(-1).any(1).all())


def _real(mask: Tensor | None, batch: int, seq: int, start: int, device: torch.device) -> Bool[Tensor, "batch seq"]:
    if mask is None:
        return torch.ones(batch, seq, dtype=torch.bool, device=device)
    mask = mask.to(device)
    if mask.ndim == 4:  # [batch, 1, query, key]: a key that the last query may see holds a real token
        seen = mask[:, 0, -1, start : start + seq]
        return (seen if seen.dtype == torch.bool else seen >= 0).expand(batch, seq)
    return mask[:, -seq:].bool()


def find_embedding(model: nn.Module) -> nn.Module | None:
    """The module that is called with the token ids of every pass, where there is one."""
    get_embeddings: Any = getattr(model, "get_input_embeddings", None)
    if get_embeddings is not None:
        found = get_embeddings()
        return found if isinstance(found, nn.Module) else None
    found = getattr(model, "embed", None)
    return found if isinstance(found, nn.Module) else None
