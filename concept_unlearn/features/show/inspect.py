"""Looking at features: one pass over a scope for all of them, and a look at what they write."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...activations import stream
from ...activations.stream import n_rows
from ...data.encode import encode_text
from ...data.scope import Scope
from ...dictionaries import Dictionary
from ...dictionaries.base import check_features
from ...errors import InvalidConfig
from ...lm import LM
from ...tracking import Progress
from ..stats import check_fit
from .contexts import ContextFitter, Peak, edge
from .decoder import Weighed, decoder_rows, lens, nearest
from .inspection import Context, Inspection, Neighbour, Part, Shown, Side, Token
from .pieces import Pieces

_SIDES: tuple[tuple[Part, ...], ...] = (("forget",), ("near", "retain"))


def inspect_features(
    lm: LM,
    dictionary: Dictionary,
    scope: Scope,
    features: Sequence[int],
    *,
    contexts: int = 8,
    window: int = 16,
    tokens: int = 10,
    neighbours: int = 6,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> Inspection:
    """What these features, or codes, are about, in the order given.

    Of each side of the scope the ``contexts`` passages in which a feature fires most, with ``window`` tokens before
    and after the strongest; the ``tokens`` that it raises and lowers most; and the ``neighbours`` that write alike.
    Memory grows with features and contexts, not with the scope. ``progress`` hears of passages. Raises InvalidConfig
    for no feature or one that the dictionary has not, DictionaryMismatch for a dictionary of another model.
    """
    if not len(features):
        raise InvalidConfig(f"no feature of {dictionary.name} was chosen to look at")
    if min(contexts, tokens, neighbours, window + 1) < 1:
        raise InvalidConfig("contexts, tokens and neighbours are at least 1, window at least 0")
    chosen = check_features(features, dictionary.n_features, dictionary.name)
    dictionary = dictionary.to(lm.device)
    rows = decoder_rows(dictionary)
    pieces = Pieces(lm.tokenizer)
    sides = []
    for parts in _SIDES:
        reader = _Reader(lm, scope, parts)
        fitter = ContextFitter(len(chosen), n=contexts, window=window, skip=reader.skip)
        _read(lm, dictionary, chosen, reader, fitter, batch_tokens, progress)
        sides.append((reader, fitter))
    own = rows[list(chosen)]
    seen = lens(lm, own, dictionary.site_out, tokens)
    near, norms = nearest(rows, chosen, neighbours), own.norm(dim=-1).tolist()
    shown = []
    for i, feature in enumerate(chosen):
        found = [reader.side(fitter, i, pieces, window) for reader, fitter in sides]
        edges, (forget, retain) = _trimmed(*found)
        up, down = ([], []) if seen is None else (seen[0][i], seen[1][i])
        shown.append(
            Shown(
                feature=feature, forget=forget, retain=retain, edges=edges, norm=_short(norms[i]),
                up=_tokens(up, pieces), down=_tokens(down, pieces),
                nearest=tuple(Neighbour(feature=j, cosine=_short(value)) for j, value in near[i]),
            )
        )  # fmt: skip
    return Inspection(
        model=lm.name, dictionary=dictionary.name, site=str(dictionary.site), scope=scope.name,
        has_lens=seen is not None, features=tuple(shown), neuronpedia_id=getattr(dictionary, "neuronpedia_id", None),
    )  # fmt: skip


class _Reader:
    """The passages of one side, encoded, and where each is from."""

    def __init__(self, lm: LM, scope: Scope, parts: Sequence[Part]) -> None:
        self.origin: list[tuple[Part, int]] = [(part, i) for part in parts for i in range(len(getattr(scope, part)))]
        passages = [getattr(scope, part)[i] for part, i in self.origin]
        self.texts = [encode_text(lm.tokenizer, p.text, p.prompt) for p in passages]
        self._bos, head = lm.bos_id, lm.chat_head
        self.skip = [n_rows(t, self._bos) - n_rows(t, self._bos, head) for t in self.texts]
        """Of each, the tokens that every chat begins with."""

    def side(self, fitter: ContextFitter, i: int, pieces: Pieces, window: int) -> Side:
        contexts = tuple(self._context(peak, pieces, window) for peak in fitter.peaks(i))
        return Side(rate=fitter.rate(i), contexts=contexts, density=tuple(fitter.density(i)))

    def _context(self, peak: Peak, pieces: Pieces, window: int) -> Context:
        ids = [token for token in self.texts[peak.passage] if token != self._bos]
        first, end = max(peak.position - window, 0), min(peak.position + window + 1, len(ids))
        part, passage = self.origin[peak.passage]
        begin = first - peak.position + window
        return Context(
            part=part, passage=passage, position=peak.position, peak=peak.position - first,
            tokens=pieces(ids[first:end]), acts=tuple(_short(a) for a in peak.acts[begin : begin + end - first]),
        )  # fmt: skip


def _read(
    lm: LM,
    dictionary: Dictionary,
    chosen: Sequence[int],
    reader: _Reader,
    fitter: ContextFitter,
    batch_tokens: int,
    progress: Progress | None,
) -> None:
    index = torch.tensor(chosen, device=lm.device)
    first = True
    for rows in stream(lm, [dictionary.site], reader.texts, batch_tokens=batch_tokens, progress=progress):
        x = rows.activations[dictionary.site]
        if first:
            check_fit(dictionary, x)
            first = False
        if len(x):
            measured = x.float().norm(dim=-1) <= dictionary.max_norm
            fitter.update(dictionary.encode(x)[:, index], measured, rows.sequence)


def _trimmed(forget: Side, retain: Side) -> tuple[tuple[float, ...], tuple[Side, Side]]:
    """Without the empty bins at both ends."""
    full = [i for i, both in enumerate(zip(forget.density, retain.density, strict=True)) if any(both)]
    first, end = (full[0], full[-1] + 1) if full else (0, 0)
    edges = tuple(_short(edge(i)) for i in range(first, end + 1)) if full else ()
    left, right = (s.model_copy(update={"density": s.density[first:end]}) for s in (forget, retain))
    return edges, (left, right)


def _tokens(found: Sequence[Weighed], pieces: Pieces) -> tuple[Token, ...]:
    return tuple(Token(text=pieces.one(token), logit=_short(value)) for token, value in found)


def _short(value: float) -> float:
    """Four digits are enough to look at."""
    return float(f"{value:.4g}")
