"""What is forgotten and what is kept as more and more codes of a codebook are banned (CodeUnlearn).

    python benchmarks/codeunlearn.py runs/codebook/blocks.7.hook_resid_post harry_potter chess

Codes are found on one half of each scope by enrichment and a chi-squared test; numbers come from the other half, as
shares of the untouched model's. "0 codes" is the codebook in the model's place without a ban: what it costs by itself.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from concepts import METRICS, cell
from rich.console import Console

from concept_unlearn import (
    LM,
    Ban,
    CodebookPatch,
    ConceptBenchmark,
    EnrichmentScore,
    Gate,
    Patch,
    Scope,
    compare,
    load_dictionary,
)
from concept_unlearn.errors import EmptyData
from concept_unlearn.methods import Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codebook", help="a name as load_dictionary takes it")
    parser.add_argument("concepts", nargs="+")
    parser.add_argument("--codes", type=int, nargs="+", default=[0, 8, 32, 128, 512])
    parser.add_argument("--mode", choices=("refill", "zero"), default="refill")
    parser.add_argument("--error", choices=("drop", "keep"), default="drop")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="above 1: more than the codes' own share is taken out"
    )
    parser.add_argument("--gate", choices=("always", "probe"), default="always")
    parser.add_argument(
        "--half", choices=("tune", "test"), default="test", help="of the probes; tune to choose settings"
    )
    parser.add_argument("--max-probes", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    lm, console = LM.load("smollm2"), Console(stderr=True)
    found: dict[str, Any] = {}
    print("| concept | codes | " + " | ".join(METRICS) + " |\n" + "|---" * (len(METRICS) + 2) + "|")
    for concept in options.concepts:
        tune, test = Scope.load(concept).halves()
        console.print(f"{concept} …")
        patches = make(Study(lm, tune), options)
        scope = tune if options.half == "tune" else test
        benchmark = ConceptBenchmark(scope, max_probes=options.max_probes, max_passages=12, batch_size=64)
        found[concept] = compare(lm, patches, benchmark).as_json()["compared"]
        for name, metrics in found[concept].items():
            print(f"| {concept} | {name} | {' | '.join(cell(metrics.get(m)) for m in METRICS.values())} |", flush=True)
    if options.json:
        print(json.dumps(found))


def make(study: Study, options: Any) -> dict[str, Patch]:
    codebook: Any = load_dictionary(options.codebook)
    gate = Gate.parse({"kind": "probe", "alpha": 0.05} if options.gate == "probe" else "always")
    stats = study.stats(options.codebook)
    passing = int(EnrichmentScore()(stats).isfinite().sum())
    if not passing:
        raise EmptyData(f"no code of {options.codebook} is enriched on {study.scope.name}")
    patches: dict[str, Patch] = {}
    for n in sorted({min(n, passing) for n in options.codes}):
        if n == 0:
            patches["0"] = CodebookPatch(codebook=codebook, error=options.error)
            continue
        ban = Ban(codebook=options.codebook, n=n, mode=options.mode, error=options.error, gate=gate)
        patches[f"{n} of {passing}" if n == passing else str(n)] = ban.fit(study).at(options.strength)
    return patches


if __name__ == "__main__":
    main()
