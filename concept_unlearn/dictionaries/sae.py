"""SAELens' sparse autoencoders as dictionaries, with the exact slice of each architecture.

A k-column slice is exact where feature i depends on column i alone: ReLU, JumpReLU (as which BatchTopK and
Matryoshka SAEs are saved) and gated SAEs, and transcoders of these kinds. TopK, AbsTopK and matching
pursuit let features compete, so they are encoded whole. Temporal SAEs and the training classes of BatchTopK
and Matryoshka let tokens compete, so no edit of one token is exact: they are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import DictionaryMismatch, NotExact
from ..lm import Site
from .base import Dictionary, check_features
from .slice import Activation, ColumnSlice, Encoded, Normalisation, Slice

_COLUMNS: dict[str, Activation] = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_WHOLE = {
    "topk": "the k largest pre-activations win, so a feature depends on all the others",
    "abstopk": "the k largest pre-activations win, so a feature depends on all the others",
    "matching_pursuit": "features are picked one after another, each from what the earlier ones left",
}
_REFUSED = {
    "batchtopk": "its top k is taken over the whole batch, so a token depends on its neighbours in it; "
    "save it for inference (SAELens writes it as JumpReLU) and load that",
    "matryoshka_batchtopk": "its top k is taken over the whole batch, so a token depends on its neighbours in "
    "it; save it for inference (SAELens writes it as JumpReLU) and load that",
    "temporal": "it attends over earlier tokens, which a cached decoding step no longer has",
}


class Certificate(NamedTuple):
    """How an architecture may be edited exactly."""

    architecture: str
    columns: bool
    """True: k encoder columns are enough. False: the whole dictionary is encoded."""
    reason: str


def certificate(architecture: str) -> Certificate:
    """Raises NotExact for an architecture that no edit is exact for, or that is not known."""
    if architecture in _COLUMNS:
        return Certificate(architecture, True, "a feature depends on its own encoder column alone")
    if architecture in _WHOLE:
        return Certificate(architecture, False, _WHOLE[architecture])
    why = _REFUSED.get(architecture, f"it is not known here; known: {', '.join([*_COLUMNS, *_WHOLE])}")
    raise NotExact(f"a {architecture!r} dictionary cannot be edited exactly: {why}")


class SAEDictionary:
    """Any SAELens inference SAE. ``site`` overrides what its metadata says, or says nothing about."""

    def __init__(self, sae: Any, *, name: str | None = None, site: str | Site | None = None) -> None:
        metadata = sae.cfg.metadata
        self.sae = sae
        self.architecture: str = sae.cfg.architecture()
        hook = site or metadata.hook_name
        if hook is None:
            raise DictionaryMismatch(
                "this SAE does not say which site it reads; give it: site='blocks.7.hook_resid_post'"
            )
        self.site = Site.parse(hook)
        self.site_out = Site.parse(metadata.hook_name_out) if metadata.hook_name_out else self.site
        self.name = name or f"{metadata.model_name or 'unknown model'}/{self.site}"
        self.model_name: str | None = metadata.model_name
        self.max_norm = float(metadata.max_norm or "inf")
        self.neuronpedia_id: str | None = metadata.neuronpedia_id
        if metadata.hook_head_index is not None:
            raise NotExact(f"{self.name} reads one attention head, which no site here is")

    @property
    def n_features(self) -> int:
        return int(self.sae.cfg.d_sae)

    @property
    def d_in(self) -> int:
        return int(self.sae.cfg.d_in)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n_features"]:
        """SAELens' own encoding. Heads come flattened here, as one head of their joint width."""
        acts: Tensor = self.sae.encode(x.unsqueeze(-2) if self._by_head else x)
        return acts

    @torch.no_grad()
    def decode(self, acts: Float[Tensor, "*batch n_features"], x: Float[Tensor, "*batch d"]) -> Tensor:
        # SAELens keeps the norm of the last input on the module between encode and decode.
        self.sae.process_sae_in(x.unsqueeze(-2) if self._by_head else x)
        y: Tensor = self.sae.decode(acts)
        return y.squeeze(-2) if self._by_head else y

    def slice(self, features: Sequence[int]) -> Slice:
        chosen = check_features(features, self.n_features, self.name)
        certified = certificate(self.architecture)
        columns = self._columns(chosen)
        return columns if certified.columns else WholeSlice(columns=columns, dictionary=self)

    def to(self, device: torch.device) -> SAEDictionary:
        if next(self.sae.parameters()).device != device:
            self.sae.to(device=device)
        return self

    @property
    def _by_head(self) -> bool:
        return bool(self.sae.cfg.reshape_activations == "hook_z")

    @torch.no_grad()
    def _columns(self, chosen: tuple[int, ...]) -> ColumnSlice:
        sae, index = self.sae, torch.tensor(chosen, device=self.sae.W_dec.device)

        def pick(parameter: Tensor) -> Tensor:
            return parameter.detach()[index].float()

        W_enc = sae.W_enc.detach()[:, index].double()
        shift = torch.zeros(len(chosen), dtype=torch.float64, device=index.device)
        if sae.cfg.apply_b_dec_to_input:
            shift = sae.b_dec.detach().double() @ W_enc  # folded once, in float64
        activation = _COLUMNS.get(self.architecture, "relu")
        gated = activation == "gated"
        bias = sae.b_gate if gated else getattr(sae, "b_enc", None)
        own = bias.detach()[index].double() if bias is not None else torch.zeros_like(shift)
        gate_scale = sae.r_mag.detach()[index].double().exp() if gated else None
        W_dec = pick(sae.W_dec)
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # a row of zeros writes nothing
        return ColumnSlice(
            site=self.site,
            site_out=self.site_out,
            features=chosen,
            W_enc=W_enc.float().contiguous(),
            b_enc=(own - shift).float(),
            W_dec=W_dec.contiguous(),
            activation=activation,
            threshold=pick(sae.threshold) if activation == "jumprelu" else None,
            gate_scale=None if gate_scale is None else gate_scale.float(),
            b_mag=None if gate_scale is None else (sae.b_mag.detach()[index].double() - shift * gate_scale).float(),
            normalisation=self._normalisation,
            decode_scale=not hasattr(sae.cfg, "d_out"),
            max_norm=self.max_norm,
        )

    @property
    def _normalisation(self) -> Normalisation:
        """The two kinds that SAELens applies at run time; it folds the others into the weights, or ignores them."""
        found = self.sae.cfg.normalize_activations
        return found if found in ("layer_norm", "constant_norm_rescale") else "none"


@dataclass(frozen=True)
class WholeSlice:
    """A dictionary in which features compete: encoded whole, and of the result only the chosen are kept."""

    columns: ColumnSlice
    """Its decoder rows and normalisation; and which tokens a chosen TopK feature cannot win on."""
    dictionary: SAEDictionary

    @property
    def site(self) -> Site:
        return self.columns.site

    @property
    def site_out(self) -> Site:
        return self.columns.site_out

    @property
    def features(self) -> tuple[int, ...]:
        return self.columns.features

    @property
    def W_dec(self) -> Float[Tensor, "k d_out"]:  # noqa: N802
        return self.columns.W_dec

    @property
    def max_norm(self) -> float:
        return self.columns.max_norm

    @property
    def d_in(self) -> int:
        return self.columns.d_in

    def encode(self, x: Float[Tensor, "*batch d"]) -> Encoded:
        x = x.float()
        acts, scale = self.columns.encode(x)
        index = torch.tensor(self.features, device=x.device)
        if self.dictionary.architecture != "topk":
            return Encoded(self.dictionary.encode(x)[..., index].to(acts.dtype), scale)
        live = (acts > 0).any(-1)  # on the others no chosen feature can be among the k largest and positive
        out = torch.zeros_like(acts)
        if live.any():
            out[live] = self.dictionary.encode(x[live])[..., index].to(acts.dtype)
        return Encoded(out, scale)

    def to(self, device: torch.device) -> WholeSlice:
        return replace(self, columns=self.columns.to(device), dictionary=self.dictionary.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The chosen columns, and the whole dictionary under ``sae.``."""
        whole = self.dictionary.sae.state_dict()
        return self.columns.tensors() | {f"sae.{name}": value for name, value in whole.items()}

    def spec(self) -> dict[str, Any]:
        return self.columns.spec() | {
            "kind": "whole",
            "name": self.dictionary.name,
            "sae": self.dictionary.sae.cfg.to_dict(),
        }

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> WholeSlice:
        from sae_lens import SAE

        sae_cls = SAE.get_sae_class_for_architecture(spec["sae"]["architecture"])
        config = SAE.get_sae_config_class_for_architecture(spec["sae"]["architecture"]).from_dict(
            spec["sae"] | {"dtype": "float32", "device": "cpu"}
        )
        sae = sae_cls(config)
        sae.load_state_dict({n.removeprefix("sae."): t for n, t in tensors.items() if n.startswith("sae.")})
        columns = ColumnSlice.restore(spec, {n: t for n, t in tensors.items() if not n.startswith("sae.")})
        return cls(columns, SAEDictionary(sae, name=spec["name"], site=spec["site"]))


def as_dictionary(found: Any) -> Dictionary:
    """A dictionary as it is; a SAELens SAE wrapped. Raises DictionaryMismatch for anything else."""
    if isinstance(found, Dictionary):
        return found
    if hasattr(found, "cfg") and hasattr(found, "W_dec"):
        return SAEDictionary(found)
    raise DictionaryMismatch(f"neither a dictionary nor a SAELens SAE: {type(found).__name__}")


def restore_slice(spec: dict[str, Any], tensors: dict[str, Tensor]) -> Slice:
    return (WholeSlice if spec["kind"] == "whole" else ColumnSlice).restore(spec, tensors)
