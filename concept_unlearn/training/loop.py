"""The training loop: objectives go down, and at any moment there is a checkpoint to go on from.

An optimiser step's items are fixed by the seed alone. They are cut into parts, which processes share; each part's
losses are divided by the counts of the whole step, and gradients are summed. So micro-batches, accumulation and
processes change a result by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..activations.processes import Processes
from ..errors import Diverged, InvalidConfig, NonFinite
from ..journal import Journal
from ..lm import LM
from ..lm.head import Ending
from ..objectives import Objective
from ..step import Batch, Reference, Step, Tally
from ..tracking import Progress
from ..weights import Delta
from .plan import Data, Group, Plan
from .settings import Optimisation
from .trainable import Trainable
from .watcher import Watcher

Log = Callable[[int, Mapping[str, float]], None]
Probe = Callable[[int], None]
"""Told how many steps have been taken, while the model holds the weights of that moment; it leaves them alone.

Under FSDP a copy is trained, and the model that was given stays as it was.
"""

_SAID = ("forget", "retain")
_KEPT = ("step", "alpha", "at_first", "stopped")


class Loop:
    def __init__(
        self,
        lm: LM,
        objectives: Sequence[Objective],
        data: Data,
        settings: Optimisation,
        trainable: Trainable,
        *,
        head: Ending,
        reference: Reference,
        autocast: Callable[[], AbstractContextManager[object]],
        journal: Journal | None = None,
        log: Log | None = None,
        probe: Probe | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.lm, self.objectives, self.settings, self.trainable = lm, objectives, settings, trainable
        self.head, self.reference, self.autocast, self.journal = head, reference, autocast, journal
        self.log, self.probe, self.progress = log, probe, progress
        self.here = Processes.here()
        self.plan = Plan(lm, objectives, data, settings)
        decay = 0.0 if trainable.masks else settings.weight_decay  # it would move what a mask keeps
        self.optimizer = torch.optim.AdamW(
            trainable.parameters.values(), lr=settings.lr, weight_decay=decay, fused=True
        )
        self.watcher = None
        if settings.watch:
            self.watcher = Watcher(lm, head, data, settings.watch, autocast, micro_batch=settings.micro_batch)
        self.step, self.stopped = 0, False
        self.alpha = settings.balance.alpha if settings.balance else 1.0
        self.eps = self._eps()
        self.at_first: float | None = None

    def run(self) -> dict[str, Delta]:
        """What training has changed. Raises NonFinite or Diverged, which say at which step; checkpoints are kept."""
        self._resume()
        if self.probe and self.step == 0:
            self.probe(0)
        while self.step < self.plan.n_steps and not self.stopped:
            values = self._take()
            self.step += 1
            self._record(values)
            if self.probe:
                self.probe(self.step)
            last = self.step == self.plan.n_steps
            if self.watcher and (last or self.plan.ends(self.step, self.watcher.every)):
                now = self.watcher.look(self.step, self.trainable.deltas)
                self._record({"watched_forget": now.forget, "watched_retain": now.retain})
                self.stopped = self.watcher.enough
            if self.step % self.settings.checkpoint_every == 0 and not (last or self.stopped):
                self._checkpoint()
        self._checkpoint(done=True)
        self.optimizer.state.clear()
        return self.watcher.outcome() if self.watcher else self.trainable.deltas()

    # One optimiser step.

    def _take(self) -> dict[str, float]:
        sums = torch.zeros(len(self.objectives) + len(_SAID), dtype=torch.float64)  # objectives, then plain NLLs
        items = self.plan.items(self.step)
        taken: set[int] = set()
        for group in self.plan.groups:
            parts = self.plan.parts(group, items, self.plan.epoch(self.step))
            tally = self._tally(group, parts)
            taken |= set(group.indices) if parts else set()
            for part, counts in self._own(parts):
                with self.autocast():
                    step = self._step(group, part, parts, tally)
                    losses = [o(step) for o in group.objectives]
                    weighted = [self._weight(o) * x for o, x in zip(group.objectives, losses, strict=True)]
                    total = torch.stack(weighted).sum() * counts
                if total.requires_grad:
                    total.backward()
                if not counts:
                    continue
                for i, x in zip(group.indices, losses, strict=True):
                    sums[i] += x.detach().double().cpu()
                for i, split in enumerate(_SAID, len(self.objectives)):
                    if (c := step.heard_nll(split)) is not None:
                        sums[i] += step.token_mean(split, c).double().cpu()
        sums = self._shared(sums)
        lr = self.settings.lr * self.plan.rate(self.step)
        self._mask()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.parameters.values(), self.settings.clip or math.inf)
        values = self._values(sums.tolist(), taken, float(self.trainable.whole(norm)), lr)
        self._guard(values)
        for settable in self.optimizer.param_groups:
            settable["lr"] = lr
        self._decay(lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._balance(sums.tolist(), taken)
        if self.progress:
            self.progress(self.plan.progress(self.step))
        return values

    def _own(self, parts: Sequence[Mapping[str, Batch]]) -> Iterator[tuple[Mapping[str, Batch], int]]:
        """The parts of this process, and how often each counts.

        Shares are gathered and averaged by all processes at once, so those with fewer parts go along without counting.
        """
        rank, world = self.here
        if not self.trainable.sharded:
            yield from ((part, 1) for part in parts[rank::world])
            return
        for i in range(rank, -(-len(parts) // world) * world, world):
            yield (parts[i], world) if i < len(parts) else (parts[0], 0)

    def _shared(self, sums: Tensor) -> Tensor:
        """Losses and gradients, summed over all processes."""
        sums = sums.to(self.lm.device)
        self.here.sum(sums)
        if self.here.world > 1 and not self.trainable.sharded:
            parameters = list(self.trainable.parameters.values())
            reached = torch.tensor([float(p.grad is not None) for p in parameters], device=self.lm.device)
            self.here.sum(reached)
            for p in (p for p, n in zip(parameters, reached.tolist(), strict=True) if n):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                self.here.sum(p.grad)
        return sums

    def _mask(self) -> None:
        """Before the norm is taken: it is that of the gradient that is applied."""
        for name, mask in self.trainable.masks.items():
            if (gradient := self.trainable.parameters[name].grad) is not None:
                gradient.masked_fill_(~mask, 0.0)

    def _decay(self, lr: float) -> None:
        """AdamW's, of those entries only that a mask lets be trained."""
        for name, mask in self.trainable.masks.items() if self.settings.weight_decay else ():
            if (p := self.trainable.parameters[name]).grad is not None:
                p.data.copy_(torch.where(mask, p.data * (1 - lr * self.settings.weight_decay), p.data))

    def _tally(self, group: Group, parts: Sequence[Mapping[str, Batch]]) -> Tally | None:
        """What only the model can count, counted over the whole step before any loss is divided by it."""
        counting = [o for o in group.objectives if o.counts]
        if not counting or len(parts) == 1:
            return None
        tally = Tally()
        with torch.no_grad(), self.autocast():
            for part in parts:
                step = self._step(group, part, parts, tally)
                for o in counting:
                    o(step)
        tally.counting = False
        return tally

    def _step(
        self, group: Group, part: Mapping[str, Batch], parts: Sequence[Mapping[str, Batch]], tally: Tally | None
    ) -> Step:
        whole = {split: [other[split] for other in parts] for split in part}
        return Step(self.lm, part, group.reads, head=self.head, reference=self.reference, whole=whole, tally=tally)

    def _weight(self, objective: Objective) -> float:
        return objective.weight * (self.alpha if objective.retains and self.settings.balance else 1.0)

    def _values(self, sums: Sequence[float], taken: Set[int], norm: float, lr: float) -> dict[str, float]:
        """Of the objectives that took part in the step."""
        losses = {i: (self.objectives[i], sums[i]) for i in sorted(taken)}
        kinds = [o.kind for o in self.objectives]
        found = {"loss": sum(self._weight(o) * x for o, x in losses.values())}
        found |= {o.kind if kinds.count(o.kind) == 1 else f"{o.kind}.{i}": x for i, (o, x) in losses.items()}
        found |= {"grad_norm": norm, "lr": lr}
        found |= {f"{s}_nll": x for s, x in zip(_SAID, sums[len(self.objectives) :], strict=True) if x}
        return found | ({"alpha": self.alpha} if self.settings.balance else {})

    def _guard(self, values: Mapping[str, float]) -> None:
        at = f"step {self.step + 1} of {self.plan.n_steps}, learning rate {values['lr']:.3g}"
        kept = "the last checkpoint is kept" if self.journal and self.journal.has_checkpoint else "nothing was saved"
        if not all(map(math.isfinite, values.values())):
            bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
            raise NonFinite(f"{at}: NaN or infinite {bad}; {kept}: try a lower learning rate, or gradient clipping")
        guess = math.log(self.head.vocabulary)
        now = values.get("retain_nll", 0.0)
        self.at_first = now if self.at_first is None else self.at_first
        if now > 1.5 * max(guess, self.at_first):
            raise Diverged(
                f"{at}: the retained text costs {now:.3g} nats a token ({self.at_first:.3g} at first; guessing costs "
                f"{guess:.3g}); {kept}: try a lower learning rate, or more weight on what retains"
            )

    # The dual variable.

    def _eps(self) -> float:
        balance = self.settings.balance
        if balance is None:
            return 0.0
        if balance.eps is not None:
            return balance.eps
        now = self._retained_loss()
        if now < 1e-6:
            raise InvalidConfig(
                "balance.eps: what retains costs the untouched model nothing, so say how much it may cost"
            )
        return 1.1 * now

    def _balance(self, sums: Sequence[float], taken: Set[int]) -> None:
        balance, step = self.settings.balance, self.step + 1
        if balance is None or step < min(balance.warm_up * self.plan.per_epoch, self.plan.n_steps / 2):
            return
        retaining = [i for i in taken if self.objectives[i].retains]
        if balance.every == "step" and retaining:
            now = sum(self.objectives[i].weight * sums[i] for i in sorted(retaining))
        elif balance.every == "epoch" and self.plan.ends(step, 1):
            now = self._retained_loss()
        else:
            return
        self.alpha = max(0.0, self.alpha + balance.eta * (now - self.eps))

    @torch.no_grad()
    def _retained_loss(self) -> float:
        """R over all retained rows, as the model is now."""
        total = 0.0
        for group in self.plan.groups:
            retaining = [o for o in group.objectives if o.retains]
            parts = self.plan.parts(group, self.plan.data.items) if retaining else []
            for part in parts:
                with self.autocast():
                    step = self._step(group, part, parts, None)
                    total += sum(o.weight * float(o(step)) for o in retaining)
        return total

    # What is kept on disk.

    def _record(self, values: Mapping[str, float]) -> None:
        if self.here.rank == 0:
            if self.journal:
                self.journal.log(self.step, values)
            if self.log:
                self.log(self.step, values)

    def _checkpoint(self, *, done: bool = False) -> None:
        """At the end without the optimiser's state, to be found finished when it is asked for again."""
        if self.journal:
            tensors = self.watcher.tensors() if self.watcher else {}
            for name, p in self.trainable.parameters.items():
                state = {} if done else self.optimizer.state[p]
                mine = {"value": p.data} | {k: state[k] for k in ("exp_avg", "exp_avg_sq") if k in state}
                tensors |= {f"{k}/{name}": self.trainable.whole(tensor) for k, tensor in mine.items()}
        if self.journal and self.here.rank == 0:
            notes = {name: getattr(self, name) for name in _KEPT} | {"done": done}
            self.journal.save(tensors, notes | {"watcher": self.watcher and self.watcher.notes()})
        self.here.wait()

    def _resume(self) -> None:
        saved = self.journal.load() if self.journal else None
        if saved is not None:
            notes, tensors = saved.notes, saved.tensors
            for name in _KEPT:
                setattr(self, name, notes[name])
            self.stopped = self.stopped or notes["done"]
            for name, p in self.trainable.parameters.items():
                p.data.copy_(self.trainable.share(tensors[f"value/{name}"], p.data))
                if f"exp_avg/{name}" in tensors:
                    moments = {k: tensors[f"{k}/{name}"] for k in ("exp_avg", "exp_avg_sq")}
                    state: dict[str, Any] = {k: self.trainable.share(t, p.data) for k, t in moments.items()}
                    self.optimizer.state[p] = {"step": torch.tensor(float(self.step), device=p.device)} | state
            self.trainable.written()
            if self.watcher:
                self.watcher.restore(notes["watcher"], tensors)
            if self.progress:
                self.progress(sum(map(self.plan.progress, range(self.step))))
        if self.journal and self.here.rank == 0:
            self.journal.trim(self.step)
