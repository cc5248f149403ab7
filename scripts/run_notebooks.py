"""Run the notebooks as a reader would, each in a fresh kernel, and write what they show to ``build/notebooks``.

    python scripts/run_notebooks.py [notebooks/01_hooking.ipynb ...]

The notebooks themselves stay without outputs. Stops at the first cell that fails, with its traceback.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "notebooks"
TIMEOUT = 900
"""Seconds that a kernel may take to start, and a cell to run, however busy the machine is."""


def run(path: Path) -> None:
    """Also where a cell fails, what was shown up to it is written."""
    notebook = nbformat.read(path, as_version=4)
    start, cpu = time.perf_counter(), _cpu()
    where = {"metadata": {"path": path.parent}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=TIMEOUT, startup_timeout=TIMEOUT, resources=where)
    try:
        client.execute()
    finally:
        BUILD.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, BUILD / path.name)
    print(f"{path.name}: {time.perf_counter() - start:.0f} s, {_cpu() - cpu:.0f} s of CPU", flush=True)


def _cpu() -> float:
    """Of the kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted((ROOT / "notebooks").glob("*.ipynb")):
        run(Path(name))
