"""What computes: device, threads and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

from .finding import Finding

_GIB = 2**30
_ENOUGH = 2 * _GIB
"""Memory that the embedded model and its dictionaries fit in with ease."""


def machine() -> Iterator[Finding]:
    """Whether the device that a model would be put on computes, and with how much."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        about = torch.cuda.get_device_properties(0)
        found = f"cuda, {torch.cuda.device_count()} of {about.name} with {about.total_memory / _GIB:.0f} GiB"
    else:
        found = f"cpu, best vector instructions {torch.backends.cpu.get_cpu_capability()}"
    try:
        right = float((torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum()) == 512.0
        wrong = "" if right else "a product of ones is wrong"
    except RuntimeError as error:
        wrong = str(error).splitlines()[0]
    fitting = "install the torch build that fits the driver, see https://pytorch.org/get-started/locally"
    yield Finding(
        group="machine", name="device", state="broken" if wrong else "ok",
        found=f"{found}: {wrong}" if wrong else found, mend=fitting if wrong else "",
    )  # fmt: skip
    if torch.version.cuda and not cuda:
        yield Finding(
            group="machine", name="gpu", state="note",
            found=f"torch is built for CUDA {torch.version.cuda}, and no GPU is found",
            mend="without a GPU nothing; with one, look at what nvidia-smi says of the driver",
        )  # fmt: skip
    threads, cores = torch.get_num_threads(), _cores()
    crowded = threads > cores
    yield Finding(
        group="machine", name="threads", state="note" if crowded else "ok",
        found=f"{threads} of torch on {cores} core{'' if cores == 1 else 's'}",
        mend=f"export OMP_NUM_THREADS={cores}" if crowded else "",
    )  # fmt: skip
    memory = psutil.virtual_memory()
    short = memory.available < _ENOUGH
    yield Finding(
        group="machine", name="memory", state="note" if short else "ok",
        found=f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free",
        mend="close something large: the embedded model wants 2 GiB" if short else "",
    )  # fmt: skip


def _cores() -> int:
    """That this process may use, not that there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
