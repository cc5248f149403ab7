"""How often a feature fires, with an interval that knows that the tokens of a passage go together."""

from __future__ import annotations

import math

from ...component import Frozen

_Z = 1.959963984540054


class Rate(Frozen):
    """A share of tokens and its 95 % interval over passages."""

    fired: int
    """Tokens on which the feature fires, of so many ``tokens`` in so many ``passages``."""
    tokens: int
    passages: int
    value: float
    low: float
    high: float


def firing_rate(
    *, fired: int, tokens: int, passages: int, fired_squared: float, fired_by_size: float, size_squared: float
) -> Rate:
    """Wilson's interval at the effective number of tokens (Korn and Graubard 1998).

    r = sum y / sum m over passages with y of m tokens fired on; its variance as a ratio of sums is
    v = sum (y - r m)^2 / (sum m)^2, so r counts as a share of n = r (1 - r) / v independent tokens, never more than
    there are. Where a feature fires on no token or on all, nothing says how its tokens go together: a passage counts
    as one. The sums of y^2, y m and m^2 are given.
    """
    r = fired / tokens
    spread = fired_squared - 2 * r * fired_by_size + r * r * size_squared
    if fired in (0, tokens):
        n = float(passages)
    elif spread <= 1e-9 * fired_squared:
        n = float(tokens)
    else:
        n = min(r * (1 - r) * tokens**2 / spread, float(tokens))
    centre, reach = r + _Z**2 / (2 * n), _Z * math.sqrt(r * (1 - r) / n + _Z**2 / (4 * n * n))
    low, high = ((centre + sign * reach) / (1 + _Z**2 / n) for sign in (-1, 1))
    return Rate(
        fired=fired, tokens=tokens, passages=passages, value=r,
        low=0.0 if fired == 0 else max(low, 0.0), high=1.0 if fired == tokens else min(high, 1.0),
    )  # fmt: skip
