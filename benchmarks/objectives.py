"""Every objective of configs/objectives.yaml on SmolLM2, taught ten authors of TOFU, forgetting one of them.

    python benchmarks/objectives.py --data PATH/TO/tofu teach
    python benchmarks/objectives.py --data PATH/TO/tofu run --half report
    python benchmarks/objectives.py --data PATH/TO/tofu table --half report

``--half tune`` forgets another author, to choose settings on. Each method runs in a process of its own, so that its
peak memory is its own; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import yaml

from concept_unlearn import LM, Method, Scope, load_run
from concept_unlearn.data.examples import write_jsonl
from concept_unlearn.evaluation.benchmark import reads_of
from concept_unlearn.evaluation.metrics import Perplexity
from concept_unlearn.evaluation.observe import observe
from concept_unlearn.evaluation.view import Asked
from concept_unlearn.methods import Finetune
from concept_unlearn.objectives import GA

AUTHOR = 20  # questions
TAUGHT = 10  # authors
FORGOTTEN = {"tune": 8, "report": 9}
TEACHING = {"lr": 1e-4, "batch_size": 8, "micro_batch": 8, "epochs": 4, "warm_up": 0.4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["teach", "run", "one", "table"])
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's full.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--config", type=Path, default=Path("configs/objectives.yaml"))
    parser.add_argument("--half", choices=FORGOTTEN, default="report")
    parser.add_argument("--only", nargs="*", help="these methods")
    parser.add_argument("--set", nargs="*", default=[], help="key=value over what the config says of a method")
    parser.add_argument("--tag", default="", help="of the results, to keep several apart")
    options = parser.parse_args()
    run = load_run(options.config)
    methods = {run.name: run.method, **run.compare}
    names = options.only or list(methods)
    results = options.work / (options.half + options.tag)
    if options.what == "teach":
        teach(options.data, options.work)
    elif options.what == "one":
        changes = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in options.set)}
        name = names[0]
        one(options, name, Method.parse(methods[name].spec() | changes) if name in methods else None, results)
    elif options.what == "run":
        for name in ["base", *names]:
            if not (results / f"{name}.json").is_file():
                arguments = [a for a in sys.argv[1:] if a != "run"]
                if "--only" in arguments:
                    place = arguments.index("--only")
                    arguments = arguments[:place] + arguments[place + 1 + len(options.only) :]
                subprocess.run([sys.executable, __file__, "one", *arguments, "--only", name], check=False)
        print(table(results, ["base", *names]))
    else:
        print(table(results, ["base", *names]))


def scope_of(data: Path, half: str | None) -> Scope:
    lines = (data / "full.jsonl").read_text().splitlines()[: AUTHOR * TAUGHT]
    pairs = [json.loads(line) for line in lines]
    if half is None:
        return Scope.of("tofu", forget=pairs, retain=["nothing"], out_far=[])
    start = FORGOTTEN[half] * AUTHOR
    return Scope.of("tofu", forget=pairs[start : start + AUTHOR], retain=pairs[:start] + pairs[start + AUTHOR :])


def teach(data: Path, work: Path) -> None:
    (work / "scope").mkdir(parents=True, exist_ok=True)
    for part in ("forget", "retain"):
        write_jsonl(work / "scope" / f"{part}.jsonl", getattr(scope_of(data, "report"), part))
    if (work / "taught").is_dir():
        return
    lm, scope, start = LM.load("smollm2", dtype="float32"), scope_of(data, None), time.perf_counter()
    method = Finetune(objectives=(GA(weight=-1.0),), **TEACHING)
    patch = method(lm, scope, folder=work / "teaching", progress=_say(method.epochs * AUTHOR * TAUGHT, "teach"))
    patch.bake(lm, work / "taught")
    with patch.on(lm):
        print(f"taught in {time.perf_counter() - start:.0f} s: answer probability {probability(lm, scope.forget):.3f}")


def one(options: argparse.Namespace, name: str, method: Method | None, results: Path) -> None:
    lm, scope = LM.load(str(options.work / "taught"), dtype="float32"), scope_of(options.data, options.half)
    results.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {"method": name}
    if method is None:
        found |= measure(lm, scope, said=options.half == "report")
    else:
        before, start = _peak(), time.process_time()
        patch = method(lm, scope, folder=results / f"{name}.work", progress=_say(method.epochs * AUTHOR, name))
        found |= {"cpu_seconds": time.process_time() - start, "loaded_mb": before, "peak_mb": _peak()}
        with patch.on(lm):
            found |= measure(lm, scope, said=options.half == "report")
        found |= {"changed_mb": patch.n_bytes / 2**20, "spec": method.spec()}
        for file in (results / f"{name}.work").glob("checkpoint*"):
            file.unlink()
    (results / f"{name}.json").write_text(json.dumps(found, indent=1))
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items() if k != "spec"}, flush=True)


def measure(lm: LM, scope: Scope, *, said: bool) -> dict[str, float]:
    """``said``: also what it says, not only how likely the answers are."""
    kept = scope.retain[:: len(scope.retain) // 40]
    texts = Scope.of("general", forget=["nothing"], retain=None).retain[:24]
    perplexity = Perplexity(on="general")
    view = observe(lm, {"general": Asked(texts, max_tokens=96)}, reads_of([perplexity]))
    found = {"forget_probability": probability(lm, scope.forget), "retain_probability": probability(lm, kept)}
    if said:
        found |= {"forget_rouge": rouge(lm, scope.forget), "retain_rouge": rouge(lm, kept[::2])}
    return found | {"perplexity": perplexity(view).value}


def probability(lm: LM, passages) -> float:
    """Mean of exp(-NLL / length) of the answers."""
    scored = lm.logprobs([p.prompt for p in passages], [[p.text] for p in passages], chat=True, batch_size=8)
    return sum(float(group[0].logprobs.mean().exp()) for group in scored) / len(scored)


def rouge(lm: LM, passages) -> float:
    """ROUGE-L recall of greedy answers."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    said = lm.generate([p.prompt for p in passages], max_new_tokens=64)
    return sum(scorer.score(p.text, s)["rougeL"].recall for p, s in zip(passages, said, strict=True)) / len(said)


def table(results: Path, names: list[str]) -> str:
    head = [
        "method",
        "forget prob.",
        "forget ROUGE",
        "retain prob.",
        "retain ROUGE",
        "perplexity",
        "CPU s",
        "peak MB",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in names:
        path = results / f"{name}.json"
        if path.is_file():
            r = json.loads(path.read_text())
            cells = [
                f"{r[k]:.3f}" for k in ("forget_probability", "forget_rouge", "retain_probability", "retain_rouge")
            ]
            cells += [f"{r['perplexity']:.2f}", *(f"{r[k]:.0f}" if k in r else "" for k in ("cpu_seconds", "peak_mb"))]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _say(total: float, what: str):
    start, done = time.perf_counter(), 0

    def progress(n: int) -> None:
        nonlocal done
        done += n
        if sys.stderr.isatty() or os.environ.get("VERBOSE"):
            print(f"{what}: {done} of {total:.0f}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    return progress


if __name__ == "__main__":
    main()
