"""Run the notebooks as a reader would, each in a fresh kernel, and write what they show to ``build/notebooks``.

    python scripts/run_notebooks.py [notebooks/01_hooking.ipynb ...]

Two at a time, each on one core. The notebooks themselves stay without outputs. A cell that fails ends the rest,
with its traceback.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
    start = time.perf_counter()
    where = {"metadata": {"path": path.parent}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=TIMEOUT, startup_timeout=TIMEOUT, resources=where)
    try:
        client.execute()
    finally:
        BUILD.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, BUILD / path.name)
    print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    paths = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"), reverse=True)
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(run, paths):  # the long ones first
            pass
