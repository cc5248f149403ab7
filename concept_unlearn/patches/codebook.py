"""A codebook in place of the residual stream, with codes that it may no longer choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..dictionaries.base import check_width
from ..dictionaries.codebook import Codebook, Mode, straight_through
from ..dictionaries.slice import Encoded
from ..errors import InvalidConfig
from ..gates import Always
from ..lm import LM, Context, EditFn, Site
from .activation import ActivationPatch, part, shared_fields
from .base import Switch
from .opening import Opening
from .origin import Origin


@dataclass(frozen=True, kw_only=True)
class CodebookPatch(ActivationPatch):
    """x' = codebook(x without the banned codes), on content tokens let through (CodeUnlearn, arXiv 2410.10866).

    Padding, BOS and sink tokens are never touched. With no ban it is the codebook model (``error="drop"``) or the
    identity (``error="keep"``).
    """

    codebook: Codebook
    banned: tuple[int, ...] = ()
    mode: Literal["refill", "zero", "prune"] = "refill"
    """What comes of a banned code: the next nearest takes its place; nothing does; or it is not even stored, which
    does what ``refill`` does and leaves ``banned`` empty."""
    error: Literal["drop", "keep"] = "drop"
    """``drop``: the stream is what the codebook writes. ``keep``: what it cannot write stays, x' = x + out(banned) -
    out(none), and a token that chooses no banned code stays bit-identical."""
    kind = "codebook"

    def __post_init__(self) -> None:
        self.check(self.codebook.site)
        codebook, mode = self.codebook, self.mode
        if any(parameter.requires_grad for parameter in codebook.parameters()):
            codebook = codebook.frozen()
        if mode not in ("refill", "zero", "prune") or self.error not in ("drop", "keep"):
            raise InvalidConfig(
                f"mode is refill, zero or prune, and error is drop or keep; given: {mode!r}, {self.error!r}"
            )
        if mode == "prune":
            if self.error != "drop":
                raise InvalidConfig('prune holds no code to take the difference with: use error="drop", or refill')
            codebook = codebook.pruned(self.banned) if self.banned else codebook
            object.__setattr__(self, "banned", ())
        object.__setattr__(self, "codebook", codebook)
        codebook.mask(self.banned, "zero" if mode == "zero" else "refill")
        if not self.banned and self.sensor is None and not isinstance(self.gate, Always):
            raise InvalidConfig(
                f"a {self.gate.kind} gate counts the banned codes, and this patch holds none: give sensor="
            )

    def edits(self, lm: LM, switch: Switch) -> dict[Site, EditFn]:
        return _Application(self, lm, switch).edits()

    def spec(self) -> dict[str, Any]:
        own = {"banned": list(self.banned), "mode": self.mode, "error": self.error, "codebook": self.codebook.spec()}
        return super().spec() | own

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"codebook.{name}": t for name, t in self.codebook.state_dict().items()}

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> CodebookPatch:
        return cls(
            codebook=Codebook.restore(spec["codebook"], part(tensors, "codebook.")),
            banned=tuple(spec["banned"]),
            mode=spec["mode"],
            error=spec["error"],
            **shared_fields(spec, tensors, origin),
        )


class _Application:
    """A codebook patch at work on one model."""

    def __init__(self, patch: CodebookPatch, lm: LM, switch: Switch) -> None:
        self._patch, self._switch = patch, switch
        self._opening = Opening(patch.gate, patch.sensor, lm.device)
        self._mode: Mode = "zero" if patch.mode == "zero" else "refill"
        self._place(patch.codebook, lm.device)

    def edits(self) -> dict[Site, EditFn]:
        return {site: self._at(site) for site in sorted({self._codebook.site} | self._opening.sites)}

    def _place(self, codebook: Codebook, device: torch.device) -> None:
        """On the device of the stream, by a copy where the patch's own is on another."""
        self._codebook = codebook if codebook.codes.device == device else codebook.frozen().to(device)
        self._mask = self._codebook.mask(self._patch.banned, self._mode)
        self._banned = torch.tensor(self._patch.banned, dtype=torch.long, device=device)

    def _at(self, site: Site) -> EditFn:
        senses, writes = site in self._opening.sites, site == self._codebook.site

        def edit(x: Tensor, context: Context) -> Tensor:
            if not self._switch.enabled:
                return x
            if senses:
                self._opening.sense(x, context)
            return self._edited(x, context) if writes else x

        return edit

    def _edited(self, x: Float[Tensor, "batch seq d"], context: Context) -> Float[Tensor, "batch seq d"]:
        patch = self._patch
        check_width(self._codebook, x)
        if self._codebook.codes.device != x.device:
            self._place(self._codebook, x.device)
        codebook, wide = self._codebook, x.float()
        z = codebook.hidden(wide)
        similarity = codebook.similarity(z)
        free = codebook.choose(similarity)
        acts = codebook.share(free, self._banned)
        tokens = context.tokens & (wide.norm(dim=-1) <= codebook.max_norm)
        where = tokens & self._opening.at(acts, tokens, context, first=True)
        refill = self._mask is not None and self._mode == "refill"
        ids = codebook.choose(similarity, self._mask) if refill else free
        q = codebook.average(ids, None if refill else self._mask)
        if patch.error == "keep":
            where = where & (acts > 0).any(-1)
            change = codebook.write(q) - codebook.write(codebook.average(free))
            new = wide + (change if patch.strength == 1 else patch.strength * change)
        else:
            new = codebook.write(straight_through(q, z))
            new = new if patch.strength == 1 else wide + patch.strength * (new - wide)
        return torch.where(where[..., None], new.to(x.dtype), x)


@dataclass(frozen=True)
class CodeSlice:
    """Some codes as a gate's sensor. What they do is decided among all, so it carries the whole codebook."""

    codebook: Codebook
    features: tuple[int, ...]

    @property
    def site(self) -> Site:
        return self.codebook.site

    @property
    def site_out(self) -> Site:
        return self.codebook.site_out

    @property
    def W_dec(self) -> Float[Tensor, "k d_out"]:  # noqa: N802
        chosen = torch.eye(self.codebook.n_features, device=self.codebook.codes.device)[list(self.features)]
        return self.codebook.decode(chosen, chosen) - self.codebook.b_dec

    @property
    def max_norm(self) -> float:
        return self.codebook.max_norm

    @property
    def d_in(self) -> int:
        return self.codebook.d_in

    def encode(self, x: Float[Tensor, "*batch d"]) -> Encoded:
        return Encoded(self.codebook.encode(x)[..., list(self.features)], None)

    def to(self, device: torch.device) -> CodeSlice:
        moved = self.codebook.codes.device != device
        return CodeSlice(self.codebook.frozen().to(device) if moved else self.codebook, self.features)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.codebook.state_dict())

    def spec(self) -> dict[str, Any]:
        return {"kind": "codes", "features": list(self.features), "codebook": self.codebook.spec()}
