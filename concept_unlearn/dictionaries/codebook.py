"""A discrete bottleneck: an activation written as the mean of a few codes out of many (CodeUnlearn, 2410.10866).

The mechanics are those of codebook-features (arXiv 2310.17230).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Self

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, normalize

from ..errors import CorruptArtifact, InvalidConfig, NotExact
from ..files import write_atomically
from ..lm import Site
from .base import check_features

Distance = Literal["cosine", "euclidean"]
Mode = Literal["refill", "zero"]

WEIGHTS = "codebook.safetensors"


class Bottleneck(NamedTuple):
    """What one pass computes."""

    out: Float[Tensor, "*batch d"]
    z: Float[Tensor, "*batch d_code"]
    q: Float[Tensor, "*batch d_code"]
    ids: Int[Tensor, "*batch n_groups n_active"]


class Codebook(nn.Module):
    """z = relu(x W_enc + b_enc); q = mean of the S codes nearest to z; out = q W_dec + b_dec.

    The magnitude of z is not passed on. Several groups each have codes of their own over their slice of z, S of
    them active, for attention heads at ``hook_z``. As a dictionary: a code's activation is 1/S where it is
    chosen and 0 elsewhere. Computes in float32, also under autocast.
    """

    def __init__(
        self,
        *,
        site: Site,
        d_in: int,
        sizes: Sequence[int],
        n_active: int = 8,
        d_code: int | None = None,
        distance: Distance = "cosine",
        name: str = "codebook",
        max_norm: float = float("inf"),
        model_name: str = "",
        model_fingerprint: str = "",
        seed: int = 0,
    ) -> None:
        """``sizes`` are the codes of each group; all weights are random, by ``seed``. Raises InvalidConfig."""
        super().__init__()
        d_code = d_code or d_in
        self.name, self.site, self.site_out, self.d_in, self.max_norm = name, site, site, d_in, max_norm
        self.model_name, self.model_fingerprint = model_name, model_fingerprint
        self.sizes, self.n_active, self.distance = tuple(sizes), n_active, distance
        if not sizes or d_code % len(sizes):
            raise InvalidConfig(f"{len(sizes)} groups of codes do not divide d_code {d_code} evenly")
        if not 0 < n_active <= min(sizes):
            raise InvalidConfig(f"{n_active} codes cannot be active in a group that has {min(sizes)}")
        generator = torch.Generator().manual_seed(seed)
        d_group = d_code // len(sizes)
        self.W_enc = nn.Parameter(torch.randn(d_in, d_code, generator=generator) / d_in**0.5)
        self.b_enc = nn.Parameter(torch.zeros(d_code))
        self.codes = nn.Parameter(torch.randn(sum(sizes), d_group, generator=generator).relu())
        self.W_dec = nn.Parameter(torch.randn(d_code, d_in, generator=generator) / d_code**0.5)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self._unit: tuple[tuple[int, int], Tensor] | None = None

    @property
    def n_features(self) -> int:
        return len(self.codes)

    @property
    def groups(self) -> Int[Tensor, " n_codes"]:
        """Which group each code is of."""
        sizes = torch.tensor(self.sizes, device=self.codes.device)
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)

    def forward(
        self,
        x: Float[Tensor, "*batch d"],
        banned: Sequence[int] = (),
        *,
        mode: Mode = "refill",
        renormalise: bool = False,
    ) -> Float[Tensor, "*batch d"]:
        """Without the banned codes: the next nearest take their place (``refill``), or they are chosen and left out
        of the sum (``zero``), which is still divided by S unless ``renormalise``.
        """
        mask = self.mask(banned, mode)
        z = self.hidden(x)
        ids = self.choose(self.similarity(z), mask if mode == "refill" else None)
        q = self.average(ids, mask if mode == "zero" else None, renormalise=renormalise)
        return self.write(straight_through(q, z))

    def bottleneck(self, x: Float[Tensor, "*batch d"], *, codes_learn: bool = True) -> Bottleneck:
        """For training; ``codes_learn=False`` keeps the gradient of ``out`` from the codes."""
        z = self.hidden(x)
        ids = self.choose(self.similarity(z))
        q = self.average(ids)
        return Bottleneck(self.write(straight_through(q if codes_learn else q.detach(), z)), z, q, ids)

    # The steps of a pass.

    def hidden(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_code"]:
        """z."""
        with _full_precision(x):
            return (x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc).relu()

    @torch.no_grad()
    def similarity(self, z: Float[Tensor, "*batch d_code"]) -> Float[Tensor, "*batch n_codes"]:
        """Of each code to its group's slice of z: cos(z, c), 0 where a norm is 0; or |z|^2 - |z - c|^2."""
        found = []
        codes_of = (self._directions() if self.distance == "cosine" else self.codes).split(self.sizes)
        with _full_precision(z):
            for part, codes in zip(z.chunk(len(self.sizes), -1), codes_of, strict=True):
                if self.distance == "cosine":
                    found.append(normalize(part, dim=-1) @ codes.T)
                else:
                    found.append(2 * part @ codes.T - codes.square().sum(-1))
        return torch.cat(found, -1)

    def choose(
        self, similarity: Float[Tensor, "*batch n_codes"], banned: Bool[Tensor, " n_codes"] | None = None
    ) -> Int[Tensor, "*batch n_groups n_active"]:
        """The S nearest of each group, ascending; ties to the lowest id."""
        if banned is not None:
            similarity = similarity.masked_fill(banned, -torch.inf)
        starts = accumulate((0, *self.sizes[:-1]))
        groups = zip(similarity.split(self.sizes, -1), starts, strict=True)
        return torch.stack([_largest(group, self.n_active) + start for group, start in groups], -2)

    def average(
        self,
        ids: Int[Tensor, "*batch n_groups n_active"],
        dropped: Bool[Tensor, " n_codes"] | None = None,
        *,
        renormalise: bool = False,
    ) -> Float[Tensor, "*batch d_code"]:
        """q."""
        weights = torch.ones(ids.shape, dtype=self.codes.dtype, device=ids.device)
        if dropped is not None:
            weights = weights.masked_fill(dropped[ids], 0.0)
        weights = weights / (weights.sum(-1, keepdim=True).clamp(min=1) if renormalise else self.n_active)
        flat, shares = ids.flatten(0, -2), weights.flatten(0, -2)
        q = embedding_bag(flat, self.codes, mode="sum", per_sample_weights=shares)
        return q.view(*ids.shape[:-2], -1)

    def write(self, q: Float[Tensor, "*batch d_code"]) -> Float[Tensor, "*batch d"]:
        with _full_precision(q):
            return q @ self.W_dec + self.b_dec

    def mask(self, banned: Sequence[int], mode: Mode = "refill") -> Bool[Tensor, " n_codes"] | None:
        """None for no ban. Raises InvalidConfig for ids it has not, and where ``refill`` runs out of codes."""
        if not len(banned):
            return None
        chosen = check_features(banned, self.n_features, self.name)
        mask = torch.zeros(self.n_features, dtype=torch.bool, device=self.codes.device)
        mask[list(chosen)] = True
        left = min(int((~part).sum()) for part in mask.split(self.sizes))
        if mode == "refill" and left < self.n_active:
            raise InvalidConfig(f"these bans leave {left} codes of a group of {self.name}; it needs {self.n_active}")
        return mask

    def share(
        self, ids: Int[Tensor, "*batch n_groups n_active"], features: Int[Tensor, " k"]
    ) -> Float[Tensor, "*batch k"]:
        """The activations of these codes where ``ids`` are chosen."""
        return (ids.flatten(-2)[..., None] == features).any(-2).to(self.codes.dtype) / self.n_active

    def _directions(self) -> Float[Tensor, "n_codes d_group"]:
        """The codes at unit norm; computed once for as long as they stay what they are."""
        state = (self.codes.data_ptr(), 0 if self.codes.is_inference() else self.codes._version)
        if self.codes.requires_grad or self._unit is None or self._unit[0] != state:
            self._unit = (state, normalize(self.codes.detach(), dim=-1))
        return self._unit[1]

    # As a dictionary.

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n_codes"]:
        similarity = self.similarity(self.hidden(x))
        ids = self.choose(similarity).flatten(-2)
        return torch.zeros_like(similarity).scatter_(-1, ids, 1 / self.n_active)

    @torch.no_grad()
    def decode(self, acts: Float[Tensor, "*batch n_codes"], x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        groups = zip(acts.split(self.sizes, -1), self.codes.split(self.sizes), strict=True)
        with _full_precision(acts):
            return self.write(torch.cat([part @ codes for part, codes in groups], -1))

    def slice(self, features: Sequence[int]) -> NoReturn:
        raise NotExact(
            f"the codes of {self.name} compete for {self.n_active} places: use CodebookPatch or the ban method"
        )

    # Others like it.

    def frozen(self) -> Codebook:
        """A copy that no gradient reaches."""
        return copy.deepcopy(self).requires_grad_(False)

    def pruned(self, banned: Sequence[int]) -> Codebook:
        """A frozen copy that holds no trace of these codes and writes what ``refill`` does, bit for bit."""
        mask = self.mask(banned)
        if mask is None:
            return self.frozen()
        spec = self.spec() | {"sizes": [int((~part).sum()) for part in mask.split(self.sizes)]}
        return self.restore(spec, self.state_dict() | {"codes": self.codes[~mask]})

    @torch.no_grad()
    def rescaled(self, by: float) -> Codebook:
        """A copy that does to ``by * x`` what this one does to x, and writes ``by`` times as much. Its ``max_norm``
        is the same.
        """
        other = copy.deepcopy(self)
        other.W_enc.div_(by)
        other.W_dec.mul_(by)
        other.b_dec.mul_(by)
        return other

    # Saved.

    def spec(self) -> dict[str, Any]:
        """All but the weights, as plain data."""
        return {
            "name": self.name,
            "site": str(self.site),
            "d_in": self.d_in,
            "d_code": self.W_enc.shape[1],
            "sizes": list(self.sizes),
            "n_active": self.n_active,
            "distance": self.distance,
            "max_norm": self.max_norm if self.max_norm != float("inf") else None,
            "model_name": self.model_name,
            "model_fingerprint": self.model_fingerprint,
        }

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        bound = float("inf") if spec["max_norm"] is None else spec["max_norm"]
        made = cls(**spec | {"site": Site.parse(spec["site"]), "max_norm": bound})
        made.load_state_dict(tensors)
        return made.to(tensors["codes"].device).requires_grad_(False)

    def save(self, folder: Path) -> None:
        """``cfg.json``, with the hash of the weights, and ``codebook.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        content = dump_tensors({name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()})
        config = {"architecture": "codebook", **self.spec(), "sha256": hashlib.sha256(content).hexdigest()}
        write_atomically(folder / WEIGHTS, content)
        write_atomically(folder / "cfg.json", json.dumps(config, indent=1).encode())

    @classmethod
    def load(cls, folder: Path, *, name: str | None = None, site: str | Site | None = None) -> Self:
        """Frozen; by another name or for another site, where one is given. Raises CorruptArtifact."""
        try:
            config = json.loads((folder / "cfg.json").read_text())
            content = (folder / WEIGHTS).read_bytes()
            if hashlib.sha256(content).hexdigest() != config.pop("sha256"):
                raise CorruptArtifact(f"{folder / WEIGHTS} is truncated or altered: cfg.json has another SHA-256")
            del config["architecture"]
            found = cls.restore(config, load_tensors(content))
        except (
            SafetensorError,
            FileNotFoundError,
            InvalidConfig,
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise CorruptArtifact(f"{folder} is not a whole codebook: {error}") from error
        found.name = name or found.name
        found.site = found.site_out = Site.parse(site or found.site)
        return found


def straight_through(q: Float[Tensor, "*batch d_code"], z: Float[Tensor, "*batch d_code"]) -> Tensor:
    """q, with dL/dz = dL/dq."""
    return q + (z - z.detach()) if z.requires_grad else q


def _largest(values: Float[Tensor, "*batch n"], k: int) -> Int[Tensor, "*batch k"]:
    """Indices of the k largest, ascending. Of equal ones topk takes any: those rows are sorted instead."""
    top, ids = values.topk(k)
    tied = (values >= top[..., -1:]).sum(-1) > k
    if tied.any():
        ids[tied] = values[tied].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return ids.sort(dim=-1).values


def _full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)
