"""The training loop: rows in, a dictionary a site out, and at any moment a checkpoint to go on from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_tensors
from torch import Tensor

from ..activations.mix import Position, RowSource, mixed
from ..activations.processes import Processes
from ..component import Frozen
from ..errors import CorruptArtifact, InvalidConfig, NonFinite
from ..files import write_atomically
from ..lm import Site
from .architecture import Architecture, Job, Trainee
from .base import Dictionary
from .load import load_dictionary

Progress = Callable[[int], None]
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
        self.step = 0
        self.position = Position()
        if training.batch % self.here.world:
            raise InvalidConfig(f"a batch of {training.batch} rows cannot be shared by {self.here.world} processes")

    def run(self) -> dict[Site, Dictionary]:
        self._claim()
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
            (self.output / "checkpoint.safetensors").unlink(missing_ok=True)

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
            kept = "the last checkpoint is kept" if self._checkpoint_path.is_file() else "there is no checkpoint yet"
            raise NonFinite(
                f"{site}, step {self.step + 1} (after epoch {self.position.epoch}, shard {self.position.shard}, batch "
                f"{self.position.batch} of the rows): {error}; {kept}: try a lower learning rate, or look at that batch"
            ) from None

    # What is kept on disk.

    @property
    def _checkpoint_path(self) -> Path:
        return self.output / "checkpoint.safetensors"

    @property
    def _key(self) -> str:
        spec = self.training.model_dump(mode="json", exclude={"checkpoint_every", "evaluate_every"})
        return hashlib.sha256(json.dumps([spec, self.source.key, self.here.world]).encode()).hexdigest()[:16]

    def _claim(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / "training.json"
        mine = {
            "key": self._key, "processes": self.here.world, "model": self.source.model_name,
            "training": self.training.model_dump(mode="json"),
        }  # fmt: skip
        if not path.is_file():
            write_atomically(path, json.dumps(mine, indent=1).encode())
            return
        other = json.loads(path.read_text())
        if other["key"] != self._key:
            raise InvalidConfig(
                f"{self.output} holds another training ({_difference(other, mine)}): use another folder, or delete it"
            )

    def _checkpoint(self, trainees: Mapping[Site, Trainee]) -> None:
        positions = self.here.gather(list(self.position))
        if self.here.rank == 0:
            tensors = {
                f"{site}/{name}": value.detach().cpu().contiguous()
                for site, trainee in trainees.items()
                for name, value in trainee.state().items()
            }
            metadata = {"key": self._key, "step": str(self.step), "positions": json.dumps(positions)}
            write_atomically(self._checkpoint_path, dump_tensors(tensors, metadata))
        self.here.wait()

    def _resume(self, trainees: Mapping[Site, Trainee]) -> None:
        if not self._checkpoint_path.is_file():
            self._trim_log()
            return
        try:
            with safe_open(self._checkpoint_path, "pt", device=str(self.device)) as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CorruptArtifact(
                f"{self._checkpoint_path} cannot be read ({error}): delete it to start anew"
            ) from None
        for site, trainee in trainees.items():
            prefix = f"{site}/"
            trainee.restore({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.step = int(metadata["step"])
        self.position = Position(*json.loads(metadata["positions"])[self.here.rank])
        self._trim_log()
        if self.progress:
            self.progress(self.step * self.training.batch)

    def _record(self, values: Mapping[Site, Mapping[str, float]]) -> None:
        if self.here.rank:
            return
        with (self.output / "log.jsonl").open("a") as file:
            for site, found in values.items():
                file.write(json.dumps({"step": self.step, "site": str(site), **found}) + "\n")
                if self.log:
                    self.log(self.step, site, found)

    def _trim_log(self) -> None:
        """Lines of steps that are about to be taken again go."""
        path = self.output / "log.jsonl"
        if self.here.rank == 0 and path.is_file():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= self.step]
            write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def _save_whole(trainee: Trainee, folder: Path) -> None:
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    trainee.save(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:  # a line that was being written when the process died
        return float("inf")


def _difference(other: Any, mine: Any) -> str:
    theirs, ours = other["training"], mine["training"]
    for key in ours:
        if theirs.get(key) != ours[key] and key not in ("checkpoint_every", "evaluate_every"):
            return f"its {key} is {theirs.get(key)}, asked for is {ours[key]}"
    if other["processes"] != mine["processes"]:
        return f"of {other['processes']} processes, these are {mine['processes']}"
    return "of other rows"
