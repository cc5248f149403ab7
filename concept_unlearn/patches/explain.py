"""Why a patch did what it did to one prompt: token by token what fired, what the gate said, what the model says now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..component import Frozen
from ..dictionaries import Slice
from ..errors import InvalidConfig
from ..features.show.pieces import Pieces
from ..gates import Always, Gate, Signal
from ..lm import LM, Context, EditFn, Site
from ..lm.context import Memory
from .activation import ActivationPatch
from .base import Patch, Stack, Switch
from .codebook import CodebookPatch, CodeSlice
from .feature import FeaturePatch

_SHOWN = 3
"""Features, and next tokens, that the table shows of each token."""


class Fired(Frozen):
    """A feature that the patch edits, on one token, before it was edited there."""

    site: str
    feature: int
    act: float


class Guess(Frozen):
    """A next token, and how likely the model finds it."""

    text: str
    probability: float


class Moment(Frozen):
    """One token of the prompt."""

    text: str
    fired: tuple[Fired, ...]
    """Of the features that the patch edits, the strongest first."""
    is_open: bool | None
    """What the gate said, of several any; None where no gate was asked."""
    moved: float
    """How far the patch moved its activation, as a share of its norm: at the site where that is most."""
    kl: float
    """KL(before || after) of what comes next, in nats."""
    before: tuple[Guess, ...]
    """What the model expects next, the likeliest first."""
    after: tuple[Guess, ...]


class GateReading(Frozen):
    """What one gate read in the prompt."""

    kind: str
    opened: int
    """Tokens that it let through."""
    statistic: float | None
    """What it compares with its threshold; None for a gate that has none."""
    threshold: float | None


class Explanation(Frozen):
    """What a patch does to one prompt, as plain data: ``model_dump_json()`` for a file, ``table()`` for a terminal."""

    model: str
    patch: str
    strength: float
    prompt: str
    gates: tuple[GateReading, ...]
    """Of each part that has one; an edit without a gate has none."""
    moments: tuple[Moment, ...]

    def table(self) -> RenderableType:
        """A row a token; the whole of it is in ``moments``."""
        table = Table(title=Text(self._title()), title_justify="left", box=None, padding=(0, 2, 0, 0))
        heads = ("token", "fired", "gate", "moved", "KL", "next, before", "next, after")
        for head in heads:
            table.add_column(head, justify="right" if head in ("moved", "KL") else "left", overflow="fold")
        for moment in self.moments:
            gate = "" if moment.is_open is None else "open" if moment.is_open else "closed"
            fired = ", ".join(f"{f.feature}: {f.act:.3g}" for f in moment.fired[:_SHOWN])
            more = len(moment.fired) - _SHOWN
            table.add_row(
                Text(_visible(moment.text), style="bold" if moment.moved else ""),
                Text(fired + (f" +{more}" if more > 0 else "")),
                Text(gate, style="" if moment.is_open else "dim"),
                f"{moment.moved:.0%}" if moment.moved else "",
                f"{moment.kl:.3f}" if moment.kl >= 0.0005 else "",
                Text(_guessed(moment.before)),
                Text(_guessed(moment.after)),
            )
        return table

    def _title(self) -> str:
        lines = [f"{self.patch} patch at strength {self.strength:g} on {self.model}"]
        for gate in self.gates:
            read = f"{gate.kind} gate: {gate.opened} of {len(self.moments)} tokens let through"
            if gate.statistic is not None and gate.threshold is not None:
                read += f"; it read {gate.statistic:.4g}, its threshold is {gate.threshold:.4g}"
            lines.append(read)
        return "\n".join(lines)


@torch.no_grad()
def explain(patch: Patch, lm: LM, prompt: str, *, chat: bool | None = None, guesses: int = 5) -> Explanation:
    """What ``patch`` does to a prompt, read off two passes over it, one without and one with the patch.

    ``chat=None`` asks a model that has a chat template through it. A patch without features, such as one of weights,
    is seen by what the model says alone. The patch's own gates decide; nothing of them is computed anew.
    """
    if guesses < 1:
        raise InvalidConfig(f"guesses are at least 1; given: {guesses}")
    ids = lm.encode(prompt, chat=lm.is_chat if chat is None else chat)
    batch = torch.tensor([ids], device=lm.device)
    mask = torch.ones_like(batch, dtype=torch.bool)
    pieces = Pieces(lm.tokenizer)
    before = lm.logits(batch, mask)[0].float().log_softmax(-1)
    watched, heard = _watched(patch)
    sites = sorted({site for part in _parts(patch) for site in _sites(part, lm)})
    seen, edited = _Seen(), _Seen()
    with ExitStack() as stack:
        stack.enter_context(lm.edit(seen.at(sites)))
        stack.enter_context(watched.on(lm))
        stack.enter_context(lm.edit(edited.at(sites)))
        after = lm.logits(batch, mask)[0].float().log_softmax(-1)
    moved = _moved(seen.x, edited.x, len(ids))
    fired = _fired(patch, seen.x, [token != lm.bos_id for token in ids])
    kl = (before.exp() * (before - after)).nan_to_num(0.0).sum(-1).clamp(min=0).tolist()
    is_open = _any_open([h.open for h in heard if h.open is not None])
    likely = [_guesses(logprobs, pieces, guesses) for logprobs in (before, after)]
    moments = tuple(
        Moment(
            text=pieces.one(token), fired=fired[i], is_open=is_open[i] if is_open else None, moved=moved[i], kl=kl[i],
            before=likely[0][i], after=likely[1][i],
        )
        for i, token in enumerate(ids)
    )  # fmt: skip
    return Explanation(
        model=lm.name, patch=patch.kind, strength=patch.strength, prompt=prompt,
        gates=tuple(h.reading() for h in heard if h.open is not None), moments=moments,
    )  # fmt: skip


class _Heard:
    """What one gate was asked in a pass, and what it said."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.signal: Signal | None = None
        self.open: Bool[Tensor, " seq"] | None = None

    def hear(self, signal: Signal, decision: Bool[Tensor, "batch seq"]) -> None:
        self.signal = self.signal or signal
        now = decision[0].cpu() & signal.tokens[0].cpu() if self.gate.per_token else decision[0].cpu()
        self.open = now if self.open is None else self.open | now

    def reading(self) -> GateReading:
        assert self.signal is not None
        assert self.open is not None
        threshold = getattr(self.gate, "above", None)
        has_statistic = type(self.gate).statistic is not Gate.statistic
        statistic = float(self.gate.statistic(self.signal)[0]) if has_statistic else None
        return GateReading(kind=self.gate.kind, opened=int(self.open.sum()), statistic=statistic, threshold=threshold)


class _Watched(Gate):
    """A gate that says what another says, and who hears of it."""

    gate: Gate
    heard: Any

    def __call__(self, signal: Signal, memory: Memory) -> Tensor:
        decision = self.gate(signal, memory)
        self.heard.hear(signal, decision)
        return decision

    @property
    def per_token(self) -> bool:
        return self.gate.per_token


class _Seen:
    """Activations of a pass, as they were at one moment."""

    def __init__(self) -> None:
        self.x: dict[Site, Float[Tensor, "seq d"]] = {}

    def at(self, sites: Sequence[Site]) -> dict[Site, EditFn]:
        return {site: self._keep(site) for site in sites}

    def _keep(self, site: Site) -> EditFn:
        def keep(x: Tensor, _: Context) -> Tensor:
            self.x[site] = x[0].float().clone()
            return x

        return keep


class _Read(NamedTuple):
    site: Site
    slice: Slice


def _parts(patch: Patch) -> Iterator[Patch]:
    """Of a stack those that are in it."""
    if isinstance(patch, Stack):
        for inner in patch.patches:
            yield from _parts(inner)
    else:
        yield patch


def _watched(patch: Patch) -> tuple[Patch, list[_Heard]]:
    """The same patch, with gates that are heard. An edit without a gate has nothing to hear."""
    if isinstance(patch, Stack):
        pairs = [_watched(inner) for inner in patch.patches]
        return replace(patch, patches=tuple(p for p, _ in pairs)), [h for _, heard in pairs for h in heard]
    if not isinstance(patch, ActivationPatch) or isinstance(patch.gate, Always):
        return patch, []
    heard = _Heard(patch.gate)
    return replace(patch, gate=_Watched(gate=patch.gate, heard=heard)), [heard]


def _sites(patch: Patch, lm: LM) -> set[Site]:
    return set(patch.edits(lm, Switch())) if isinstance(patch, ActivationPatch) else set()


def _reads(patch: Patch) -> list[_Read]:
    """The features that the parts of a patch edit."""
    found: list[_Read] = []
    for part in _parts(patch):
        if isinstance(part, FeaturePatch):
            found += [_Read(s.site, s) for s in part.slices]
        if isinstance(part, CodebookPatch) and part.banned:
            found.append(_Read(part.codebook.site, CodeSlice(part.codebook, part.banned)))
    return found


def _fired(patch: Patch, seen: Mapping[Site, Tensor], is_content: Sequence[bool]) -> list[tuple[Fired, ...]]:
    """Not on BOS or a sink: a patch does not look at those."""
    found: list[list[Fired]] = [[] for _ in is_content]
    for site, chosen in _reads(patch):
        x = seen[site]
        acts = chosen.to(x.device).encode(x).acts
        measured = torch.tensor(is_content, device=x.device) & (x.norm(dim=-1) <= chosen.max_norm)
        for t, k in ((acts != 0) & measured[:, None]).nonzero().tolist():
            found[t].append(Fired(site=str(site), feature=chosen.features[k], act=float(acts[t, k])))
    return [tuple(sorted(own, key=lambda f: -abs(f.act))) for own in found]


def _moved(before: Mapping[Site, Tensor], after: Mapping[Site, Tensor], n: int) -> list[float]:
    most = torch.zeros(n)
    for site, x in before.items():
        share = (after[site] - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12)
        most = torch.maximum(most, share.cpu())
    found: list[float] = most.tolist()
    return found


def _any_open(found: Sequence[Bool[Tensor, " seq"]]) -> list[bool] | None:
    if not found:
        return None
    either: list[bool] = torch.stack(list(found)).any(0).tolist()
    return either


def _guesses(logprobs: Float[Tensor, "seq vocab"], pieces: Pieces, n: int) -> list[tuple[Guess, ...]]:
    top = logprobs.topk(min(n, logprobs.shape[-1]))
    return [
        tuple(Guess(text=pieces.one(i), probability=float(p)) for i, p in zip(ids, shares, strict=True))
        for ids, shares in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    ]


def _guessed(found: Sequence[Guess]) -> str:
    return ", ".join(f"{_visible(g.text)} {g.probability:.0%}" for g in found[:_SHOWN])


def _visible(text: str) -> str:
    return text.strip(" ").replace("\n", "⏎").replace("\t", "⇥") or "␣"
