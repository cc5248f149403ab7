"""An expert beside the feed-forward of chosen blocks, for those tokens that its router sends to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InvalidConfig, PatchMismatch
from ..gates import SOFTNESS, Always
from ..lm import LM, Context, EditFn, Site
from .activation import ActivationPatch, part, shared_fields
from .base import Switch
from .forget_expert import ForgetExpert
from .opening import Opening
from .origin import Origin


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertPatch(ActivationPatch):
    """y = F(h) + s (E(h) - rho F(h)) at the feed-forwards F of some blocks (after MoExtend, arXiv 2408.03511).

    The router decides from what the feed-forward reads of that token, and of a few before it where it has a window; F
    may be a mixture of experts itself. Tokens with s = 0 stay bit-identical; padding, BOS and what every chat begins
    with are never touched. A ``gate`` narrows it further and reads s.
    """

    experts: Mapping[int, ForgetExpert]
    """By block."""
    rho: Literal[0, 1] = 0
    """0: the expert adds to the feed-forward; 1: it takes its place."""
    sticky: bool = False
    """Once a token of the prompt is let through all later ones are, with the largest s of the prompt so far."""
    kind = "expert"

    def __post_init__(self) -> None:
        if not self.experts:
            raise InvalidConfig("an expert patch needs experts={block: ForgetExpert(...)}")
        if self.rho not in (0, 1):
            raise InvalidConfig(f"rho is 0 (adds to the feed-forward) or 1 (takes its place); given: {self.rho}")
        experts = {layer: self.experts[layer] for layer in sorted(self.experts)}
        if any(p.requires_grad for expert in experts.values() for p in expert.parameters()):
            experts = {layer: expert.frozen() for layer, expert in experts.items()}
        object.__setattr__(self, "experts", experts)
        self.check(Site("mlp_out", min(experts)))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.experts)

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for expert in self.experts.values() for p in expert.parameters())

    def edits(self, lm: LM, switch: Switch) -> dict[Site, EditFn]:
        gate = Opening(self.gate, self.sensor, lm.device)
        placed = {layer: _placed(expert, lm.device) for layer, expert in self.experts.items()}
        work = Experts(placed, rho=self.rho, sticky=self.sticky, gate=gate, strength=self.strength)
        return {site: _switched(edit, switch) for site, edit in work.edits().items()}

    def spec(self) -> dict[str, Any]:
        experts = [
            {
                "layer": layer, "d": expert.d, "width": len(expert.b_in), "threshold": expert.threshold,
                "window": expert.window,
            }
            for layer, expert in self.experts.items()
        ]  # fmt: skip
        return super().spec() | {"rho": self.rho, "sticky": self.sticky, "experts": experts}

    def tensors(self) -> dict[str, Tensor]:
        own = {f"{layer}.{name}": t for layer, e in self.experts.items() for name, t in e.state_dict().items()}
        return super().tensors() | own

    @classmethod
    def restore(cls, spec: dict[str, Any], tensors: dict[str, Tensor], origin: Origin | None) -> ExpertPatch:
        experts = {}
        for entry in spec["experts"]:
            expert = ForgetExpert(
                entry["d"], entry["width"], threshold=entry["threshold"], window=entry.get("window", 1)
            )
            expert.load_state_dict(part(tensors, f"{entry['layer']}."), assign=True)
            experts[entry["layer"]] = expert.requires_grad_(False)
        return cls(experts=experts, rho=spec["rho"], sticky=spec["sticky"], **shared_fields(spec, tensors, origin))


class Experts:
    """Experts at work on one model, trained or only used: what a feed-forward reads is kept until it has answered."""

    def __init__(
        self,
        experts: Mapping[int, ForgetExpert],
        *,
        rho: int = 0,
        sticky: bool = False,
        gate: Opening | None = None,
        strength: float = 1.0,
    ) -> None:
        self._experts, self._rho, self._sticky, self._strength = dict(experts), rho, sticky, strength
        self._opening = gate or Opening(Always(), None, torch.device("cpu"))
        self._read: dict[int, Float[Tensor, "batch seq d"]] = {}

    def edits(self) -> dict[Site, EditFn]:
        sites = {Site(stream, layer) for layer in self._experts for stream in ("mlp_in", "mlp_out")}
        return {site: self._at(site) for site in sorted(sites | self._opening.sites)}

    def _at(self, site: Site) -> EditFn:
        senses, here = site in self._opening.sites, site.layer in self._experts

        def edit(x: Tensor, context: Context) -> Tensor:
            if senses:
                self._opening.sense(x, context)
            if here and site.stream == "mlp_in":
                self._read[site.layer] = x
            if here and site.stream == "mlp_out":
                with torch.autocast(x.device.type, enabled=False):
                    return self._edited(site.layer, x, self._read.pop(site.layer), context)
            return x

        return edit

    def _edited(
        self, layer: int, x: Float[Tensor, "batch seq d"], h: Float[Tensor, "batch seq d"], context: Context
    ) -> Float[Tensor, "batch seq d"]:
        expert = self._experts[layer] = _placed(self._experts[layer], x.device)
        if h.shape[-1] != expert.d or x.shape[-1] != expert.d:
            raise PatchMismatch(f"an expert of width {expert.d} beside a feed-forward of width {h.shape[-1]}")
        h = h.to(expert.router.dtype)
        score = expert.score(h)
        if expert.window > 1:
            score = self._lately(layer, score, expert.window, context)
        s = torch.where(context.text, expert.route(score), 0.0)
        if self._sticky:
            s = self._held(layer, s, context)
        first = layer == min(self._experts)
        where = (s > 0) & self._opening.at(s.detach()[..., None], context.tokens, context, first=first)
        if not where.any():
            return x
        own = x[where].to(torch.promote_types(x.dtype, h.dtype))
        answer = expert(h[where])
        change = expert.calibrated(s[where])[:, None] * (answer - own if self._rho else answer)
        return x.index_put((where,), (own + (change if self._strength == 1 else self._strength * change)).to(x.dtype))

    def _lately(
        self, layer: int, score: Float[Tensor, "batch seq"], window: int, context: Context
    ) -> Float[Tensor, "batch seq"]:
        """The soft maximum over the text of so many tokens up to each, whichever pass they came in."""
        powers = torch.where(context.text, (score.double() / SOFTNESS).exp(), 0.0)
        sums = []
        for name, values in ((f"expert{layer}.power", powers), (f"expert{layer}.seen", context.text.double())):
            past = context.memory.history(name)
            context.memory.extend(name, values.detach())
            before = values.new_zeros(len(values), 0) if past is None else past[:, -(window - 1) :].to(values.device)
            whole = torch.nn.functional.pad(torch.cat([before, values], 1), (window - 1 - before.shape[1], 0))
            sums.append(whole.unfold(1, window, 1).sum(-1))
        mean = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1), 1.0)
        return (SOFTNESS * mean.log()).to(score.dtype)

    def _held(self, layer: int, s: Float[Tensor, "batch seq"], context: Context) -> Float[Tensor, "batch seq"]:
        """At least what a token of the prompt has had so far."""
        name = f"expert{layer}"
        highest = torch.where(context.prompt, s, 0.0).cummax(-1).values
        if (past := context.memory.rows.get(name)) is not None:
            highest = torch.maximum(highest, past[:, None].to(s.device))
        context.memory.rows[name] = highest[:, -1].detach()
        return torch.where(context.text, torch.maximum(s, highest), 0.0)


def _switched(edit: EditFn, switch: Switch) -> EditFn:
    def edited(x: Tensor, context: Context) -> Tensor:
        return edit(x, context) if switch.enabled else x

    return edited


def _placed(expert: ForgetExpert, device: torch.device) -> ForgetExpert:
    """On the device of the stream, by a copy where it is on another."""
    return expert if expert.router.device == device else expert.frozen().to(device)
