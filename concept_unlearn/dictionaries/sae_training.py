"""SAELens' own architectures and trainer, stepped by our loop, with a state that resumes to the same weights."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ..activations.processes import Processes
from ..errors import InvalidConfig, NonFinite
from .architecture import Architecture, Job
from .base import Dictionary
from .load import load_dictionary
from .quick_topk import quick_class


class _SAE(Architecture):
    """What SAELens' architectures share."""

    d_sae: int = Field(gt=0)
    """Features."""
    dead_after: int = Field(500, gt=0)
    """Steps without firing after which a feature counts as dead; the architectures that can revive it then do."""

    def __call__(self, job: Job, sample: Float[Tensor, "rows d"]) -> SAETrainee:
        return SAETrainee(self, job, sample)

    def options(self) -> dict[str, Any]:
        """SAELens' own settings of this architecture."""
        return self.model_dump(exclude={"d_sae", "dead_after"})


class StandardArchitecture(_SAE):
    """ReLU and an L1 penalty (Bricken et al. 2023)."""

    l1_coefficient: float = 1.0
    l1_warm_up_steps: int = 0


class GatedArchitecture(_SAE):
    """Gated SAE (arXiv 2404.16014)."""

    l1_coefficient: float = 1.0
    l1_warm_up_steps: int = 0


class JumpreluArchitecture(_SAE):
    """JumpReLU and an L0 penalty (arXiv 2407.14435)."""

    l0_coefficient: float = 1.0
    l0_warm_up_steps: int = 0
    jumprelu_init_threshold: float = 0.01
    jumprelu_bandwidth: float = 0.05
    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = "step"
    pre_act_loss_coefficient: float | None = None
    """Pulls dead features back; 3e-6 is Anthropic's."""
    target_l0: float | None = None
    """Of the quadratic mode."""


class TopkArchitecture(_SAE):
    """The k largest of each token (arXiv 2406.04093); dead features are revived by an auxiliary loss."""

    k: int = Field(32, gt=0)
    aux_loss_coefficient: float = 1.0


class BatchtopkArchitecture(_SAE):
    """k a token on average over the batch (arXiv 2412.06410), saved as JumpReLU."""

    k: float = Field(32, gt=0)
    topk_threshold_lr: float = 0.01
    """How fast the saved threshold follows: runs of under about 500 steps need 0.05."""
    aux_loss_coefficient: float = 1.0


class MatryoshkaBatchtopkArchitecture(_SAE):
    """BatchTopK whose first ``matryoshka_widths`` features also reconstruct alone, beside all (arXiv 2503.17547)."""

    matryoshka_widths: tuple[int, ...] = Field(min_length=1)
    k: float = Field(32, gt=0)
    topk_threshold_lr: float = 0.01
    aux_loss_coefficient: float = 1.0

    def options(self) -> dict[str, Any]:
        widths = sorted({*self.matryoshka_widths, self.d_sae})
        if not 0 < widths[0] <= widths[-1] == self.d_sae:
            raise InvalidConfig(f"matryoshka_widths lie between 1 and d_sae {self.d_sae}; given: {widths[:-1]}")
        return super().options() | {"matryoshka_widths": widths}


class SAETrainee:
    """One SAELens trainer. BOS and sinks never reach it; the scale of the rest is folded in when it is saved."""

    def __init__(self, architecture: _SAE, job: Job, sample: Float[Tensor, "rows d"]) -> None:
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        if "k" in type(architecture).model_fields and architecture.k > architecture.d_sae:  # type: ignore[attr-defined]
            raise InvalidConfig(f"k {architecture.k} is more than d_sae {architecture.d_sae}")  # type: ignore[attr-defined]
        self._job, self._processes = job, Processes.here()
        config = SAETrainerConfig(
            total_training_samples=job.n_steps * job.batch, train_batch_size_samples=job.batch,
            lr=job.lr, lr_end=job.lr / 10, lr_warm_up_steps=job.warm_up_steps, lr_decay_steps=job.decay_steps,
            dead_feature_window=architecture.dead_after, feature_sampling_window=10**12, device=str(job.device),
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(job.seed)
            self._sae = _new_sae(architecture, job)
        self._trainer: Any = SAETrainer(config, self._sae, data_provider=iter(()))
        for group in self._trainer.optimizer.param_groups:
            group["fused"] = True
        mean_norm = float(sample.float().norm(dim=-1).mean())
        self._trainer.activation_scaler.scaling_factor = job.d_in**0.5 / mean_norm
        if self._processes.world > 1:
            for parameter in self._sae.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: self._processes.mean(p.grad))

    def step(self, x: Float[Tensor, "rows d"]) -> dict[str, float]:
        output = self._trainer.step(x.float())
        self._trainer.n_training_steps += 1
        self._processes.smallest(self._trainer.n_forward_passes_since_fired)
        if hasattr(self._sae, "topk_threshold"):
            self._processes.mean(self._sae.topk_threshold)
        losses = {name: float(value.detach()) for name, value in output.losses.items()}
        if not torch.isfinite(output.loss):
            raise NonFinite(f"the loss is {losses}")
        acts = output.feature_acts
        return losses | {
            "l0": (acts._nnz() if acts.is_sparse else int((acts > 0).sum())) / len(x),
            "dead": float(self._trainer.dead_neurons.float().mean()),
        }

    def state(self) -> dict[str, Tensor]:
        trainer = self._trainer
        found = {f"sae.{name}": value for name, value in self._sae.state_dict().items()}
        for i, moments in trainer.optimizer.state_dict()["state"].items():
            found |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        return found | {
            "n_steps": torch.tensor(trainer.n_training_steps),
            "scale": torch.tensor(trainer.activation_scaler.scaling_factor, dtype=torch.float64),
            "since_fired": trainer.n_forward_passes_since_fired,
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        trainer = self._trainer
        self._sae.load_state_dict({n.removeprefix("sae."): t for n, t in state.items() if n.startswith("sae.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("adam."):
                _, i, what = name.split(".")
                moments.setdefault(int(i), {})[what] = value
        trainer.optimizer.load_state_dict(trainer.optimizer.state_dict() | {"state": moments})
        n_steps = int(state["n_steps"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a schedule that moves before its optimiser did
            for schedule in (trainer.lr_scheduler, *trainer.coefficient_schedulers.values()):
                for _ in range(n_steps):
                    schedule.step()
        trainer.n_training_steps = n_steps
        trainer.n_training_samples = n_steps * self._job.batch
        trainer.activation_scaler.scaling_factor = float(state["scale"])
        trainer.n_forward_passes_since_fired = state["since_fired"].to(self._job.device)

    def dictionary(self) -> Dictionary:
        with tempfile.TemporaryDirectory() as scratch:
            self.save(Path(scratch))
            return load_dictionary(scratch, device=str(self._job.device))

    def save(self, folder: Path) -> None:
        """As SAELens saves for inference, with what our loader wants to know among the metadata."""
        sae = copy.deepcopy(self._sae)
        sae.fold_activation_norm_scaling_factor(self._trainer.activation_scaler.scaling_factor)
        job = self._job
        if job.site.stream == "hook_z":
            sae.cfg.reshape_activations = "hook_z"
        sae.cfg.metadata.model_name = job.model_name
        sae.cfg.metadata.model_fingerprint = job.model_fingerprint
        sae.cfg.metadata.hook_name = str(job.site)
        sae.cfg.metadata.max_norm = job.max_norm if job.max_norm != float("inf") else None
        sae.cfg.metadata.training_tokens = self._trainer.n_training_steps * job.batch
        sae.save_inference_model(folder)


def _new_sae(architecture: _SAE, job: Job) -> Any:
    from sae_lens.registry import get_sae_training_class

    cls, config_cls = get_sae_training_class(architecture.kind)
    if architecture.kind in ("topk", "batchtopk"):
        cls = quick_class(architecture.kind)
    config = config_cls(
        d_in=job.d_in, d_sae=architecture.d_sae, dtype="float32", device=str(job.device),
        normalize_activations="expected_average_only_in", apply_b_dec_to_input=True, decoder_init_norm=0.1,
        **architecture.options(),
    )  # fmt: skip
    return cls(config)
