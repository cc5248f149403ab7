"""Build and verify the built-in concepts from their sources in scripts/concepts/.

    python scripts/build_concepts.py                 # all of them
    python scripts/build_concepts.py chess france    # some

A source lists topics of the concept and of its neighbours, and candidate probes. The model writes the
passages itself (so they carry its licence), and of the candidate probes those are kept that it answers
correctly in float32 and in bfloat16, both when it generates and when it ranks the answers. Written text is
kept in --work, so an interrupted build goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import yaml
from rich.progress import Progress

from concept_unlearn import LM, Scope
from concept_unlearn.data.examples import Passage, Probe, normalise, write_jsonl
from concept_unlearn.data.scope import CONCEPTS
from concept_unlearn.evaluation.benchmarks import ConceptBenchmark

SOURCES = Path(__file__).parent / "concepts"
TOPICS = Path(__file__).parent / "topics.txt"
MIN_TOKENS, MAX_TOKENS = 60, 120
TEMPERATURE = 0.7
NEAR_TOPICS = 70

PROSE = (
    "Write an encyclopedia paragraph about {t}.",
    "Write a short story scene that involves {t}.",
    "Explain {t} in simple words.",
    "Write a newspaper paragraph about {t}.",
    "Describe {t} to a friend who has never heard of it.",
)
CHAT = (
    "What is {t}?",
    "Tell me about {t}.",
    "What should I know about {t}?",
    "Why does {t} matter?",
    "Can you explain {t}?",
)
QUIZ = (
    "Write three quiz questions about {t}, each with its answer.",
    "Write two multiple-choice questions about {t} with options A to D and the right answer.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(p.stem for p in SOURCES.glob("[!_]*.yaml"))
    parser.add_argument("concepts", nargs="*", default=["_shared", *known], help="_shared is what they have in common")
    parser.add_argument("--work", type=Path, default=Path("runs/concepts"))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-candidates", type=int, help="probes of each set to verify; all where not given")
    options = parser.parse_args()
    models = [LM.load("smollm2", dtype=dtype) for dtype in ("float32", "bfloat16")]
    options.work.mkdir(parents=True, exist_ok=True)
    sources = {name: yaml.safe_load((SOURCES / f"{name}.yaml").read_text()) for name in known}
    with Progress() as progress:
        for name in options.concepts:
            if name == "_shared":
                build_shared(models, sources, options, progress)
            else:
                build_concept(name, sources[name], models, options, progress)


def build_concept(name: str, source: dict[str, Any], models: list[LM], options: Any, progress: Progress) -> None:
    folder = CONCEPTS / name
    folder.mkdir(parents=True, exist_ok=True)
    keywords = [normalise(k).rstrip() for k in source["keywords"]]

    def about(passage: Passage) -> bool:
        return any(k in normalise(f"{passage.prompt or ''} {passage.text}") for k in keywords)

    seed = sum(name.encode())
    mix = tuple(source.get("mix", (1, 1, 1)))
    topics = [
        t if about(Passage(text=t)) else source.get("unnamed", "{t}").format(t=t) for t in source["forget_topics"]
    ]
    forget = write_passages(models[0], topics, mix, seed, f"{name} forget", options, progress)
    near = write_passages(
        models[0], source["near_topics"][:NEAR_TOPICS], (1, 1, 0), seed + 1, f"{name} near", options, progress
    )
    write_jsonl(folder / "forget.jsonl", [p for p in forget if about(p)])
    write_jsonl(folder / "near.jsonl", [p for p in near if not about(p)])
    for part in ("in_easy", "in_hard", "out_near"):
        candidates = [Probe(**p) for p in random.Random(seed).sample(source[part], len(source[part]))]
        kept = verify(candidates[: options.max_candidates], models, f"{name} {part}", progress)
        write_jsonl(folder / f"{part}.jsonl", kept)
    scope = Scope.load(name)
    counts = {part: len(getattr(scope, part)) for part in ("forget", "near", "in_easy", "in_hard", "out_near")}
    progress.console.print(f"{name}: {counts}")


def build_shared(models: list[LM], sources: dict[str, Any], options: Any, progress: Progress) -> None:
    """Retained text about everything, and probes far from every concept."""
    folder = CONCEPTS / "_shared"
    folder.mkdir(parents=True, exist_ok=True)
    keywords = [normalise(k).rstrip() for source in sources.values() for k in source["keywords"]]
    topics = [t for t in TOPICS.read_text().splitlines() if not any(k in normalise(t) for k in keywords)]
    chosen = random.Random(0).sample(topics, 150)
    written = write_passages(models[0], chosen, (1, 1, 1), 0, "retain", options, progress)
    far = [p for p in written if not any(k in normalise(f"{p.prompt or ''} {p.text}") for k in keywords)]
    write_jsonl(folder / "retain.jsonl", far)
    source = yaml.safe_load((SOURCES / "_shared.yaml").read_text())
    write_jsonl(folder / "out_far.jsonl", verify([Probe(**p) for p in source["out_far"]], models, "out_far", progress))


def write_passages(
    lm: LM, topics: list[str], mix: tuple[int, int, int], seed: int, what: str, options: Any, progress: Progress
) -> list[Passage]:
    """``mix`` says how many of prose, chat and quiz passages to write about each topic."""
    path = options.work / f"{what.replace(' ', '-')}.json"
    rng = random.Random(seed)
    jobs = [
        (request.format(t=topic), kind)
        for topic in topics
        for kind, requests, n in zip(("prose", "chat", "quiz"), (PROSE, CHAT, QUIZ), mix, strict=True)
        for request in rng.sample(requests, n)
    ]
    if path.is_file():
        written = json.loads(path.read_text())
    else:
        task = progress.add_task(f"write {what}", total=len(jobs))
        written = lm.generate(
            [request for request, _ in jobs], max_new_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=seed,
            batch_size=options.batch_size, chat=True, progress=lambda n: progress.advance(task, n),
        )  # fmt: skip
        path.write_text(json.dumps(written))
    found = []
    for (request, kind), text in zip(jobs, written, strict=True):
        text = finish(text)
        if len(lm.tokenizer(text)["input_ids"]) >= MIN_TOKENS and not degenerate(text):
            found.append(Passage(text=text, prompt=request if kind == "chat" else None))
    return list({normalise(p.text): p for p in found}.values())


def finish(text: str) -> str:
    """Up to the last whole sentence or line."""
    ends = [m.end() for m in re.finditer(r"[.!?][\"')]?(?=\s|$)|\n", text)]
    return text[: ends[-1]].strip() if ends else text.strip()


def degenerate(text: str) -> bool:
    """Loops: more than a third of the word 4-grams have been said before."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(grams) < 20 or len(set(grams)) < len(grams) * 2 / 3


def verify(probes: list[Probe], models: list[LM], what: str, progress: Progress) -> list[Probe]:
    kept = [p for p in {normalise(p.prompt): p for p in probes}.values() if not p.answered_by(p.prompt)]
    for lm in models:
        task = progress.add_task(f"verify {what} ({lm.dtype})".replace("torch.", ""), total=2 * len(kept))
        scope = Scope.of("verified", forget=["nothing"], in_easy=kept, out_far=[])
        benchmark = ConceptBenchmark(scope, batch_size=64)
        metrics = [benchmark.metric(f"in_easy/{measure}_accuracy") for measure in ("generated", "ranked")]
        view = benchmark.observe(lm, metrics=metrics, progress=lambda n, task=task: progress.advance(task, n))
        right = zip(*(metric(view).values for metric in metrics), strict=True)
        kept = [p for p, measures in zip(kept, right, strict=True) if all(measures)]
    return kept


if __name__ == "__main__":
    main()
