"""Training a codebook inside the live model that will run with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ..errors import EmptyData, NonFinite
from ..lm import LM, Context
from .codebook import Codebook
from .codebook_training import Loss, code_loss, relative_error

Log = Callable[[int, Mapping[str, float]], None]


def train_in_model(
    lm: LM,
    batches: Iterable[Mapping[str, Tensor]],
    codebook: Codebook,
    *,
    regime: Literal["frozen", "joint"] = "frozen",
    lr: float = 5e-4,
    loss: Loss = "aeloss",
    commitment: float = 0.25,
    log: Log | None = None,
) -> Codebook:
    """The codebook after one step of Adam a batch in its place in the model; the one given stays as it is.

    ``batches`` are the arguments of a Hugging Face model: ``input_ids``, ``attention_mask``, and ``labels`` for an
    encoder-decoder. ``frozen`` leaves the model alone and minimises KL(p_original || p_bottleneck) where there is a
    target, plus mean |x - out|^2 / |x|^2; ``joint`` trains the model too, on its cross-entropy. Begin with a codebook
    that was initialised or trained on rows of this site. ``log(step, losses)``. Raises EmptyData and NonFinite.
    """
    model = lm.model
    # Adam's steps suit rows of about unit entries, for which W_enc begins with columns of about unit norm
    scale = 1 / float(codebook.W_enc.detach().norm(dim=0).square().mean().sqrt())
    learner = codebook.rescaled(1 / scale).to(lm.device).requires_grad_(True)
    insertion = _Insertion(learner, scale, loss, commitment)
    n_steps = 0
    with _borrowed(model, learns=regime == "joint"):
        learned = [*learner.parameters(), *(p for p in model.parameters() if p.requires_grad)]
        adam = torch.optim.Adam(learned, lr=lr)
        for n_steps, batch in enumerate(batches, 1):
            with torch.no_grad():
                want = _predictions(model, batch)[0] if regime == "frozen" else None
            with lm.edit({codebook.site: insertion}):
                logits, targets = _predictions(model, batch)
            if want is None:
                task = cross_entropy(logits, targets)
                losses = {"cross_entropy": task, "codes": insertion.codes}
            else:
                task = kl_div(logits.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="batchmean")
                losses = {"kl": task, "reconstruction": insertion.reconstruction, "codes": insertion.codes}
            total = torch.stack(list(losses.values())).sum()
            values = {name: value.item() for name, value in losses.items()}
            if not total.isfinite():
                raise NonFinite(f"step {n_steps}: the loss is {values}")
            adam.zero_grad()
            total.backward()
            adam.step()
            if log:
                log(n_steps, values)
    if not n_steps:
        raise EmptyData("no batch to train the codebook on")
    return learner.rescaled(scale).frozen()


class _Insertion:
    """The bottleneck in place of the stream on content tokens that are no sinks, and its own losses of that pass."""

    def __init__(self, codebook: Codebook, scale: float, loss: Loss, commitment: float) -> None:
        self._codebook, self._scale, self._loss, self._commitment = codebook, scale, loss, commitment
        self.reconstruction: Float[Tensor, ""]
        self.codes: Float[Tensor, ""]

    def __call__(self, x: Float[Tensor, "batch seq d"], context: Context) -> Float[Tensor, "batch seq d"]:
        tokens = context.tokens & (x.float().norm(dim=-1) <= self._codebook.max_norm)
        rows = x[tokens].float() / self._scale
        passed = self._codebook.bottleneck(rows, codes_learn=self._loss != "vqvae")
        self.reconstruction = relative_error(rows, passed.out)
        self.codes = code_loss(passed, self._loss, commitment=self._commitment)
        return x.index_put((tokens,), (passed.out * self._scale).to(x.dtype))


def _predictions(model: Any, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "n vocab"], Int[Tensor, " n"]]:
    """Logits in float32 where there is a token to predict, and those tokens."""
    if model.config.is_encoder_decoder:
        logits, labels = model(**batch, use_cache=False).logits, batch["labels"]
        kept: Bool[Tensor, "batch seq"] = labels != -100
        return logits[kept].float(), labels[kept]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    labels = batch.get("labels", ids)
    kept = real[:, 1:] & real[:, :-1] & (labels[:, 1:] != -100)
    return model(**inputs, use_cache=False).logits[:, :-1][kept].float(), labels[:, 1:][kept]


@contextmanager
def _borrowed(model: nn.Module, *, learns: bool) -> Iterator[None]:
    """In train mode if it learns, else in eval mode and out of reach of gradients; afterwards as it was."""
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        model.train(learns)
        for parameter in gradients:
            parameter.grad = None
            if not learns:
                parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, (wanted, gradient) in gradients.items():
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
