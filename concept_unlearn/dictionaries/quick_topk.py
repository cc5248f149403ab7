"""SAELens' TopK and BatchTopK with the same losses to rounding, for a third of the arithmetic.

A few dozen of thousands of features win on a token, so only the encoder's forward and the gradient of the winners need
a dense product: the decoder, and the gradients of all weights, go over the winning pairs (row, feature) alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


class Winners(NamedTuple):
    """Pairs of a row and a feature that is active on it, by row."""

    rows: Int[Tensor, " active"]
    columns: Int[Tensor, " active"]

    def where(self, keep: Bool[Tensor, " active"]) -> Winners:
        return Winners(self.rows[keep], self.columns[keep])


@cache
def quick_class(architecture: str) -> Any:
    """A subclass of SAELens' training class. A function, because SAELens is slow to import."""
    from sae_lens import BatchTopKTrainingSAE, TopKTrainingSAE
    from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

    base = {"topk": TopKTrainingSAE, "batchtopk": BatchTopKTrainingSAE}[architecture]

    class Quick(base):  # type: ignore[misc, valid-type]
        low = 0.0
        """A bound under which no feature of the last batch won; it saves sorting and decides nothing."""

        def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
            sae_in = step_input.sae_in.to(self.dtype)
            with torch.no_grad():
                x = sae_in - self.b_dec
                pre = x @ self.W_enc + self.b_enc
                scaled = pre * self.W_dec.norm(dim=-1)
                won = self._of_batch(scaled) if architecture == "batchtopk" else _of_rows(scaled, self.cfg.k)
                acts = scaled[won]
            sae_out = SparsePass.apply(x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, won, pre[won])
            mse = self.mse_loss_fn(sae_out, sae_in).sum(dim=-1).mean()
            aux = self._revive(sae_in, (sae_in - sae_out).detach(), step_input.dead_neuron_mask)
            if architecture == "batchtopk":
                self.update_topk_threshold(acts)
            sparse = torch.sparse_coo_tensor(
                torch.stack(won), acts, pre.shape, is_coalesced=True, check_invariants=False
            )
            return TrainStepOutput(
                sae_in=sae_in, sae_out=sae_out, hidden_pre=pre, feature_acts=sparse, loss=mse + aux,
                losses={"mse_loss": mse, "auxiliary_reconstruction_loss": aux},
            )  # fmt: skip

        def _of_batch(self, scaled: Float[Tensor, "rows n_features"]) -> Winners:
            """The k largest a row on average, over all rows."""
            n = int(self.cfg.k * len(scaled))
            candidates = Winners(*(scaled > self.low).nonzero(as_tuple=True))
            if len(candidates.rows) < n:
                candidates = Winners(*(scaled > 0).nonzero(as_tuple=True))
            values = scaled[candidates]
            if len(values) <= n:
                return candidates
            cut = values.topk(n, sorted=False).values.min()
            self.low = 0.8 * float(cut)
            return candidates.where(values >= cut)

        def _revive(
            self, sae_in: Tensor, missed: Float[Tensor, "rows d"], dead_neuron_mask: Bool[Tensor, " n"] | None
        ) -> Float[Tensor, ""]:
            """The auxiliary loss: dead features, half of d_in at most, are to explain what the others missed."""
            dead = torch.tensor([]) if dead_neuron_mask is None else dead_neuron_mask.nonzero()[:, 0]
            if not len(dead):
                return missed.new_tensor(0.0)
            k_aux, decoder = self.cfg.d_in // 2, self.W_dec[dead]
            pre = (sae_in - self.b_dec) @ self.W_enc[:, dead] + self.b_enc[dead]
            if len(dead) > k_aux:
                chosen = (pre * decoder.norm(dim=-1)).topk(k_aux, sorted=False).indices
                pre = torch.zeros_like(pre).scatter(-1, chosen, pre.gather(-1, chosen))
            weight = float(self.cfg.aux_loss_coefficient) * min(len(dead) / k_aux, 1.0)
            loss: Tensor = weight * (pre @ decoder - missed).pow(2).sum(-1).mean()
            return loss

    return Quick


class SparsePass(torch.autograd.Function):
    """b_dec + sum over the winners of (x W_enc + b_enc)_j W_dec_j, where x = sae_in - b_dec; ``values`` are their
    pre-activations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "rows d"],
        W_enc: Float[Tensor, "d n"],
        b_enc: Float[Tensor, " n"],
        W_dec: Float[Tensor, "n d"],
        b_dec: Float[Tensor, " d"],
        won: Winners,
        values: Float[Tensor, " active"],
    ) -> Float[Tensor, "rows d"]:
        ctx.save_for_backward(x, W_enc, W_dec, *won, values)
        return _sums(W_dec, won.columns, values, won.rows, len(x)) + b_dec

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = gradients
        x, W_enc, W_dec, rows, columns, values = ctx.saved_tensors
        of_pre = (out @ W_dec.T)[rows, columns]
        order, n = columns.argsort(stable=True), len(W_dec)
        rows, columns, values, by_column = rows[order], columns[order], values[order], of_pre[order]
        of_W_dec = _sums(out, rows, values, columns, n)
        of_W_enc = _sums(x, rows, by_column, columns, n).T.contiguous()
        of_b_enc = torch.zeros(n, dtype=out.dtype, device=out.device).index_add_(0, columns, by_column)
        return None, of_W_enc, of_b_enc, of_W_dec, out.sum(0) - W_enc @ of_b_enc, None, None


def _sums(
    vectors: Float[Tensor, "m d"],
    which: Int[Tensor, " active"],
    weights: Float[Tensor, " active"],
    owners: Int[Tensor, " active"],
    n: int,
) -> Float[Tensor, "n d"]:
    """For each of n owners, in ascending order, the weighted sum of its vectors."""
    counts = owners.bincount(minlength=n)
    return embedding_bag(which, vectors, counts.cumsum(0) - counts, mode="sum", per_sample_weights=weights)


def _of_rows(scaled: Float[Tensor, "rows n_features"], k: int) -> Winners:
    """The k largest of each row, where they are positive."""
    top = scaled.topk(k, dim=-1, sorted=False)
    rows = torch.arange(len(scaled), device=scaled.device).repeat_interleave(k)
    columns, order = top.indices.sort(dim=-1)
    return Winners(rows, columns.flatten()).where(top.values.gather(-1, order).flatten() > 0)
