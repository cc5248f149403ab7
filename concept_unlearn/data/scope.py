"""What is to be forgotten, what is to be kept, and how to tell: a folder of JSON Lines files.

    forget.jsonl     passages of the concept                                                   required
    near.jsonl       passages of neighbouring concepts, kept                                   optional
    retain.jsonl     passages of everything else, kept                 the built-in ones where absent
    in_easy.jsonl    probes of the concept                                                     optional
    in_hard.jsonl    the same knowledge asked indirectly, paraphrased or in other formats      optional
    out_near.jsonl   probes of neighbouring knowledge, kept                                    optional
    out_far.jsonl    probes of general knowledge, kept                 the built-in ones where absent

A passage is ``{"text", "prompt"?, "attributes"?}``, a probe ``{"prompt", "answers", "distractors"?, "chat"?}``.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BeforeValidator, PlainSerializer

from ..errors import EmptyData, InvalidData, UnknownName
from .examples import Passage, Probe, normalise, read_jsonl, to_passage, to_probe

T = TypeVar("T", Passage, Probe)

CONCEPTS = Path(__file__).parent / "concepts"
_SHARED = "_shared"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

PASSAGES = ("forget", "near", "retain")
IN_SCOPE = ("in_easy", "in_hard")
OUT_OF_SCOPE = ("out_near", "out_far")
PROBES = (*IN_SCOPE, *OUT_OF_SCOPE)


def concepts() -> list[str]:
    """The built-in concepts."""
    return sorted(p.name for p in CONCEPTS.iterdir() if p.is_dir() and not p.name.startswith("_"))


class Halves(NamedTuple):
    tune: Scope
    """To measure, select, fit and calibrate on."""
    test: Scope
    """To report on."""


@dataclass(frozen=True)
class Scope:
    """What is to be forgotten, what is to be kept, and the probes that tell."""

    name: str
    forget: tuple[Passage, ...]
    near: tuple[Passage, ...] = ()
    retain: tuple[Passage, ...] = ()
    in_easy: tuple[Probe, ...] = ()
    in_hard: tuple[Probe, ...] = ()
    out_near: tuple[Probe, ...] = ()
    out_far: tuple[Probe, ...] = ()
    source: str = field(default="", compare=False)
    """What ``load`` was given, by which it can be loaded again."""

    def __post_init__(self) -> None:
        if not self.forget:
            raise EmptyData(f"scope {self.name!r} has no forget passage: there is nothing to unlearn from")
        if not self.retain:
            raise EmptyData(f"scope {self.name!r} has no retain passage: there is nothing to keep")
        _check_disjoint(self)

    @classmethod
    def load(cls, source: str | Path) -> Scope:
        """A built-in concept, a folder, a ``.jsonl`` file of forget passages, or a dataset id of the Hub.

        A dataset's splits are read as the files would be; one without such splits is forget text.
        Raises UnknownName, InvalidData (with file and line) or EmptyData.
        """
        return replace(cls._load(source), source=str(source))

    @classmethod
    def _load(cls, source: str | Path) -> Scope:
        if (CONCEPTS / str(source)).is_dir() and str(source) in concepts():
            return cls._from_folder(CONCEPTS / str(source), str(source))
        path = Path(source).expanduser()
        if path.is_dir():
            return cls._from_folder(path, path.name)
        if path.is_file():
            return cls.of(path.stem, forget=_read(path, to_passage))
        if _HUB_ID.fullmatch(str(source)) and not path.exists():
            return cls._from_hub(str(source))
        raise UnknownName("concept", str(source), concepts(), "A scope may also be a folder or a .jsonl file.")

    @classmethod
    def of(
        cls,
        name: str,
        *,
        forget: Iterable[Any],
        near: Iterable[Any] = (),
        retain: Iterable[Any] | None = None,
        in_easy: Iterable[Any] = (),
        in_hard: Iterable[Any] = (),
        out_near: Iterable[Any] = (),
        out_far: Iterable[Any] | None = None,
    ) -> Scope:
        """From strings, mappings, ``datasets`` rows or ready examples; see ``to_passage`` and ``to_probe``."""
        shared = CONCEPTS / _SHARED
        return cls(
            name=name,
            forget=tuple(map(to_passage, forget)),
            near=tuple(map(to_passage, near)),
            retain=tuple(map(to_passage, retain if retain is not None else _read(shared / "retain.jsonl", to_passage))),
            in_easy=tuple(map(to_probe, in_easy)),
            in_hard=tuple(map(to_probe, in_hard)),
            out_near=tuple(map(to_probe, out_near)),
            out_far=tuple(map(to_probe, out_far if out_far is not None else _read(shared / "out_far.jsonl", to_probe))),
        )

    @property
    def probes(self) -> dict[str, tuple[Probe, ...]]:
        return {name: getattr(self, name) for name in PROBES}

    def halves(self) -> Halves:
        """Two scopes of the same shape: choose settings on one, report on the other.

        Each list is ordered by a hash of its examples and dealt out in turn, so the halves are as equal as
        can be and an example keeps its half for as long as the list does.
        """
        dealt = {f.name: _deal(getattr(self, f.name)) for f in fields(self) if f.name not in ("name", "source")}
        tune, test = ({name: parts[i] for name, parts in dealt.items()} for i in (0, 1))
        if not test["forget"]:
            raise EmptyData(f"scope {self.name!r} has a single forget passage: two halves need at least two")
        return Halves(*(Scope(self.name, **half, source=self.source) for half in (tune, test)))

    def keeping_half(self) -> Scope:
        """All passages to forget, and of the others and of the probes the half that ``halves`` gives to ``tune``."""
        halved: dict[str, Any] = {name: _deal(getattr(self, name))[0] for name in ("near", "retain", *PROBES)}
        return replace(self, **halved)

    def without(self, passages: Iterable[Passage]) -> Scope:
        """Keeps none of these passages; what is to be forgotten stays. Raises EmptyData where nothing is kept then."""
        gone = set(map(_content, passages))
        near, retain = (tuple(p for p in part if _content(p) not in gone) for part in (self.near, self.retain))
        if (near, retain) == (self.near, self.retain):
            return self
        if not retain:
            raise EmptyData(f"scope {self.name!r} keeps nothing but what was to be forgotten before")
        return replace(self, near=near, retain=retain)

    @classmethod
    def _from_folder(cls, folder: Path, name: str) -> Scope:
        if not (folder / "forget.jsonl").is_file():
            raise InvalidData(f"{folder} has no forget.jsonl, so it is not a scope")
        found: dict[str, Any] = {}
        for part in (*PASSAGES, *PROBES):
            path = folder / f"{part}.jsonl"
            if path.is_file():
                found[part] = _read(path, to_passage if part in PASSAGES else to_probe)
        return cls.of(name, **found)

    @classmethod
    def _from_hub(cls, dataset: str) -> Scope:
        from datasets import DatasetDict, load_dataset

        try:
            loaded = load_dataset(dataset)
        except Exception as error:  # the Hub client raises many kinds; each becomes one of ours
            raise InvalidData(f"no folder {dataset!r}, nor a dataset on the Hub or in its cache: {error}") from error
        splits: Mapping[str, Any] = loaded if isinstance(loaded, DatasetDict) else {"forget": loaded}
        known = {name: rows for name, rows in splits.items() if name in (*PASSAGES, *PROBES)}
        return cls.of(dataset, **(known or {"forget": next(iter(splits.values()))}))


NamedScope = Annotated[
    Scope,
    BeforeValidator(lambda given: Scope.load(given) if isinstance(given, str | Path) else given),
    PlainSerializer(lambda scope: scope.source or scope.name, return_type=str),
]
"""A field that is written down by what the scope was loaded from."""


def _read(path: Path, convert: Callable[[Any], T]) -> list[T]:
    found = []
    for number, record in read_jsonl(path):
        try:
            found.append(convert(record))
        except InvalidData as error:
            raise InvalidData(f"{path}, line {number}: {error}") from None
    return found


def _deal(examples: tuple[T, ...]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    ordered = sorted(examples, key=lambda e: hashlib.sha256(e.key.encode()).digest())
    return tuple(ordered[0::2]), tuple(ordered[1::2])


def _check_disjoint(scope: Scope) -> None:
    """No prompt may be both in and out of scope; a passage both to forget and to keep is worth a warning."""
    inside = {normalise(p.prompt): (p.prompt, name) for name in IN_SCOPE for p in getattr(scope, name)}
    outside = {normalise(p.prompt): name for name in OUT_OF_SCOPE for p in getattr(scope, name)}
    if both := sorted(inside.keys() & outside.keys()):
        (prompt, asked), kept = inside[both[0]], outside[both[0]]
        built_in = " (built in for a scope without its own)" if kept == "out_far" else ""
        raise InvalidData(
            f"scope {scope.name!r}: {prompt!r} is asked both in and out of scope, by {asked} and by {kept}{built_in}"
        )
    keep = {_content(p) for p in (*scope.near, *scope.retain)}
    if shared := [p for p in scope.forget if _content(p) in keep]:
        warnings.warn(
            f"scope {scope.name!r}: {len(shared)} of {len(scope.forget)} passages to forget are also to be kept, such "
            f"as {(shared[0].prompt or shared[0].text)[:60]!r}",
            stacklevel=4,
        )


def _content(passage: Passage) -> tuple[str, str]:
    return normalise(passage.prompt or ""), normalise(passage.text)
