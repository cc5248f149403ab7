"""An NPO step of ours beside the plain way: transformers' Trainer, a deep-copied reference model, full logits.

    python benchmarks/finetune_step.py --json

Same model, same rows in the same optimiser steps, same optimiser and learning rate, fp32. The plain way puts
``--device-batch`` rows through the model at a time, ours ``--micro-batch``, which changes memory
and speed but never a result. Both sides run in turn, each in a process of its own so that peak memory is its own;
throughput counts everything after loading, our pass for the reference's log-probabilities included. The losses of every
step stand side by side; the plain way is told the token counts of the whole step, without which accumulation would
change its loss.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from concept_unlearn import LM, Scope
from concept_unlearn.methods import Finetune
from concept_unlearn.methods.base import Study
from concept_unlearn.objectives import NPO, RetainNLL
from concept_unlearn.training.data import make_data
from concept_unlearn.training.rows import order

LR, SEED = 1e-5, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, help="TOFU's full.jsonl; the built-in harry_potter scope where not given")
    parser.add_argument("--items", type=int, default=32, help="forget items, and as many to retain")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="forget items an optimiser step")
    parser.add_argument("--device-batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=["ours", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"ours": ours, "plain": plain}[options.side](options)))
        return
    found: dict[str, list[dict]] = {"plain": [], "ours": []}
    for _ in range(options.repeats):
        for side, runs in found.items():
            child = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--side", side], capture_output=True, text=True
            )
            if child.returncode:
                raise SystemExit(child.stderr)
            runs.append(json.loads(child.stdout.splitlines()[-1]))
    summary = summarise(found)
    print(json.dumps(summary, indent=1) if options.json else "\n".join(f"{k}: {v}" for k, v in summary.items()))


def summarise(found: dict[str, list[dict]]) -> dict:
    pairs = list(zip(found["plain"], found["ours"], strict=True))
    plain, own = found["plain"][0], found["ours"][0]
    return {
        "items_per_second": {side: statistics.median(r["rate"] for r in runs) for side, runs in found.items()},
        "throughput_ratio": statistics.median(o["rate"] / p["rate"] for p, o in pairs),
        "peak_mb": {side: statistics.median(r["peak_mb"] for r in runs) for side, runs in found.items()},
        "peak_ratio": statistics.median(o["peak_mb"] / p["peak_mb"] for p, o in pairs),
        "idle_mb": plain["idle_mb"],
        "losses": {"plain": plain["losses"], "ours": own["losses"]},
        "largest_difference": max(abs(a - b) for a, b in zip(plain["losses"], own["losses"], strict=True)),
    }


def make(options: argparse.Namespace) -> tuple[LM, Scope, Finetune]:
    lm = LM.load(options.model, dtype="float32")
    if options.data:
        pairs = [json.loads(line) for line in options.data.read_text().splitlines()]
        forget, retain = pairs[-options.items :], pairs[: options.items]
        scope = Scope.of("tofu", forget=forget, retain=retain, out_far=[])
    else:
        whole = Scope.load("harry_potter")
        scope = Scope.of("built-in", forget=whole.forget[: options.items], retain=whole.retain[: options.items])
    method = Finetune(
        objectives=(NPO(beta=0.1), RetainNLL()), lr=LR, batch_size=options.batch, micro_batch=options.micro_batch,
        epochs=options.epochs, schedule="constant", warm_up=0, clip=1.0, seed=SEED, max_length=256,
    )  # fmt: skip
    return lm, scope, method


def ours(options: argparse.Namespace) -> dict:
    lm, scope, method = make(options)
    idle, losses, start = _peak(), [], time.perf_counter()
    method.fit(Study(lm, scope), log=lambda _, values: losses.append(values["loss"]))
    return _told(options, time.perf_counter() - start, losses, idle)


def plain(options: argparse.Namespace) -> dict:
    """As the field does it: three forward passes a step, logits of every position, a second model in memory."""
    from transformers import Trainer, TrainingArguments

    lm, scope, method = make(options)
    data = make_data(lm, scope, ["forget", "retain"], method)
    losses: list[float] = []

    class NPOTrainer(Trainer):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
            self.model_accepts_loss_kwargs = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            forget, retain = inputs["forget"], inputs["retain"]
            with torch.no_grad():
                reference = self.nll(self.reference(**_given(forget)).logits, forget["labels"])
            now = self.nll(model(**_given(forget)).logits, forget["labels"])
            npo = -(2 / 0.1) * torch.nn.functional.logsigmoid(0.1 * (now - reference)).mean()
            kept = self.nll(model(**_given(retain)).logits, retain["labels"])
            loss = npo + kept.sum() / inputs["tokens"] * accumulate  # the Trainer divides by it
            losses.append(loss.item() / accumulate)
            return loss

        @staticmethod
        def nll(logits, labels):
            each = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
            )
            return each.sum(-1)

    accumulate = options.batch // options.device_batch
    rows = _steps(data, options)

    def collate(pairs):
        found = {"tokens": pairs[0][2]}
        for i, split in enumerate(("forget", "retain")):
            batch = data.splits[split].batch([pair[i] for pair in pairs])
            found[split] = {"input_ids": batch.ids, "labels": batch.labels, "attention_mask": batch.mask.long()}
        return found

    idle = _peak()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=options.device_batch,
        gradient_accumulation_steps=accumulate, num_train_epochs=1, learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, report_to=[], save_strategy="no",
        logging_strategy="no", use_cpu=not torch.cuda.is_available(), remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    start = time.perf_counter()
    trainer = NPOTrainer(lm.model, arguments, train_dataset=rows, data_collator=collate)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    lm.model.train()
    trainer.train()
    seconds = time.perf_counter() - start
    steps = [sum(losses[i : i + accumulate]) for i in range(0, len(losses), accumulate)]
    return _told(options, seconds, steps, idle)


def _steps(data, options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Forget row, retain row and the retained tokens of their optimiser step, in the order in which ours takes them."""
    n, m, pairs = len(data.items["forget"]), len(data.items["retain"]), []
    for epoch in range(options.epochs):
        for place, i in enumerate(order(n, seed=SEED, epoch=epoch), epoch * n):
            pairs.append((i, order(m, seed=SEED + 1, epoch=place // m)[place % m]))
    rows = data.splits["retain"].rows
    length = [len(row.ids) - row.n_prompt for row in rows]
    found = []
    for start in range(0, len(pairs), options.batch):
        step = pairs[start : start + options.batch]
        found += [(f, r, sum(length[r] for _, r in step)) for f, r in step]
    return found


def _given(batch):
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _told(options, seconds: float, losses: list[float], idle: float) -> dict:
    items = options.items * options.epochs
    return {"rate": items / seconds, "peak_mb": _peak(), "idle_mb": idle, "losses": losses}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
