"""Training a codebook on rows of an activation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, distributed

from ..activations.processes import Processes
from ..errors import NonFinite
from .architecture import Architecture, Job
from .codebook import Bottleneck, Codebook, Distance

Loss = Literal["base", "aeloss", "vqvae", "fullaeloss"]
"""What reaches the codes and, beside the straight-through gradient, the encoder, with mse = mean |z - q|^2:

base        codes: the task's gradient.
aeloss      codes: the task's and that of mse.
vqvae       codes: that of mse alone;        encoder: b times that of mse(z, sg[q]).
fullaeloss  codes: the task's and that of mse; encoder: b times that of mse(z, sg[q]).
"""
_LLOYD_STEPS = 10
_CHUNK = 2048
_RIDGE = 1e-2


class CodebookArchitecture(Architecture):
    """CodeUnlearn's bottleneck (arXiv 2410.10866), trained to reconstruct: mean |x - out|^2 / |x|^2."""

    n_codes: int = Field(4096, gt=0)
    n_active: int = Field(8, gt=0)
    """Of each group."""
    d_code: int | None = Field(None, gt=0)
    """Width of the encoder; none: of the activation."""
    n_groups: int = Field(1, gt=0)
    """Each with an equal share of the codes and of the encoder's width."""
    distance: Distance = "cosine"
    loss: Loss = "aeloss"
    commitment: float = Field(0.25, ge=0)
    """b of ``vqvae`` and ``fullaeloss``."""
    train_encoder: bool = False
    """Straight through the choice. On SmolLM2 usage collapsed under it; a fixed encoder is a random projection."""
    init: Literal["data", "kmeans", "random"] = "kmeans"
    dead_after: int = Field(500, gt=0)
    """Steps without use after which a code is put on a random current input."""

    def __call__(self, job: Job, sample: Float[Tensor, "rows d"]) -> CodebookTrainee:
        return CodebookTrainee(self, job, sample)


class CodebookTrainee:
    """Works on rows of about unit entries; the scale is folded into the weights of what it gives away."""

    def __init__(self, architecture: CodebookArchitecture, job: Job, sample: Float[Tensor, "rows d"]) -> None:
        self._architecture, self._job, self._processes = architecture, job, Processes.here()
        self._generator = torch.Generator().manual_seed(job.seed)
        self._scale = float(sample.float().norm(dim=-1).mean()) / job.d_in**0.5 or 1.0
        n, rest = divmod(architecture.n_codes, architecture.n_groups)
        sizes = [n + (i < rest) for i in range(architecture.n_groups)]
        self._codebook = Codebook(
            site=job.site, d_in=job.d_in, sizes=sizes, n_active=architecture.n_active, d_code=architecture.d_code,
            distance=architecture.distance, name=f"{job.model_name}/{job.site}", max_norm=job.max_norm,
            model_name=job.model_name, model_fingerprint=job.model_fingerprint, seed=job.seed,
        ).to(job.device)  # fmt: skip
        _initialise(self._codebook, sample.float() / self._scale, architecture.init)
        for parameter in (self._codebook.W_enc, self._codebook.b_enc):
            parameter.requires_grad_(architecture.train_encoder)
        learned = [parameter for parameter in self._codebook.parameters() if parameter.requires_grad]
        self._adam = torch.optim.Adam(learned, lr=job.lr)
        self._n_steps = 0
        self._idle = torch.zeros(architecture.n_codes, dtype=torch.long, device=job.device)

    def step(self, x: Float[Tensor, "rows d"]) -> dict[str, float]:
        x = x.float() / self._scale
        passed = self._codebook.bottleneck(x, codes_learn=self._architecture.loss != "vqvae")
        reconstruction = relative_error(x, passed.out)
        loss = reconstruction + code_loss(passed, self._architecture.loss, commitment=self._architecture.commitment)
        self._adam.zero_grad()
        loss.backward()
        commitment = (passed.z - passed.q).detach().square().sum(-1).mean()
        counts = passed.ids.flatten().bincount(minlength=len(self._idle)).double()
        found = torch.stack([loss.detach(), reconstruction.detach(), commitment])
        for shared in (found, counts, *(p.grad for p in self._codebook.parameters() if p.grad is not None)):
            self._processes.mean(shared)
        losses = dict(zip(("loss", "reconstruction", "commitment"), found.tolist(), strict=True))
        if not found.isfinite().all():
            raise NonFinite(f"the loss is {losses}")
        self._adam.param_groups[0]["lr"] = self._lr()
        self._adam.step()
        self._n_steps += 1
        self._reseed(counts, passed.z.detach())
        share = counts / counts.sum()
        entropy = -share.xlogy(share).sum()
        return losses | {"usage_entropy": float(entropy), "codes_used": float((counts > 0).double().mean())}

    def state(self) -> dict[str, Tensor]:
        found = {f"codebook.{name}": t for name, t in self._codebook.state_dict().items()}
        for i, moments in self._adam.state_dict()["state"].items():
            found |= {f"adam.{i}.{name}": t for name, t in moments.items()}
        found |= {
            "n_steps": torch.tensor(self._n_steps),
            "scale": torch.tensor(self._scale, dtype=torch.float64),
            "idle": self._idle,
            "generator": self._generator.get_state(),
        }
        return {name: t.detach().clone() for name, t in found.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("adam."):
                _, i, what = name.split(".")
                moments.setdefault(int(i), {})[what] = value.clone()
        self._adam.load_state_dict(self._adam.state_dict() | {"state": moments})
        weights = {n.removeprefix("codebook."): t for n, t in state.items() if n.startswith("codebook.")}
        self._codebook.load_state_dict(weights)
        self._n_steps, self._scale = int(state["n_steps"]), float(state["scale"])
        self._idle = state["idle"].to(self._job.device, copy=True)
        self._generator.set_state(state["generator"].cpu())

    def dictionary(self) -> Codebook:
        return self._codebook.rescaled(self._scale).frozen()

    def save(self, folder: Path) -> None:
        self.dictionary().save(folder)

    def _lr(self) -> float:
        """A linear rise, a plateau, and a linear fall to a tenth at the last step."""
        job, done = self._job, self._n_steps
        rise = min((done + 1) / max(job.warm_up_steps, 1), 1.0)
        fall = min(max(job.n_steps - 1 - done, 0) / max(job.decay_steps, 1), 1.0)
        return job.lr * rise * (0.1 + 0.9 * fall)

    @torch.no_grad()
    def _reseed(self, counts: Float[Tensor, " n_codes"], z: Float[Tensor, "rows d_code"]) -> None:
        """Every process puts the same dead codes on the same rows: those of the first."""
        self._idle = torch.where(counts > 0, 0, self._idle + 1)
        dead = self._idle >= self._architecture.dead_after
        n_dead = int(dead.sum())
        if not n_dead:
            return
        codes = self._codebook.codes
        rows = z[torch.randint(len(z), (n_dead,), generator=self._generator).to(z.device)]
        slices = rows.unflatten(-1, (-1, codes.shape[1]))
        new = slices[torch.arange(n_dead, device=z.device), self._codebook.groups[dead]].contiguous()
        if self._processes.world > 1:
            distributed.broadcast(new, 0)
        codes[dead] = new
        for name in ("exp_avg", "exp_avg_sq"):
            self._adam.state[codes][name][dead] = 0.0
        self._idle[dead] = 0


def relative_error(x: Float[Tensor, "rows d"], out: Float[Tensor, "rows d"]) -> Float[Tensor, ""]:
    """mean |x - out|^2 / |x|^2."""
    return ((x - out).square().sum(-1) / x.square().sum(-1).clamp(min=1e-12)).mean()


def code_loss(passed: Bottleneck, loss: Loss, *, commitment: float = 0.25) -> Float[Tensor, ""]:
    """What is added to the task's loss; both terms are means over tokens."""
    z, q = passed.z, passed.q

    def mse(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum(-1).mean()

    total = z.new_zeros(())
    if loss != "base":
        total = total + mse(z.detach(), q)
    if loss in ("vqvae", "fullaeloss"):
        total = total + commitment * mse(z, q.detach())
    return total


@torch.no_grad()
def _initialise(codebook: Codebook, x: Float[Tensor, "rows d"], init: str) -> None:
    """The encoder reads centred rows, codes are hidden vectors of rows, the decoder is fitted to them by ridge."""
    mean = x.mean(0)
    codebook.b_enc.copy_(-mean @ codebook.W_enc)
    z = codebook.hidden(x)
    if init != "random":
        for codes, part in zip(codebook.codes.split(codebook.sizes), z.chunk(len(codebook.sizes), -1), strict=True):
            codes[: len(part)] = part[: len(codes)]
    if init == "kmeans":
        for _ in range(_LLOYD_STEPS):
            _lloyd(codebook, z)
    q = torch.cat([codebook.average(codebook.choose(codebook.similarity(part))) for part in z.split(_CHUNK)])
    centred, wide = (q - q.mean(0)).double(), (x - mean).double()
    gram = centred.T @ centred
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + 1e-12)
    codebook.W_dec.copy_(torch.linalg.solve(gram, centred.T @ wide))
    codebook.b_dec.copy_(mean - q.mean(0) @ codebook.W_dec)


def _lloyd(codebook: Codebook, z: Float[Tensor, "rows d_code"]) -> None:
    """One step of k-means in each group, by the codebook's own distance. Codes without rows stay."""
    sums, counts = torch.zeros_like(codebook.codes), torch.zeros(codebook.n_features, device=z.device)
    for rows in z.split(_CHUNK):
        first = 0
        similarity = codebook.similarity(rows).split(codebook.sizes, -1)
        for part, group in zip(rows.chunk(len(codebook.sizes), -1), similarity, strict=True):
            nearest = group.argmax(-1) + first
            sums.index_add_(0, nearest, part)
            counts += nearest.bincount(minlength=len(counts))
            first += group.shape[1]
    codebook.codes.copy_(torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), codebook.codes))
