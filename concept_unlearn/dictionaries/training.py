"""The training loop: rows in, a dictionary a site out, and at any moment a checkpoint to go on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from ..activations.mix import Position, RowSource, mixed
from ..activations.processes import Processes
from ..component import Frozen
from ..errors import InvalidConfig, NonFinite
from ..journal import Journal
from ..lm import Site
from ..tracking import Progress
from .architecture import Architecture, Job, Trainee
from .base import Dictionary
from .load import load_dictionary

Log = Callable[[int, Site, Mapping[str, float]], None]
Evaluate = Callable[[Dictionary], Mapping[str, float]]

_LOG_EVERY = 50
_SAMPLE = 16_384


class Training(Frozen):
    """How to train one dictionary a site, all in one pass over the rows."""

    architecture: Architecture
    tokens: int = Field(gt=0)
    """Rows to train each site on; more than the source has are taken from it again, in another order."""
    batch: int = Field(4096, gt=0)
    """Rows a step, over all processes."""
    lr: float = Field(4e-4, gt=0)
    warm_up: float = Field(0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    decay: float = Field(0.25, ge=0, le=1)
    """Share of the steps at the end in which it falls."""
    sink: float | None = 5.0
    """Rows of more than so many median norms are left out; none keeps all."""
    block_tokens: int = Field(262_144, gt=0)
    """Rows shuffled at a time."""
    checkpoint_every: int = Field(500, gt=0)
    """Steps."""
    evaluate_every: int | None = Field(None, gt=0)
    """Steps; at the end alone where it is not given."""
    seed: int = 0

    @property
    def n_steps(self) -> int:
        return -(-self.tokens // self.batch)


def train(
    source: RowSource,
    training: Training,
    output: str | Path,
    *,
    device: str | torch.device = "cpu",
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
) -> dict[Site, Dictionary]:
    """A dictionary for each site of the source, in ``output/<site>``, with ``log.jsonl`` beside them.

    A training that was stopped goes on from its checkpoint and ends in the same weights. Of several processes each
    reads shards of its own and the gradients are averaged. ``log(step, site, values)`` hears what is written to the
    log, ``progress`` of rows. Raises NonFinite, which names the batch and leaves the last good checkpoint;
    InvalidConfig where ``output`` holds another training.
    """
    return _Loop(source, training, Path(output), torch.device(device), evaluate, log, progress).run()


class _Loop:
    def __init__(
        self,
        source: RowSource,
        training: Training,
        output: Path,
        device: torch.device,
        evaluate: Evaluate | None,
        log: Log | None,
        progress: Progress | None,
    ) -> None:
        self.source, self.training, self.output, self.device = source, training, output, device
        self.evaluate, self.log, self.progress = evaluate, log, progress
        self.here = Processes.here()
        what = {
            "processes": self.here.world, "model": source.model_name, "rows": source.key,
            "training": training.model_dump(mode="json", exclude={"checkpoint_every", "evaluate_every"}),
        }  # fmt: skip
        self.journal = Journal(output, what, name="training")
        self.step = 0
        self.position = Position()
        if training.batch % self.here.world:
            raise InvalidConfig(f"a batch of {training.batch} rows cannot be shared by {self.here.world} processes")

    def run(self) -> dict[Site, Dictionary]:
        self.journal.claim()
        folders = {site: self.output / str(site) for site in self.source.sites}
        if not all((folder / "cfg.json").is_file() for folder in folders.values()):
            self._train()
            self.here.wait()
        return {site: load_dictionary(folder, device=str(self.device)) for site, folder in folders.items()}

    def _train(self) -> None:
        training, trainees = self.training, self._start()
        self._resume(trainees)
        batches = mixed(
            self.source, batch=training.batch // self.here.world, n=training.n_steps - self.step,
            max_norm=self.max_norm, block_tokens=training.block_tokens, seed=training.seed, start=self.position,
        )  # fmt: skip
        for batch in batches:
            losses = {site: self._step(site, trainee, batch.rows[site]) for site, trainee in trainees.items()}
            self.step, self.position = self.step + 1, batch.next
            last = self.step == training.n_steps
            if self.step % _LOG_EVERY == 0 or last:
                self._record(losses)
            if self.evaluate and (last or (training.evaluate_every and self.step % training.evaluate_every == 0)):
                self._record({site: self.evaluate(trainee.dictionary()) for site, trainee in trainees.items()})
            if self.step % training.checkpoint_every == 0 and not last:
                self._checkpoint(trainees)
            if self.progress:
                self.progress(training.batch)
        if self.here.rank == 0:
            for site, trainee in trainees.items():
                _save_whole(trainee, self.output / str(site))
            self.journal.finish()

    def _start(self) -> dict[Site, Trainee]:
        """Limits, scales and first codes come from the first shard, the same in every process."""
        training, source = self.training, self.source
        shard = next(source.shards(0, 0, 1))
        order = torch.randperm(len(next(iter(shard.values()))), generator=torch.Generator().manual_seed(training.seed))[
            :_SAMPLE
        ]
        sample = {site: x[order].float() for site, x in shard.items()}
        norms = {site: x.norm(dim=-1) for site, x in sample.items()}
        sink = float("inf") if training.sink is None else training.sink
        self.max_norm = {site: sink * float(n.median()) for site, n in norms.items()}
        trainees = {}
        for site, x in sample.items():
            job = Job(
                site=site, d_in=x.shape[1], n_steps=training.n_steps, batch=training.batch, lr=training.lr,
                warm_up_steps=int(training.warm_up * training.n_steps),
                decay_steps=int(training.decay * training.n_steps), seed=training.seed, device=self.device,
                max_norm=self.max_norm[site], model_name=source.model_name,
                model_fingerprint=source.model_fingerprint,
            )  # fmt: skip
            trainees[site] = training.architecture(job, x[norms[site] <= self.max_norm[site]].to(self.device))
        return trainees

    def _step(self, site: Site, trainee: Trainee, rows: Tensor) -> dict[str, float]:
        try:
            return trainee.step(rows.to(self.device))
        except NonFinite as error:
            kept = "the last checkpoint is kept" if self.journal.has_checkpoint else "there is no checkpoint yet"
            raise NonFinite(
                f"{site}, step {self.step + 1} (after epoch {self.position.epoch}, shard {self.position.shard}, batch "
                f"{self.position.batch} of the rows): {error}; {kept}: try a lower learning rate, or look at that batch"
            ) from None

    # What is kept on disk.

    def _checkpoint(self, trainees: Mapping[Site, Trainee]) -> None:
        positions = self.here.gather(list(self.position))
        if self.here.rank == 0:
            tensors = {
                f"{site}/{name}": value for site, trainee in trainees.items() for name, value in trainee.state().items()
            }
            self.journal.save(tensors, {"step": self.step, "positions": positions})
        self.here.wait()

    def _resume(self, trainees: Mapping[Site, Trainee]) -> None:
        saved = self.journal.load(str(self.device))
        if saved is not None:
            for site, trainee in trainees.items():
                prefix = f"{site}/"
                own = {n.removeprefix(prefix): t for n, t in saved.tensors.items() if n.startswith(prefix)}
                trainee.restore(own)
            self.step = saved.notes["step"]
            self.position = Position(*saved.notes["positions"][self.here.rank])
            if self.progress:
                self.progress(self.step * self.training.batch)
        if self.here.rank == 0:
            self.journal.trim(self.step)

    def _record(self, values: Mapping[Site, Mapping[str, float]]) -> None:
        if self.here.rank:
            return
        for site, found in values.items():
            self.journal.log(self.step, {"site": str(site), **found})
            if self.log:
                self.log(self.step, site, found)


def _save_whole(trainee: Trainee, folder: Path) -> None:
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    trainee.save(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
