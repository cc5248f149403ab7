"""Ten authors of TOFU, two of them to forget, as a scope: the start of docs/results/tofu.md.

python scripts/tofu_slice.py --data PATH/TO/tofu --output runs/tofu
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from concept_unlearn.data.examples import read_jsonl, to_passage, write_jsonl

RETAINED = 160  # the first eight authors of the full set
EACH = 20  # questions an author


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's full.jsonl and forget01.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/tofu"))
    options = parser.parse_args()
    scope = options.output / "scope"
    scope.mkdir(parents=True, exist_ok=True)
    tables = {
        "retain": list(rows(options.data / "full.jsonl"))[:RETAINED],
        "forget": list(rows(options.data / "forget01.jsonl")),
    }
    for name, found in tables.items():
        known = ({**row, "attributes": {"author": str(i // EACH)}} for i, row in enumerate(found))
        write_jsonl(scope / f"{name}.jsonl", map(to_passage, known))
    texts = [f"{row['question']}\n{row['answer']}" for found in tables.values() for row in found]
    corpus = options.output / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    print(
        f"{scope}: {len(tables['forget'])} questions to forget, {len(tables['retain'])} to keep; {corpus}: all as text"
    )


def rows(path: Path):
    return (record for _, record in read_jsonl(path))


if __name__ == "__main__":
    main()
