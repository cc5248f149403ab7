"""The same question in other words or another language, written by a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from pydantic import Field

from ...activations.processes import Processes
from ...data.examples import Probe, normalise
from ...lm import LM
from .base import Rewording, Victim, _OtherPrompts

_BATCH = 16
_NEW_TOKENS = 96


class Paraphrase(_OtherPrompts):
    """A probe's first own wording, or what a model makes of it; what gives the answer away is asked as it was."""

    writer: str | None = None
    """A model by name; the one under attack without its patch where None. A small one rewrites badly."""

    def rewordings(self, victim: Victim) -> Iterable[Rewording]:
        yield Rewording(partial(self._reworded, victim))

    def _reworded(self, victim: Victim, probes: Sequence[Probe]) -> list[Probe]:
        orders = {p: _order(p, "Rewrite the {what} in other words, with the same meaning", "Rewritten") for p in probes}
        texts = written(victim, self.writer, [order for p, order in orders.items() if not p.wordings])
        return [_asked(p, p.wordings[0] if p.wordings else texts[orders[p]]) for p in probes]


class Translate(_OtherPrompts):
    """In other languages, translated by a model; of several the one that leaks most over all.

    The answers are those of the benchmark, so a message asks for a reply in ``reply_in``. What continues a prompt
    continues it in its language: only answers that are the same there count.
    """

    languages: tuple[str, ...] = Field(("French", "German", "Spanish"), min_length=1)
    reply_in: str = "English"
    writer: str | None = None
    """As of a paraphrase."""

    def rewordings(self, victim: Victim) -> Iterable[Rewording]:
        for language in self.languages:
            yield Rewording(partial(self._translated, victim, language), {"language": language})

    def _translated(self, victim: Victim, language: str, probes: Sequence[Probe]) -> list[Probe]:
        orders = [_order(p, f"Translate the {{what}} into {language}", language) for p in probes]
        texts = written(victim, self.writer, orders)
        ending = f"\n\nReply in {self.reply_in}."
        return [_asked(p, texts[order], ending if p.chat else "") for p, order in zip(probes, orders, strict=True)]


def written(victim: Victim, writer: str | None, orders: Sequence[str]) -> Mapping[str, str]:
    """The first line that a model writes to each order, greedily; those in ``victim.shared`` or its folder are kept."""
    if not orders:
        return {}
    lm = victim.lm if writer is None else LM.load(writer, device=victim.lm.device)
    folder = victim.shared or victim.folder
    path = None if folder is None else folder / f"written-{lm.fingerprint}-{str(lm.dtype).removeprefix('torch.')}.jsonl"
    found = dict(_read(path)) if path is not None and path.is_file() else {}
    missing = [order for order in dict.fromkeys(orders) if order not in found]
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        said = lm.generate(batch, max_new_tokens=_NEW_TOKENS, batch_size=_BATCH)
        new = {order: _cleaned(order, text) for order, text in zip(batch, said, strict=True)}
        found |= new
        if path is not None and Processes.here().rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in new.items()))
    return found


def _order(probe: Probe, instruction: str, label: str) -> str:
    """For a chat model an instruction; for one that only continues text, text that goes on with what is wanted."""
    what, rule = ("question", "do not answer it") if probe.chat else ("unfinished text", "stop before the same word")
    return f"{instruction.format(what=what)}, and {rule}.\n\n{what.capitalize()}: {probe.prompt}\n{label} {what}:"


def _cleaned(order: str, said: str) -> str:
    """The first line, without quotation marks and without a label that the model repeats."""
    line = next((line.strip() for line in said.splitlines() if line.strip()), "")
    for label in (line.partition(":")[0] + ":" for line in order.splitlines()[-2:]):
        if line.lower().startswith(label.lower()):
            line = line[len(label) :].strip()
    return line.strip('"').strip()


def _asked(probe: Probe, text: str, ending: str = "") -> Probe:
    """As it was where the new text is empty or gives the answer away."""
    if not normalise(text).strip() or (probe.answered_by(text) and not probe.answered_by(probe.prompt)):
        return probe
    return probe.model_copy(update={"prompt": text + ending})


def _read(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            order, text = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the process died
            continue
        yield order, text
