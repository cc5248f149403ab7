"""TOFU's whole evaluation in one pass over the model, beside the plain way: a pass for each metric and each candidate.

    python benchmarks/evaluation.py --data PATH/TO/tofu --model smollm2 --items 20 --json

The plain way is that of public code: every metric runs its own forward passes, one for each candidate answer, over
prompt and answer with logits at every position, and its own generation; batches in the order of the data. Scores that
a metric is made of are not computed again (model utility), and both ways compute the same numbers, which is checked.
``--share-replies`` lets the plain way generate once a set as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from concept_unlearn import LM, TOFU, Metric, ModelUtility, View
from concept_unlearn.data.encode import encode_answer, end_of_answer, pad
from concept_unlearn.evaluation.benchmark import reads_of
from concept_unlearn.evaluation.question import encode_probe
from concept_unlearn.evaluation.view import SCORED, Asked, Reply, Seen, Tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with TOFU's tables")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--forget", default="forget01")
    parser.add_argument("--items", type=int, default=20, help="of each set")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1, help="pairs of runs; the median ratio counts")
    parser.add_argument("--share-replies", action="store_true", help="the plain way generates once a set")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lm = LM.load(options.model, dtype=options.dtype)
    benchmark = TOFU(
        data=options.data, forget=options.forget, n_items=options.items, batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens, holdout="retain_perturbed",
        rows={"holdout": (400 - options.items, 400), "retain": (0, options.items)},
    )  # fmt: skip
    reference = benchmark.observe(lm)  # stands for the retrained model; also warms both ways up
    pairs, worst = [], 0.0
    for _ in range(options.repeats):
        start = time.perf_counter()
        view = benchmark.observe(lm)
        ours = benchmark.measure(view.beside(original=reference, retrained=reference))
        middle = time.perf_counter()
        plain = dict(measured_plainly(lm, benchmark, reference, share_replies=options.share_replies))
        pairs.append((middle - start, time.perf_counter() - middle))
        for name, value in plain.items():
            mine = ours[name].value
            assert (mine is None) == (value is None), f"{name}: {mine} in one pass, {value} plainly"
            if mine is not None and value is not None:
                worst = max(worst, abs(mine - value))
    ratios = sorted(plainly / once for once, plainly in pairs)
    found = {
        "metrics": len(ours), "items": options.items, "seconds_in_one_pass": [round(a, 1) for a, _ in pairs],
        "seconds_plainly": [round(b, 1) for _, b in pairs], "ratio": ratios[len(ratios) // 2],
        "largest_difference": worst, "tokens_in_one_pass": dict(view.seen), "dtype": str(lm.dtype),
    }  # fmt: skip
    print(json.dumps(found) if options.json else "\n".join(f"{key}: {value}" for key, value in found.items()))


def measured_plainly(
    lm: LM, benchmark: TOFU, reference: View, *, share_replies: bool
) -> Iterator[tuple[str, float | None]]:
    """Every metric from passes of its own."""
    way = _Plain(lm, benchmark.batch_size, {} if share_replies else None)
    metrics = [m for m in benchmark.metrics if not isinstance(m, ModelUtility)]
    for metric in metrics:
        view = way.view(metric, benchmark)
        yield metric.name, metric(view.beside(original=reference, retrained=reference)).value


class _Plain:
    def __init__(self, lm: LM, batch_size: int, replies: dict[str, list[Reply]] | None) -> None:
        self.lm, self.batch_size, self.replies = lm, batch_size, replies

    def view(self, metric: Metric, benchmark: TOFU) -> View:
        sets = {}
        for name, reads in reads_of([metric]).items():
            asked = benchmark.sets[name]
            records: list[dict[str, Any]] = [{} for _ in asked.examples]
            for field in SCORED:
                if field in reads:
                    self._score(asked, field, records, moments="moments" in reads)
            if "said" in reads:
                for record, reply in zip(records, self._said(name, asked), strict=True):
                    record["said"] = reply
            if "surprise" in reads:
                self._judge(asked, records)
            sets[name] = Seen(name, asked, tuple(records))
        return View(self.lm.name, sets)

    def _score(self, asked: Asked, field: str, records: list[dict[str, Any]], *, moments: bool) -> None:
        end = end_of_answer(self.lm.tokenizer)
        texts = [getattr(probe, field) for probe in asked.examples]
        found: list[list[Tokens]] = [[] for _ in texts]
        for k in range(max(map(len, texts))):
            which = [i for i, group in enumerate(texts) if k < len(group)]
            rows = [
                (encode_probe(self.lm, asked.examples[i]).prompt,
                 encode_answer(self.lm.tokenizer, texts[i][k], after_space=False) + end)
                for i in which
            ]  # fmt: skip
            for i, tokens in zip(which, self._passes(rows, len(end), moments), strict=True):
                found[i].append(tokens)
        for record, group in zip(records, found, strict=True):
            record[field] = tuple(group)

    @torch.no_grad()
    def _passes(self, rows: Sequence[tuple[list[int], list[int]]], n_end: int, moments: bool) -> Iterator[Tokens]:
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            ids, mask = pad([p + a for p, a in batch], side="right", device=self.lm.device)
            logprobs = self.lm.logits(ids, mask).float().log_softmax(-1)
            for row, (prompt, answer) in enumerate(batch):
                own = logprobs[row, len(prompt) - 1 : len(prompt) + len(answer) - 1]
                labels = torch.tensor(answer)
                chosen, greedy = own.gather(-1, labels[:, None])[:, 0], own.argmax(-1) == labels
                mean, std = ((), ()) if not moments else _moments(own)
                yield Tokens(tuple(chosen.tolist()), tuple(greedy.tolist()), n_end, mean, std)

    def _said(self, name: str, asked: Asked) -> list[Reply]:
        if self.replies is not None and name in self.replies:
            return self.replies[name]
        prompts = [encode_probe(self.lm, probe).prompt for probe in asked.examples]
        found = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            for ids in self.lm.generate_ids(batch, max_new_tokens=asked.max_new_tokens, batch_size=len(batch)):
                found.append(Reply(tuple(ids), self.lm.tokenizer.decode(ids, skip_special_tokens=True).strip()))
        if self.replies is not None:
            self.replies[name] = found
        return found

    def _judge(self, asked: Asked, records: list[dict[str, Any]]) -> None:
        written = [i for i, record in enumerate(records) if record["said"].ids]
        rows = [(encode_probe(self.lm, asked.examples[i]).prompt, list(records[i]["said"].ids)) for i in written]
        for record in records:
            record["surprise"] = None
        for i, tokens in zip(written, self._passes(rows, 0, False), strict=True):
            records[i]["surprise"] = tokens.nll / tokens.n


def _moments(logprobs: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    p = logprobs.exp()
    mean = (p * logprobs).sum(-1)
    variance = ((p * logprobs.square()).sum(-1) - mean.square()).clamp(min=1e-6)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


if __name__ == "__main__":
    main()
