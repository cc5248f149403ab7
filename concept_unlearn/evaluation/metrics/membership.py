"""Can it be told what a model was trained on? Scores are losses: higher is less like training data."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field
from scipy.stats import rankdata

from ...data.examples import Passage, Probe
from ...errors import InvalidData
from ..measured import Measured, Table, mean_of, resampled, undefined
from ..metric import Beside, Metric
from ..view import Read, Seen, Tokens, View
from .peer import Compat, EndToken, without_end

Attack = Literal["loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradnorm"]

_MIN_DENOMINATOR = 1e-6
_PEER_EPSILON = 1e-10
_PEER_AUC = 0.5
_SVM_C = 3.0


def loss(tokens: Tokens) -> float | None:
    """N/n, the end token included."""
    mean = tokens.mean_logprob
    return None if mean is None else -mean


def zlib_loss(tokens: Tokens, text: str) -> float | None:
    """N/n a byte of the text as zlib packs it (2012.07805)."""
    found = loss(tokens)
    return None if found is None else found / len(zlib.compress(text.encode(), 6))


def reference_loss(tokens: Tokens, reference: Tokens) -> float | None:
    """N/n above that of another model, over the same tokens (2111.08440)."""
    if tokens.n != reference.n:
        raise InvalidData(
            f"an answer has {tokens.n} tokens and {reference.n} under the reference: it is of another tokenizer"
        )
    found, other = loss(tokens), loss(reference)
    return None if found is None or other is None else found - other


def min_k(tokens: Tokens, k: float = 0.4, end: EndToken = "own") -> float | None:
    """Minus the mean of the max(1, floor(k n)) lowest log-probabilities (2310.16789), without the end token."""
    return _lowest(without_end(tokens, end).logprobs, k)


def min_k_plus_plus(tokens: Tokens, k: float = 0.4, end: EndToken = "own") -> float | None:
    """Min-K of (log p - mu) / sigma, mu and sigma of the model's own distribution at each token (2404.02936)."""
    kept = without_end(tokens, end)
    return _lowest([(p - mu) / s for p, mu, s in zip(kept.logprobs, kept.mean, kept.std, strict=True)], k)


def _lowest(values: Sequence[float], k: float) -> float | None:
    lowest = sorted(values)[: max(1, int(k * len(values)))]
    return -sum(lowest) / len(lowest) if lowest else None


def membership_scores(
    seen: Seen,
    attack: Attack,
    *,
    k: float = 0.4,
    norm: Literal["mean", "global"] = "mean",
    reference: Seen | None = None,
    compat: Compat | None = None,
) -> list[float | None]:
    """Of each example by its first answer, or its text; None without a token.

    ``reference`` is the same set as another model sees it.
    """
    if attack == "gradnorm":
        return [None if found is None else found[norm] for found in seen.gradnorm]
    if attack == "min_k_plus_plus":
        seen.require("moments")
    answers = [group[0] for group in seen.answers]
    if attack == "loss":
        return [loss(t) for t in answers]
    if attack == "zlib":
        return [zlib_loss(t, _text(e)) for t, e in zip(answers, seen.examples, strict=True)]
    if attack == "reference":
        if reference is None:
            raise InvalidData("the reference attack compares with another model: give one")
        return [reference_loss(t, group[0]) for t, group in zip(answers, reference.answers, strict=True)]
    score = {"min_k": min_k, "min_k_plus_plus": min_k_plus_plus}[attack]
    found = [score(t, k, "peer" if compat else "own") for t in answers]
    return [0.0 if s is None else s for s in found] if compat else found


def auc(members: Float[np.ndarray, " m"], others: Float[np.ndarray, " n"]) -> float | None:
    """P(other > member) + P(other = member) / 2, by mid-ranks; None where one side is empty."""
    m, n = len(members), len(others)
    if not m or not n:
        return None
    ranks = rankdata(np.concatenate([others, members]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (m * n))


def priv_leak(auc_unlearned: float, auc_retrained: float) -> float | None:
    """100 ((1 - AUC_u) - (1 - AUC_r)) / (1 - AUC_r) (2407.06460); None where the denominator is below 1e-6."""
    room = 1 - auc_retrained
    return None if room < _MIN_DENOMINATOR else 100 * ((1 - auc_unlearned) - room) / room


class MembershipAUC(Metric):
    """AUC of telling what was trained on (``on``) from what never was (``others``); near 1 where it is still known.

    Read it beside the retrained model's, near 0.5, not beside 0.
    """

    others: str = "holdout"
    """The set of the same kind that no model here was trained on."""
    attack: Attack = "min_k"
    k: float = Field(0.4, gt=0, le=1)
    """Share of tokens that Min-K and Min-K++ read; 0.2 in 2310.16789, 0.4 in most tables of unlearning."""
    norm: Literal["mean", "global"] = "mean"
    """gradnorm: the mean of the parameters' norms, or the norm of the whole gradient."""
    against: Beside = "retrained"
    """reference: the model whose loss is taken off."""
    compat: Compat | None = None
    """``open-unlearning``: Min-K and Min-K++ drop the last token, whatever it is, and count 0 where none is left."""

    @property
    def beside(self) -> tuple[Beside, ...]:
        return (self.against,) if self.attack == "reference" else ()

    @property
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        special: dict[Attack, Read] = {"min_k_plus_plus": "moments", "gradnorm": "gradnorm"}
        return dict.fromkeys((self.on, self.others), (special.get(self.attack, "answers"),))

    def __call__(self, view: View) -> Measured:
        _assert_apart(view, self.on, self.others)
        reference = (view.retrained if self.against == "retrained" else view.original) if self.beside else None
        if self.beside and reference is None:
            return undefined(f"no observation of the {self.against} model")
        members, others = (
            membership_scores(
                view[name],
                self.attack,
                k=self.k,
                norm=self.norm,
                reference=None if reference is None else reference[name],
                compat=self.compat,
            )
            for name in (self.on, self.others)
        )
        notes = {"attack": self.attack, **({"k": self.k} if self.attack.startswith("min_k") else {})}
        return _of_two_sets([[s] for s in members], [[s] for s in others], lambda m, o: auc(m[:, 0], o[:, 0]), notes)


class PrivLeak(Metric):
    """How far the Min-K AUC is from the retrained model's, in percent of one minus that (2407.06460).

    Negative: not forgotten enough. Positive: forgotten so much that it shows. Undefined without a retrained model and
    where one minus its AUC is below 1e-6.
    """

    others: str = "holdout"
    k: float = Field(0.4, gt=0, le=1)
    compat: Compat | None = None
    """``open-unlearning``: the AUC of a retrained model that is missing is taken to be 0.5, the denominator may vanish
    but for 1e-10, and what ``MembershipAUC`` says."""

    @property
    def beside(self) -> tuple[Beside, ...]:
        return ("retrained",)

    @property
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        return dict.fromkeys((self.on, self.others), ("answers",))

    def __call__(self, view: View) -> Measured:
        if view.retrained is None and self.compat is None:
            return undefined("no observation of the retrained model")
        plain = MembershipAUC(on=self.on, others=self.others, k=self.k, compat=self.compat)
        found, retrained = plain(view), plain(view.retrained) if view.retrained else Measured(value=_PEER_AUC)
        notes = {"k": self.k, "auc": found.value, "auc_retrained": retrained.value}
        if found.value is None or retrained.value is None:
            return undefined("one of the two sets has no example with a token", found.n_total, notes=notes)
        if self._leak(found.value, retrained.value) is None:
            return undefined("the retrained model's AUC is 1", found.n_total, notes=notes)

        def leak(members: Table, others: Table) -> float | None:
            u, r = (auc(members[:, column], others[:, column]) for column in (0, 1))
            assert u is not None
            assert r is not None
            return self._leak(u, r if view.retrained else _PEER_AUC)

        return _of_two_sets(self._scores(view, self.on), self._scores(view, self.others), leak, notes)

    def _leak(self, auc_unlearned: float, auc_retrained: float) -> float | None:
        if self.compat:
            return 100 * (auc_retrained - auc_unlearned) / (1 - auc_retrained + _PEER_EPSILON)
        return priv_leak(auc_unlearned, auc_retrained)

    def _scores(self, view: View, name: str) -> list[list[float | None]]:
        """Of each example by this model and by the retrained one."""
        models = (view, view.retrained or view)
        columns = [membership_scores(v[name], "min_k", k=self.k, compat=self.compat) for v in models]
        return [list(row) for row in zip(*columns, strict=True)]


class MembershipClassifier(Metric):
    """Share of ``on`` that an SVM (RBF, C 3) calls never trained on, taught by Min-K of two other sets (2410.17509).

    WAGLE's. Higher where more was forgotten. It is no AUC and is compared with none.
    """

    kept: str = "retain"
    """The set that was trained on and is kept."""
    others: str = "holdout"
    k: float = Field(0.5, gt=0, le=1)

    @property
    def reads(self) -> Mapping[str, tuple[Read, ...]]:
        return dict.fromkeys((self.on, self.kept, self.others), ("answers",))

    def __call__(self, view: View) -> Measured:
        _assert_apart(view, self.kept, self.others)
        scores = {n: membership_scores(view[n], "min_k", k=self.k) for n in (self.on, self.kept, self.others)}
        taught = [(s, float(name == self.kept)) for name in (self.kept, self.others) for s in scores[name]]
        known = [(s, member) for s, member in taught if s is not None]
        if len({member for _, member in known}) < 2:
            return undefined(f"set {self.kept!r} or {self.others!r} has no example with a token", len(scores[self.on]))
        called = _svm(known)
        return mean_of([None if s is None else 1 - called(s) for s in scores[self.on]], notes={"k": self.k})


def _svm(taught: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """From (score, 1 of a member) a function of a score."""
    from sklearn.svm import SVC

    scores, labels = np.array(taught).T
    machine = SVC(C=_SVM_C, kernel="rbf", gamma="auto").fit(scores[:, None], labels)
    return lambda score: float(machine.predict([[score]])[0])


def _of_two_sets(
    members: Sequence[Sequence[float | None]],
    others: Sequence[Sequence[float | None]],
    statistic: Callable[[Table, Table], float | None],
    notes: Mapping[str, float | str | None],
) -> Measured:
    n = [sum(None not in row for row in rows) for rows in (members, others)]
    if not all(n):
        return undefined("one of the two sets has no example with a score", len(members) + len(others), notes=notes)
    groups = {"members": members, "others": others}
    return resampled(groups, lambda tables: statistic(tables["members"], tables["others"]), notes=notes)


def _assert_apart(view: View, members: str, others: str) -> None:
    if both := set(view[members].examples) & set(view[others].examples):
        example = next(e for e in view[members].examples if e in both)
        raise InvalidData(
            f"{_text(example)!r} is in {members!r} and in {others!r}: nobody can tell what is in both apart"
        )


def _text(example: Probe | Passage) -> str:
    return example.answers[0] if isinstance(example, Probe) else example.text
