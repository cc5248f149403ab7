"""What the untouched model says of every row, computed once, before training begins, and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import CorruptArtifact, InvalidConfig
from ..files import save_tensors
from ..lm import LM, Site
from ..lm.head import Ending
from ..step import Batch, LiveReference, Read, Reference, Where, read
from ..tracking import Progress
from .rows import Split


class CachedReference:
    """Each row's values, looked up. Logits are kept as the hidden states that the head makes them from."""

    def __init__(self, live: Reference, kept: Mapping[Read, Sequence[Tensor]]) -> None:
        """``live`` makes logits of hidden states, and answers what could not be kept."""
        self._live, self._kept = live, kept

    def nll(self, split: str, batch: Batch) -> Float[Tensor, " n"]:
        return self._rows(Read(split, "nll", "answer", True), batch)

    def hidden(self, split: str, batch: Batch, where: Where) -> Float[Tensor, "n d"]:
        wanted = Read(split, "logits", where, True)
        return self._rows(wanted, batch) if wanted in self._kept else self._live.hidden(split, batch, where)

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
        return self._live.logits(hidden)

    def activations(self, split: str, batch: Batch, site: Site, where: Where) -> Float[Tensor, "n d"]:
        wanted = Read(split, site, where, True)
        return self._rows(wanted, batch) if wanted in self._kept else self._live.activations(split, batch, site, where)

    def _rows(self, wanted: Read, batch: Batch) -> Tensor:
        return torch.cat([self._kept[wanted][row] for row in batch.rows]).to(batch.ids.device)


def look_up(
    live: LiveReference,
    splits: Mapping[str, Split],
    reads: Iterable[Read],
    *,
    model: str,
    patch: str = "",
    folder: Path | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> CachedReference:
    """What ``reads`` ask of the reference, which is the model of ``live`` as it is now.

    They come from ``folder`` where they are there already; ``model`` is the model's fingerprint, ``patch`` the digest
    of the patch that is on, if there is one.

    Raises InvalidConfig where the folder holds that of another model or of other rows, CorruptArtifact for a file
    that cannot be read. Positions that depend on the padding (where "all") are left to ``live``.
    """
    kept: dict[Read, list[Tensor]] = {}
    by_split: dict[str, list[Read]] = {}
    for wanted in dict.fromkeys(reads):
        if wanted.reference and wanted.where != "all":
            by_split.setdefault(wanted.split, []).append(wanted)
    for name, asked in by_split.items():
        path = None if folder is None else folder / f"reference-{name}.safetensors"
        key = _key(live.lm, model, patch, splits[name])
        found = {} if path is None else _load(path, key, asked)
        if missing := [r for r in asked if r not in found]:
            found |= _compute(live.lm, live.head, splits[name], missing, batch_size, progress)
            if path is not None:
                _save(path, key, found)
        kept |= found
    return CachedReference(live, kept)


@torch.no_grad()
def _compute(
    lm: LM, head: Ending, split: Split, wanted: Sequence[Read], batch_size: int, progress: Progress | None
) -> dict[Read, list[Tensor]]:
    found: dict[Read, list[Tensor]] = {r: [torch.empty(0)] * len(split.rows) for r in wanted}
    sites = sorted({r.what for r in wanted if isinstance(r.what, Site)})
    logits = any(not isinstance(r.what, Site) for r in wanted)
    by_length = sorted(range(len(split.rows)), key=lambda i: (-split.lengths[i], i))
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        batch = split.batch(rows, lm.device)
        said = read(lm, head, batch, logits=logits, sites=sites)
        for r in wanted:
            positions = batch.positions(r.where)
            source = said.activations[r.what] if isinstance(r.what, Site) else said.hidden
            assert source is not None
            values = source[positions]
            if r.what == "nll":
                labels = batch.ids.roll(-1, 1)[positions]
                values = head.each(values, lambda z, i, y=labels: cross_entropy(z, y[i], reduction="none"))  # type: ignore[misc]
            for row, part in zip(rows, values.split(positions.sum(-1).tolist()), strict=True):
                found[r][row] = part.cpu().clone()
        if progress:
            progress(len(rows))
    return found


def _key(lm: LM, model: str, patch: str, split: Split) -> dict[str, str]:
    rows = hashlib.sha256(json.dumps([[row.ids, row.n_prompt] for row in split.rows]).encode()).hexdigest()
    return {"model": lm.name, "fingerprint": model, "patch": patch, "dtype": str(lm.dtype), "rows": rows}


def _load(path: Path, key: Mapping[str, str], wanted: Sequence[Read]) -> dict[Read, list[Tensor]]:
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            theirs = file.metadata()
            for name, value in key.items():
                if theirs.get(name, "") != value and name != "model":
                    raise InvalidConfig(
                        f"{path} is the reference of {theirs.get('model')}, its {name} {theirs.get(name) or 'none'}; "
                        f"here is {key['model']} with {value or 'none'}: use another folder, or delete it"
                    )
            names = set(file.keys())
            found = {}
            for r in wanted:
                if f"{_name(r)}/lengths" in names:
                    lengths = file.get_tensor(f"{_name(r)}/lengths").tolist()
                    found[r] = list(file.get_tensor(_name(r)).split(lengths))
            return found
    except SafetensorError as error:
        raise CorruptArtifact(f"{path} cannot be read ({error}): delete it to have it computed anew") from None


def _save(path: Path, key: dict[str, str], found: Mapping[Read, Sequence[Tensor]]) -> None:
    tensors = {}
    for r, rows in found.items():
        tensors[_name(r)] = torch.cat(list(rows))
        tensors[f"{_name(r)}/lengths"] = torch.tensor([len(row) for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, key)


def _name(r: Read) -> str:
    return f"{r.what}@{r.where}"
