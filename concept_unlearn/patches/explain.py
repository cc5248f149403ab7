"""Why a patch did what it did to one prompt: token by token what fired, what the gate said, what the model says now."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..component import Frozen
from ..errors import InvalidConfig
from ..features.show.pieces import Pieces
from ..lm import LM
from .base import Patch
from .watch import Fired, GateReading, Watch

_SHOWN = 3
"""Features, and next tokens, that the table shows of each token."""


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


def explain(patch: Patch, lm: LM, prompt: str, *, chat: bool | None = None, guesses: int = 5) -> Explanation:
    """What ``patch`` does to a prompt, read off two passes over it, one without and one with the patch.

    ``chat=None`` asks a model that has a chat template through it. A patch without features, such as one of weights,
    is seen by what the model says alone. The patch's own gates decide; nothing of them is computed anew.
    """
    ids = lm.encode(prompt, chat=lm.is_chat if chat is None else chat)
    return explain_ids(patch, lm, ids, prompt=prompt, guesses=guesses)


@torch.no_grad()
def explain_ids(patch: Patch, lm: LM, ids: Sequence[int], *, prompt: str, guesses: int = 5) -> Explanation:
    """``explain`` of an encoded prompt, whose text is only told on."""
    if guesses < 1:
        raise InvalidConfig(f"guesses are at least 1; given: {guesses}")
    batch = torch.tensor([list(ids)], device=lm.device)
    mask = torch.ones_like(batch, dtype=torch.bool)
    pieces = Pieces(lm.tokenizer)
    before = lm.logits(batch, mask)[0].float().log_softmax(-1)
    with Watch(patch, lm).on() as watch:
        after = lm.logits(batch, mask)[0].float().log_softmax(-1)
    moved, fired, is_open = watch.moved(len(ids)), watch.fired(ids), watch.is_open()
    kl = (before.exp() * (before - after)).nan_to_num(0.0).sum(-1).clamp(min=0).tolist()
    likely = [_guesses(logprobs, pieces, guesses) for logprobs in (before, after)]
    moments = tuple(
        Moment(
            text=pieces.one(token), fired=fired[i], is_open=is_open[i] if is_open else None, moved=moved[i], kl=kl[i],
            before=likely[0][i], after=likely[1][i],
        )
        for i, token in enumerate(ids)
    )  # fmt: skip
    return Explanation(
        model=lm.name, patch=patch.kind, strength=patch.strength, prompt=prompt, gates=watch.readings(), moments=moments
    )


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
