"""The training loop: objectives go down, and at any moment there is a checkpoint to go on from.

An optimiser step's items are fixed by the seed alone. They are cut into parts, which processes share; each part's
losses are divided by the counts of the whole step, and gradients are summed. So micro-batches, accumulation and
processes change a result by rounding only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations.processes import Processes
from ..errors import Diverged, NonFinite
from ..journal import Journal
from ..lm import LM
from ..lm.head import Head
from ..objectives import Objective
from ..step import Batch, Read, Reference, Step, Tally
from ..tracking import Progress
from ..weights import Delta, restore_delta
from .rows import Split, order
from .settings import Optimisation, Watch
from .trainable import Trainable

_KEPT = ("step", "alpha", "at_first", "too_low", "stopped")

Log = Callable[[int, Mapping[str, float]], None]
Probe = Callable[[int], None]
"""Told how many steps have been taken, while the model holds the weights of that moment; it leaves them alone."""

SIDES = {"forget": "forget", "refusal": "forget", "alternate": "forget", "retain": "retain", "retain_refusal": "retain"}
"""Whose items a split's rows belong to."""


@dataclass(frozen=True)
class Data:
    splits: Mapping[str, Split]
    items: Mapping[str, Sequence[int]]
    """The items of each side that are trained on."""
    held: Mapping[str, Sequence[int]]
    """Those that a watch measures."""


class Measured(NamedTuple):
    """Mean probability of an answer, exp(-N_i / n_i)."""

    forget: float
    retain: float


class Best(NamedTuple):
    step: int
    measured: Measured
    deltas: dict[str, Delta]


class Loop:
    def __init__(
        self,
        lm: LM,
        objectives: Sequence[Objective],
        data: Data,
        settings: Optimisation,
        trainable: Trainable,
        *,
        head: Head,
        reference: Reference,
        autocast: Callable[[], AbstractContextManager[object]],
        journal: Journal | None = None,
        log: Log | None = None,
        probe: Probe | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.lm, self.objectives, self.data, self.settings, self.trainable = lm, objectives, data, settings, trainable
        self.head, self.reference, self.autocast, self.journal = head, reference, autocast, journal
        self.log, self.probe, self.progress = log, probe, progress
        self.here = Processes.here()
        self.groups = _groups(lm, objectives)
        read = {SIDES[r.split] for group in self.groups for r in group.reads}
        self.leads = "forget" if "forget" in read else "retain"
        self.per_epoch = -(-len(data.items[self.leads]) // settings.batch_size)
        self.n_steps = settings.max_steps or max(1, round(settings.epochs * self.per_epoch))
        self.optimizer = torch.optim.AdamW(
            trainable.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.step = 0
        self.alpha = settings.balance.alpha if settings.balance else 1.0
        self.base: Measured | None = None
        self.best: Best | None = None
        self.at_first: float | None = None
        self.too_low, self.stopped = 0, False

    def run(self) -> dict[str, Delta]:
        """What is left of training. Raises NonFinite or Diverged, which say at which step; checkpoints are kept."""
        settings = self.settings
        if settings.watch:
            self.base = self._measure(settings.watch)
        self.eps = self._eps()
        self._resume()
        if self.probe and self.step == 0:
            self.probe(0)
        while self.step < self.n_steps and not self.stopped:
            values = self._take()
            self.step += 1
            self._record(values)
            if self.probe:
                self.probe(self.step)
            last = self.step == self.n_steps
            if settings.watch and (last or self._due(settings.watch.every)):
                self._watch(settings.watch)
            if self.step % settings.checkpoint_every == 0 and not (last or self.stopped):
                self._checkpoint()
        self._checkpoint(done=True)
        return self._outcome()

    # One optimiser step.

    def _take(self) -> dict[str, float]:
        settings, device = self.settings, self.lm.device
        sums = torch.zeros(len(self.objectives) + 2, dtype=torch.float64)  # each objective, forget and retained NLL
        items = self._items()
        for group in self.groups:
            parts = self._parts(group, items, self.step // self.per_epoch)
            whole = {split: [part[split] for part in parts] for split in parts[0]}
            tally = self._tally(group, parts, whole)
            for part in parts[self.here.rank :: self.here.world]:
                with self.autocast():
                    step = self._step(group, part, whole, tally)
                    losses = [o(step) for o in group.objectives]
                    total = torch.stack(
                        [self._weight(o) * x for o, x in zip(group.objectives, losses, strict=True)]
                    ).sum()
                total.backward()
                for o, x in zip(group.indices, losses, strict=True):
                    sums[o] += x.detach().double().cpu()
                for i, split in enumerate(("forget", "retain")):
                    if (c := step.seen_nll(split)) is not None:
                        sums[i - 2] += step.token_mean(split, c).detach().double().cpu()
        sums = sums.to(device)
        self.here.sum(sums)
        for p in self.trainable.parameters.values():
            if self.here.world > 1:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                self.here.sum(p.grad)
        lr = settings.lr * self._rate()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.parameters.values(), settings.clip or math.inf)
        values = self._values(sums.tolist(), float(norm), lr)
        self._guard(values)
        for settable in self.optimizer.param_groups:
            settable["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._balance(sums.tolist())
        if self.progress:
            self.progress(len(items[self.leads]))
        return values

    def _items(self) -> dict[str, list[int]]:
        """What the step is taken on, a function of the seed and the step alone."""
        settings, (epoch, place) = self.settings, divmod(self.step, self.per_epoch)
        leading = self.data.items[self.leads]
        now = order(len(leading), seed=settings.seed, epoch=epoch)
        chosen = [leading[i] for i in now[place * settings.batch_size : (place + 1) * settings.batch_size]]
        if self.leads == "retain":
            return {"retain": chosen}
        start = (epoch * len(leading) + place * settings.batch_size) * settings.retain_per_forget
        return {"forget": chosen, "retain": list(self._retained(start, len(chosen) * settings.retain_per_forget))}

    def _retained(self, start: int, n: int) -> Iterable[int]:
        pool = self.data.items["retain"]
        laps = range(start // len(pool), (start + n - 1) // len(pool) + 1) if pool else ()
        orders = {lap: order(len(pool), seed=self.settings.seed + 1, epoch=lap) for lap in laps}
        for place in range(start, start + n) if pool else ():
            lap, i = divmod(place, len(pool))
            yield pool[orders[lap][i]]

    def _parts(self, group: Group, items: Mapping[str, Sequence[int]], epoch: int) -> list[dict[str, Batch]]:
        """The step's batches of a group, cut so that rows of like length go together."""
        n_parts = max(-(-len(items[SIDES[split]]) // self.settings.micro_batch) for split in group.splits)
        found: list[dict[str, Batch]] = [{} for _ in range(n_parts)]
        for side in dict.fromkeys(SIDES[split] for split in group.splits):
            splits = {s: self.data.splits[s] for s in group.splits if SIDES[s] == side}
            rows = {i: {s: split.row_of(i, epoch) for s, split in splits.items()} for i in set(items[side])}
            length = {i: max(split.lengths[rows[i][s]] for s, split in splits.items()) for i in rows}
            by_length = sorted(items[side], key=lambda i: (length[i], i))
            for k, part in enumerate(found):
                own = by_length[k * len(by_length) // n_parts : (k + 1) * len(by_length) // n_parts]
                part |= {s: split.batch([rows[i][s] for i in own], self.lm.device) for s, split in splits.items()}
        return found

    def _tally(
        self, group: Group, parts: Sequence[Mapping[str, Batch]], whole: Mapping[str, Sequence[Batch]]
    ) -> Tally | None:
        counting = [o for o in group.objectives if o.counts]
        if not counting or len(parts) == 1:
            return None
        tally = Tally()
        with torch.no_grad(), self.autocast():
            for part in parts:
                step = self._step(group, part, whole, tally)
                for o in counting:
                    o(step)
        tally.counting = False
        return tally

    def _step(
        self, group: Group, part: Mapping[str, Batch], whole: Mapping[str, Sequence[Batch]], tally: Tally | None
    ) -> Step:
        return Step(self.lm, part, group.reads, head=self.head, reference=self.reference, whole=whole, tally=tally)

    def _weight(self, objective: Objective) -> float:
        return objective.weight * (self.alpha if objective.retains and self.settings.balance else 1.0)

    def _rate(self) -> float:
        """The share of the learning rate at this step."""
        settings = self.settings
        rise = min(round(settings.warm_up * self.per_epoch), self.n_steps // 2)
        if self.step < rise:
            return (self.step + 1) / rise
        left = (self.n_steps - self.step) / (self.n_steps - rise)
        match settings.schedule:
            case "constant":
                return 1.0
            case "linear":
                return left
            case "cosine":
                return (1 - math.cos(math.pi * left)) / 2

    def _values(self, sums: Sequence[float], norm: float, lr: float) -> dict[str, float]:
        named = {
            f"{o.kind}" if sum(p.kind == o.kind for p in self.objectives) == 1 else f"{o.kind}.{i}": x
            for i, (o, x) in enumerate(zip(self.objectives, sums, strict=False))
        }
        loss = sum(self._weight(o) * x for o, x in zip(self.objectives, sums, strict=False))
        found = {"loss": loss, **named, "grad_norm": norm, "lr": lr}
        read = {r.split for group in self.groups for r in group.reads if r.what == "nll" and not r.reference}
        found |= {f"{split}_nll": sums[i - 2] for i, split in enumerate(("forget", "retain")) if split in read}
        return found | ({"alpha": self.alpha} if self.settings.balance else {})

    def _guard(self, values: Mapping[str, float]) -> None:
        at = f"step {self.step + 1} of {self.n_steps}, learning rate {values['lr']:.3g}"
        kept = "the last checkpoint is kept" if self.journal and self.journal.has_checkpoint else "nothing was saved"
        if not all(map(math.isfinite, values.values())):
            bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
            raise NonFinite(f"{at}: NaN or infinite {bad}; {kept}: try a lower learning rate, or gradient clipping")
        guess, now = math.log(self.head.vocabulary), values.get("retain_nll", 0.0)
        self.at_first = now if self.at_first is None else self.at_first
        if now > 1.5 * max(guess, self.at_first):
            raise Diverged(
                f"{at}: the retained text costs {now:.3g} nats a token ({self.at_first:.3g} at first; guessing costs "
                f"{guess:.3g}); {kept}: try a lower learning rate, or more weight on what retains"
            )

    # What is kept, and how much of it.

    def _eps(self) -> float:
        balance = self.settings.balance
        if balance is None:
            return 0.0
        return 1.1 * self._retained_loss() if balance.eps is None else balance.eps

    def _balance(self, sums: Sequence[float]) -> None:
        balance = self.settings.balance
        if balance is None or self.step + 1 < min(balance.warm_up * self.per_epoch, self.n_steps / 2):
            return
        if balance.every == "epoch":
            if (self.step + 1) % self.per_epoch:
                return
            now = self._retained_loss()
        else:
            now = sum(o.weight * x for o, x in zip(self.objectives, sums, strict=False) if o.retains)
        self.alpha = max(0.0, self.alpha + balance.eta * (now - self.eps))

    @torch.no_grad()
    def _retained_loss(self) -> float:
        """R over all retained rows, as the model is now."""
        total = 0.0
        for group in self.groups:
            retaining = [o for o in group.objectives if o.retains]
            if retaining:
                items = {side: self.data.items[side] for side in ("forget", "retain")}
                parts = self._parts(group, items, 0)
                whole = {split: [part[split] for part in parts] for split in parts[0]}
                for part in parts:
                    with self.autocast():
                        step = self._step(group, part, whole, None)
                        total += sum(o.weight * float(o(step)) for o in retaining)
        return total

    def _due(self, epochs: float) -> bool:
        """Whether a whole number of these has just gone by."""
        length = epochs * self.per_epoch
        return math.floor(self.step / length) > math.floor((self.step - 1) / length)

    def _watch(self, watch: Watch) -> None:
        assert self.base is not None
        now = self._measure(watch)
        keeps = now.retain >= watch.keep * self.base.retain
        self._record({"watched_forget": now.forget, "watched_retain": now.retain})
        if self.best is None or _rank(now, self.base, watch) < _rank(self.best.measured, self.base, watch):
            self.best = Best(self.step, now, self.trainable.deltas())
        self.too_low = 0 if keeps else self.too_low + 1
        self.stopped = self.too_low >= watch.patience

    @torch.no_grad()
    def _measure(self, watch: Watch) -> Measured:
        return Measured(*(self._probability(side, watch) for side in ("forget", "retain")))

    def _probability(self, split: str, watch: Watch) -> float:
        rows, found = list(self.data.held[split])[: watch.passages], []
        for start in range(0, len(rows), self.settings.micro_batch):
            batch = self.data.splits[split].batch(rows[start : start + self.settings.micro_batch], self.lm.device)
            step = Step(self.lm, {split: batch}, [Read(split)], head=self.head, reference=self.reference)
            with self.autocast():
                mean = step.per_sequence(split, step.nll(split)) / batch.lengths().clamp(min=1)
            found += (-mean).exp().tolist()
        return float(sum(found)) / max(len(found), 1)

    def _outcome(self) -> dict[str, Delta]:
        watch = self.settings.watch
        if watch is None or self.best is None or self.base is None:
            return self.trainable.deltas()
        if self.best.measured.retain < watch.keep * self.base.retain:
            warnings.warn(
                f"no step kept {watch.keep:.0%} of the retained answers' probability; the best, step {self.best.step}, "
                f"keeps {self.best.measured.retain / self.base.retain:.0%}",
                stacklevel=2,
            )
        return self.best.deltas

    # What is kept on disk.

    def _record(self, values: Mapping[str, float]) -> None:
        if self.here.rank == 0:
            if self.journal:
                self.journal.log(self.step, values)
            if self.log:
                self.log(self.step, values)

    def _checkpoint(self, *, done: bool = False) -> None:
        """At the end without the optimiser's state, to be found finished when it is asked for again."""
        if self.journal is None or self.here.rank:
            self.here.wait()
            return
        tensors: dict[str, Tensor] = {}
        for name, p in self.trainable.parameters.items():
            tensors[f"value/{name}"] = p.data
            if not done:
                state = self.optimizer.state[p]
                tensors |= {f"{k}/{name}": state[k] for k in ("exp_avg", "exp_avg_sq") if k in state}
        best = None
        if self.best:
            best = {"step": self.best.step, "measured": self.best.measured, "specs": {}}
            for name, delta in self.best.deltas.items():
                best["specs"][name] = delta.spec()  # type: ignore[index]
                tensors |= {f"best/{name}/{part}": t for part, t in delta.tensors().items()}
        notes = {name: getattr(self, name) for name in _KEPT} | {"best": best}
        self.journal.save(tensors, notes | {"done": done})
        self.here.wait()

    def _resume(self) -> None:
        saved = self.journal.load() if self.journal else None
        if saved is not None:
            notes, tensors = saved.notes, saved.tensors
            for name in _KEPT:
                setattr(self, name, notes[name])
            self.stopped = self.stopped or notes["done"]
            for name, p in self.trainable.parameters.items():
                p.data.copy_(tensors[f"value/{name}"])
                if f"exp_avg/{name}" in tensors:
                    state: dict[str, Any] = {k: tensors[f"{k}/{name}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = {"step": torch.tensor(float(self.step), device=p.device)} | state
            if notes["best"]:
                self.best = _best(notes["best"], tensors)
            if self.progress:
                self.progress(min(self.step * self.settings.batch_size, self.n_steps * self.settings.batch_size))
        if self.journal and self.here.rank == 0:
            self.journal.trim(self.step)


class Group(NamedTuple):
    """Objectives that share splits: their losses need one graph, which is freed before the next group's is built."""

    objectives: tuple[Objective, ...]
    indices: tuple[int, ...]
    reads: tuple[Read, ...]
    splits: tuple[str, ...]


def _groups(lm: LM, objectives: Sequence[Objective]) -> list[Group]:
    found: list[tuple[set[str], list[int]]] = []
    for i, objective in enumerate(objectives):
        splits, indices = {r.split for r in objective.reads(lm)}, [i]
        for other in [g for g in found if g[0] & splits]:
            found.remove(other)
            splits, indices = splits | other[0], other[1] + indices
        found.append((splits, indices))
    return [
        Group(
            tuple(objectives[i] for i in sorted(indices)),
            tuple(sorted(indices)),
            tuple(dict.fromkeys(r for i in sorted(indices) for r in objectives[i].reads(lm))),
            tuple(sorted(splits)),
        )
        for splits, indices in found
    ]


def _rank(now: Measured, base: Measured, watch: Watch) -> tuple[bool, float]:
    """Smaller is better: what keeps enough by how much is forgotten, the rest by how much is kept."""
    keeps = now.retain >= watch.keep * base.retain
    return (not keeps, now.forget if keeps else -now.retain)


def _best(notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Best:
    deltas = {}
    for name, spec in notes["specs"].items():
        prefix = f"best/{name}/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        deltas[name] = restore_delta(spec, own)
    return Best(notes["step"], Measured(*notes["measured"]), deltas)
