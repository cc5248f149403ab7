"""What other processes do, to be killed or to work together."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_hf, make_tokenizer, words

from concept_unlearn import LM, Corpus, Scope
from concept_unlearn.activations import Harvest, Live, Store, harvest
from concept_unlearn.data.examples import Passage, Probe
from concept_unlearn.dictionaries import TopkArchitecture, Training, train
from concept_unlearn.evaluation.observe import observe
from concept_unlearn.evaluation.view import Asked
from concept_unlearn.methods import Finetune, Study
from concept_unlearn.objectives import GA, RetainNLL
from concept_unlearn.patches import WeightPatch
from concept_unlearn.weights import Dense

SITES = ("resid_post.0", "resid_post.1")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["concept_unlearn", "sae_lens", "workers"])


def tiny_lm() -> LM:
    return LM(make_hf(), make_tokenizer(), name="tiny")


def tiny_corpus(n: int = 300, seed: int = 0) -> Corpus:
    rng = random.Random(seed)
    return Corpus.of([words(*rng.choices(range(7, 48), k=rng.randint(1, 40))) for _ in range(n)])


def tiny_harvest(**changes: Any) -> Harvest:
    return Harvest(**{"sites": SITES, "context": 16, "shard_tokens": 200, "dtype": "float32"} | changes)


def tiny_training(**changes: Any) -> Training:
    settings = {"architecture": TopkArchitecture(d_sae=24, k=3), "tokens": 6400, "batch": 64, "block_tokens": 400}
    return Training(**settings | {"checkpoint_every": 5} | changes)


def fill(folder: Path) -> None:
    torch.set_num_threads(1)
    harvest(tiny_lm(), tiny_corpus(), tiny_harvest(), folder)


def train_stored(store: Path, output: Path) -> None:
    torch.set_num_threads(1)
    train(Store(store), tiny_training(), output)


def train_live(output: Path) -> None:
    torch.set_num_threads(1)
    train(Live(tiny_lm(), tiny_corpus(), tiny_harvest()), tiny_training(), output)


def tiny_scope(n: int = 10) -> Scope:
    """Questions and answers of unequal lengths, and two plain texts to keep."""
    rng = random.Random(3)

    def pairs(count: int, pool: range) -> list[dict[str, str]]:
        return [
            {"prompt": words(*rng.choices(pool, k=2)), "text": words(*rng.choices(pool, k=rng.randint(1, 6)))}
            for _ in range(count)
        ]

    kept = [*pairs(18, range(8, 28)), words(9, 10), words(11, 12)]
    return Scope.of("tiny", forget=pairs(n, range(30, 46)), retain=kept, out_far=[])


def tiny_finetune(**changes: Any) -> Finetune:
    settings = {"objectives": (GA(), RetainNLL()), "lr": 3e-3, "epochs": 3, "batch_size": 4, "micro_batch": 4}
    return Finetune(**settings | changes)


def finetune_sharded_in(folder: Path, stop: int | None, **settings: Any) -> None:
    """As ``finetune_in``, by processes that each hold a share; killed from within after ``stop`` steps."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    torch.set_num_threads(1)
    lm = LM(make_hf().double(), make_tokenizer(), name="tiny")
    before = [p.clone() for p in lm.model.parameters()]

    def end(step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    try:
        patch = tiny_finetune(**settings).fit(Study(lm, tiny_scope(), folder=folder), probe=end)
    except KeyboardInterrupt:
        return
    assert all(torch.equal(p, q) for p, q in zip(before, lm.model.parameters(), strict=True))
    if os.environ["RANK"] == "0":
        patch.save(folder / "patch", lm)


def finetune_in(folder: Path, **settings: Any) -> None:
    """Its checkpoints and log, and ``patch`` when it is done."""
    torch.set_num_threads(1)
    lm, method = tiny_lm(), tiny_finetune(**{"epochs": 20, "micro_batch": 1, "checkpoint_every": 3} | settings)
    patch = method(lm, tiny_scope(), folder=folder)
    if os.environ.get("RANK", "0") == "0":
        patch.save(folder / "patch", lm)


def peak_memory(n_shards: int, answer: Any) -> None:
    """In MB, after so many shards of 10,000 rows."""
    torch.set_num_threads(1)
    one, harvest = tiny_corpus(100), tiny_harvest(shard_tokens=10_000, tokens=10_000 * n_shards, context=40)
    corpus = Corpus("endless", lambda: (text for _ in iter(int, 1) for text in one), lambda: "endless")
    for _ in Live(tiny_lm(), corpus, harvest).shards(0, 0, 1):
        pass
    answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def ask(work: Callable[..., None], *arguments: Any) -> Any:
    """What ``work`` puts into the queue it is given last."""
    answer = _context.Queue()
    process = start(work, *arguments, answer)
    found = answer.get()
    process.join()
    return found


def start(work: Callable[..., None], *arguments: Any) -> Any:
    process = _context.Process(target=work, args=arguments)
    process.start()
    return process


def together(n: int, work: Callable[..., None], *arguments: Any, **settings: Any) -> None:
    """``work`` in n processes that know of one another, as ``accelerate launch`` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(_ranked, rank, n, port, work, arguments, settings) for rank in range(n)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * n


def _ranked(
    rank: int, world: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        work(*arguments, **settings)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def tiny_tasks(folder: Path, output: Path) -> None:
    """``changes.json``: of lm-eval's tasks in a folder, what each metric is before and after a patch."""
    import datasets

    from concept_unlearn.evaluation.harness import Harness, changes

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = output / "cache"
    harness = Harness(tasks=("tiny_choice", "tiny_text"), include_path=folder)
    before, after = harness(tiny_lm()), harness(tiny_lm(), tiny_weight_patch())
    if before is not None and after is not None:
        found = [[c.metric, c.before, c.after, c.difference] for c in changes(before, after)]
        (output / "changes.json").write_text(json.dumps(found))


ASKED = {
    "forget": frozenset(("answers", "paraphrases", "distractors", "moments", "gradnorm", "said", "surprise")),
    "retain": frozenset(("answers", "said", "surprise")),
    "text": frozenset(("answers",)),
}


def tiny_sets() -> dict[str, Asked]:
    """Questions with replies and continuations of unequal lengths, and plain texts; some words are no ASCII."""
    rng = random.Random(5)

    def draw(least: int, most: int) -> str:
        return words(*rng.choices(range(7, 48), k=rng.randint(least, most)))

    def probe(i: int) -> Probe:
        options = {"distractors": tuple(draw(1, 5) for _ in range(i % 4)), "paraphrases": (draw(5, 7),) * (i % 2)}
        history = (draw(2, 4), draw(2, 4)) if i % 6 == 0 else ()
        return Probe(
            prompt=draw(1, 12), answers=tuple(draw(1, 6) for _ in range(1 + i % 2)), chat=i % 3 == 0, history=history,
            opening="w11" * (i % 5 == 0), **options,
        )  # fmt: skip

    return {
        "forget": Asked(tuple(probe(i) for i in range(13)), max_new_tokens=4, max_cloze_tokens=3),
        "retain": Asked(tuple(probe(i) for i in range(20, 29)), max_new_tokens=5, stop=("w21",)),
        "text": Asked(tuple(Passage(text=draw(2, 30)) for _ in range(9)), max_tokens=24),
    }


def tiny_weight_patch() -> WeightPatch:
    change = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    return WeightPatch({"model.layers.1.mlp.down_proj.weight": Dense(change)})


def observe_in(folder: Path, stop: int | None = None) -> None:
    """Killed for good, from within, when it has told of progress ``stop`` times; else its counts stand beside it."""
    torch.set_num_threads(1)
    told = 0

    def progress(_: int) -> None:
        nonlocal told
        told += 1
        if told == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    view = observe(
        tiny_lm(), tiny_sets(), ASKED, patch=tiny_weight_patch(), batch_size=6, folder=folder, progress=progress
    )
    folder.with_suffix(".json").write_text(json.dumps(view.seen))
