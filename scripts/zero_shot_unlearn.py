"""Unlearn a concept from any model with any SAE, without a gradient, and say what it cost.

    python scripts/zero_shot_unlearn.py --scope harry_potter
    python scripts/zero_shot_unlearn.py --scope my_concept.jsonl --model google/gemma-2-2b \
        --dictionary gemma-scope-2b-pt-res-canonical/layer_9/width_16k/canonical --preset farrell_relative
    python scripts/zero_shot_unlearn.py --scope chess --gate probe --edit '{kind: dense_clamp, to: {of_norm: -1.0}}'

Settings are fitted and calibrated on one half of the scope, and reported on the other. ``concept-unlearn run``
does the same from a config, with comparators, and keeps every stage on disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import Progress

from concept_unlearn import LM, ConceptBenchmark, Scope, calibrate, compare
from concept_unlearn.dictionaries import shipped
from concept_unlearn.methods import PRESETS, Suppress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scope", required=True, help="a built-in concept, a folder, a .jsonl file, a dataset id")
    parser.add_argument("--model", default="smollm2", help="smollm2, a Hub id, a folder or a .gguf file")
    parser.add_argument(
        "--dictionary", nargs="+", default=list(shipped()), help="of SAELens, a folder or shipped; one a site"
    )
    parser.add_argument(
        "--preset",
        choices=[n for n, row in PRESETS.items() if row["kind"] == "suppress"],
        help="a published recipe; what is given besides it wins",
    )
    parser.add_argument("--score", help="how features are chosen, by name or as YAML")
    parser.add_argument("--n", type=int, help="features of each dictionary")
    parser.add_argument("--edit", help="what is done to them, by name or as YAML")
    parser.add_argument("--gate", help="when it is done, by name or as YAML")
    parser.add_argument("--keep", type=float, default=0.98, help="share of neighbouring accuracy that must stay")
    parser.add_argument("--max-perplexity", type=float, default=1.01, help="how much general perplexity may grow")
    parser.add_argument("--max-gibberish", type=float, default=0.05, help="growth of gibberish replies, as a share")
    parser.add_argument("--grid", type=int, default=11, help="strengths to try from 0 to 1")
    parser.add_argument("--output", type=Path, help="folder for the patch and the report")
    options = parser.parse_args()

    given = {name: getattr(options, name) for name in ("score", "n", "edit", "gate")}
    method = Suppress.parse(
        {"kind": "suppress", "dictionaries": tuple(options.dictionary)}
        | PRESETS.get(options.preset, {})
        | {name: yaml.safe_load(str(value)) for name, value in given.items() if value is not None}
    )
    lm, scope = LM.load(options.model), Scope.load(options.scope)
    tune, test = scope.halves()
    benchmark = ConceptBenchmark(test)
    with Progress(transient=True) as progress:

        def stage(title: str, total: int | None = None):
            task = progress.add_task(title, total=total)
            return lambda n: progress.advance(task, n)

        patch = method(lm, tune, progress=stage("measure and select"))
        patch = calibrate(
            lm, patch, tune, keep=options.keep, max_perplexity=options.max_perplexity,
            max_gibberish=options.max_gibberish, grid=options.grid, progress=stage("calibrate"),
        )  # fmt: skip
        report = compare(lm, {"sae": patch}, benchmark, progress=stage("evaluate", 2 * benchmark.n_steps()))
    Console().print(report.table())
    if options.output:
        patch.save(options.output / "patch")
        report.save(options.output)


if __name__ == "__main__":
    main()
