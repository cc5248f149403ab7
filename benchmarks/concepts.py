"""One config on every built-in concept, and a table of what was forgotten and kept.

    python benchmarks/concepts.py configs/gated.yaml
    python benchmarks/concepts.py configs/static.yaml harry_potter --json

Each concept is a run of its own under runs/<config>/<concept>: stopped and started again it goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from concept_unlearn import concepts, execute, load_run

METRICS = {
    "easy": "in_easy/generated_accuracy",
    "hard": "in_hard/generated_accuracy",
    "near": "out_near/generated_accuracy",
    "far": "out_far/generated_accuracy",
    "perplexity": "general/perplexity",
    "gibberish": "in_scope/gibberish",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("concepts", nargs="*", default=concepts())
    parser.add_argument("--output", type=Path, help="folder for the runs")
    parser.add_argument("--set", action="append", default=[], help="override a key of the config")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    folder = options.output or Path("runs") / options.config.stem
    console, found = Console(stderr=True), {}
    for concept in options.concepts:
        console.print(f"{concept} …")
        run = load_run(options.config, [*options.set, f"scope={concept}", f"output={folder / concept}"])
        execute(run)
        found[concept] = json.loads((run.output / "summary.json").read_text())
    print(markdown(found))
    if options.json:
        print(json.dumps({concept: summary["compared"] for concept, summary in found.items()}))


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Accuracy and perplexity relative to the untouched model, with 95 % intervals; gibberish in points above it."""
    lines = ["| concept | method | " + " | ".join(METRICS) + " | strength |", "|---" * (len(METRICS) + 3) + "|"]
    for concept, summary in found.items():
        for method, metrics in summary["compared"].items():
            cells = [cell(metrics.get(metric)) for metric in METRICS.values()]
            lines.append(f"| {concept} | {method} | {' | '.join(cells)} | {summary['strength'][method]:.2f} |")
    return "\n".join(lines)


def cell(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "–"
    if "change" in metric:
        return f"{100 * metric['change']['value']:+.0f}"
    value = metric["relative"]
    digits = 3 if value["value"] > 0.99 and value["high"] > 1 else 2
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


if __name__ == "__main__":
    main()
