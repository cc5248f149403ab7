"""What work on a model costs: time, memory, tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..lm import LM
from ..lm.locate import root

_EVERY = 0.02
"""Seconds between two looks at the memory."""


@dataclass
class Meter:
    """Filled when its block ends."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all threads of this process."""
    peak_mb: float = 0.0
    """The most memory above what was in use before, in MiB: of the model's accelerator, or else of the process."""
    forward_tokens: int = 0
    """That went into the model, padding included."""
    backward_tokens: int = 0
    """Of those, the ones with gradients on."""

    def after(self, first: Meter) -> Meter:
        """What this took and what had to be done before it."""
        both = {f.name: getattr(self, f.name) + getattr(first, f.name) for f in fields(self)}
        return Meter(**both | {"peak_mb": max(self.peak_mb, first.peak_mb)})


@contextmanager
def metered(lm: LM) -> Iterator[Meter]:
    """Whatever the block does with the model, measured."""
    meter, start, cpu = Meter(), time.perf_counter(), time.process_time()
    handle = root(lm.model).register_forward_pre_hook(_counting(meter), with_kwargs=True)
    memory = _Accelerator(lm.device) if lm.device.type == "cuda" else _Process()
    try:
        yield meter
    finally:
        handle.remove()
        meter.peak_mb = memory.peak_mb()
        meter.seconds, meter.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu


def _counting(meter: Meter) -> Any:
    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor):
            meter.forward_tokens += ids.numel()
            meter.backward_tokens += ids.numel() * torch.is_grad_enabled()

    return count


class _Process:
    """Resident memory, looked at from a thread of its own."""

    def __init__(self) -> None:
        import psutil

        self._rss = lambda: psutil.Process().memory_info().rss
        self._before = self._peak = self._rss()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def peak_mb(self) -> float:
        self._done.set()
        self._thread.join()
        return float(max(self._peak, self._rss()) - self._before) / 2**20

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self._peak = max(self._peak, self._rss())


class _Accelerator:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)
        self._before = torch.cuda.memory_allocated(device)

    def peak_mb(self) -> float:
        return (torch.cuda.max_memory_allocated(self._device) - self._before) / 2**20
