"""When an edit applies. Any gate works with any edit.

A gate reads a signal: the activations of its sensor's features on the tokens of a pass. The sensor is by
default the features that are edited, at the shallowest site. What it reads there is not changed by the edit,
so a gate decides the same with and without the cache, alone or in a batch, padded left or right.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from .component import Component
from .errors import EmptyData, InvalidConfig
from .lm.context import Memory

SOFTNESS = 8.0
"""Temperature of the soft maximum, in nats of a token's log-odds."""
_ROUNDING = 1e-9
"""A sum that is taken in several passes may differ by so much from the same sum in one, relative to 1 or to it."""


class Signal(NamedTuple):
    acts: Float[Tensor, "batch seq k"]
    tokens: Bool[Tensor, "batch seq"]
    """True where the position holds content: no padding, no BOS, no sink; nor, for a gate that decides for whole
    sequences, what every chat begins with."""
    prompt: Bool[Tensor, "batch seq"]
    """True where the position was given to the model rather than written by it."""


class Gate(Component, family=True):
    """signal -> where the edit applies"""

    @abstractmethod
    def __call__(self, signal: Signal, memory: Memory) -> Bool[Tensor, "batch seq"]: ...

    @property
    def per_token(self) -> bool:
        """True if each edited site decides for itself, token by token; False if the sensor decides for all."""
        return False

    def statistic(self, signal: Signal) -> Float[Tensor, " batch"]:
        """What a sequence gate compares with its threshold, for whole sequences."""
        raise InvalidConfig(f"{self.kind} has no threshold to fit")

    def fitted(self, retain: Float[Tensor, " n"]) -> Self:
        """The gate with its threshold set from the statistics of retained sequences, unless it was given."""
        return self


class Always(Gate):
    """Everywhere; an edit that asks for an active feature still acts only where one fires."""

    def __call__(self, signal: Signal, memory: Memory) -> Tensor:
        return torch.ones_like(signal.tokens)

    @property
    def per_token(self) -> bool:
        return True


class TokenGate(Gate):
    """Tokens on which the strongest chosen feature exceeds a threshold."""

    above: float = 0.0

    def __call__(self, signal: Signal, memory: Memory) -> Tensor:
        return signal.acts.amax(-1) > self.above

    @property
    def per_token(self) -> bool:
        return True


class _Threshold(Gate):
    """A gate for whole sequences: open where the statistic exceeds ``above``, and then open to the end."""

    above: float | None = None
    """None: the (1 - alpha) conformal quantile of the statistic over retained sequences."""
    alpha: float = 0.05
    """Share of retained sequences that may open the gate."""

    def fitted(self, retain: Tensor) -> Self:
        if self.above is not None:
            return self
        return self.model_copy(update={"above": conformal_threshold(retain, self.alpha)})

    def threshold(self) -> float:
        """What must be exceeded by more than rounding: a text that set the threshold does not open the gate."""
        if self.above is None:
            raise InvalidConfig(f"{self.kind} has no threshold yet: give above=..., or fit it on retained text")
        return self.above + _ROUNDING * max(1.0, abs(self.above))


class _PromptGate(_Threshold):
    """A gate that decides on the prompt and holds to it while the model answers."""

    prompt_only: bool = False
    """Edit what the model was given and leave what it writes as it is: its answers stay more fluent under a strong
    edit, and a long one may find its way back."""

    def _hold(self, decision: Bool[Tensor, " batch"], signal: Signal) -> Bool[Tensor, "batch seq"]:
        where = signal.prompt if self.prompt_only else torch.ones_like(signal.prompt)
        return decision[:, None] & where


class SequenceGate(_PromptGate):
    """Sequences in which the share of tokens on which a chosen feature fires exceeds ``above``.

    Decided on the prompt and held while decoding (Dynamic SAE Guardrails, arXiv 2504.08192). Filler text
    dilutes the share; ``streaming_gate`` and ``probe_gate`` with a ``window`` do not mind it.
    """

    def __call__(self, signal: Signal, memory: Memory) -> Tensor:
        read = signal.tokens & signal.prompt
        hot = memory.add("hot", (_hot(signal) & read).sum(-1))
        seen = memory.add("seen", read.sum(-1).double())
        return self._hold(memory.latch("open", hot > self.threshold() * seen), signal)

    def statistic(self, signal: Signal) -> Tensor:
        return (_hot(signal) & signal.tokens).sum(-1).double() / signal.tokens.sum(-1).clamp(min=1)


class StreamingGate(_Threshold):
    """A CUSUM of tokens on which a chosen feature fires: c_t = max(0, c_{t-1} + hot_t - drift).

    The prompt is edited as a whole if c exceeds ``above`` anywhere in it; later tokens are edited from where
    it does. Filler drains c and never what c has reached, so it cannot dilute the concept.
    """

    drift: float = 0.2
    """Share of hot tokens that is still ordinary."""

    def __call__(self, signal: Signal, memory: Memory) -> Tensor:
        past = memory.history("cusum")
        level = self._cusum(signal, None if past is None or not past.shape[1] else past[:, -1:])
        memory.extend("cusum", level)
        threshold = self.threshold()
        over = level > threshold
        before = (past > threshold).any(-1) if past is not None else torch.zeros_like(over[:, 0])
        whole = before | (over & signal.prompt).any(-1)
        return whole[:, None] | over.cummax(-1).values

    def statistic(self, signal: Signal) -> Tensor:
        return self._cusum(signal, None).amax(-1)

    def _cusum(self, signal: Signal, start: Tensor | None) -> Float[Tensor, "batch seq"]:
        step = torch.where(signal.tokens, _hot(signal).double() - self.drift, 0.0)
        walk = step.cumsum(-1)
        floor = walk.cummin(-1).values
        lowest = floor.clamp(max=0) if start is None else torch.minimum(floor, -start)
        return walk - lowest


class ProbeGate(_PromptGate):
    """Sequences whose pooled probe score exceeds ``above``; the sensor is a linear probe on the residual.

    Neighbouring concepts fire the same features, so counting hits confuses them; a probe does not. ``soft`` is
    t log mean exp(score / t), t = 8: between the mean, which a long question dilutes, and the maximum, which a
    single odd token decides. It too sinks by t log 2 where other text doubles the prompt: ``window`` mends that.
    """

    pool: Literal["soft", "mean", "max"] = "soft"
    window: int | None = Field(None, gt=0)
    """So many neighbouring tokens are pooled at a time and the highest of these decides, whatever stands around them;
    none: the whole prompt is pooled at once. The maximum is the same either way. Of a prompt in pieces what was
    read so far is pooled, so a gate may open on its beginning, and never shuts again."""

    def __call__(self, signal: Signal, memory: Memory) -> Tensor:
        level = self._level(signal, signal.tokens & signal.prompt, memory)
        return self._hold(memory.latch("open", level > self.threshold()), signal)

    def statistic(self, signal: Signal) -> Tensor:
        return self._level(signal, signal.tokens, Memory())

    def _level(self, signal: Signal, read: Bool[Tensor, "batch seq"], memory: Memory) -> Float[Tensor, " batch"]:
        """Of all that was read so far, or with a window of what ended in this pass; -inf where that is nothing."""
        score = torch.where(read, signal.acts[..., 0].double(), -torch.inf)
        if self.pool == "max":
            return score.amax(-1)
        if self.window is not None:
            return self._highest(score, self.window, memory)
        seen = memory.add("seen", read.sum(-1).double())
        if self.pool == "mean":
            total = memory.add("total", torch.where(read, score, 0.0).sum(-1))
            return torch.where(seen > 0, total / seen, -torch.inf)
        power = (score / SOFTNESS).logsumexp(-1)  # in logarithms: exp overflows where a score or threshold is large
        memory.rows["total"] = torch.logaddexp(memory.rows["total"], power) if "total" in memory.rows else power
        return SOFTNESS * (memory.rows["total"] - seen.clamp(min=1).log())

    def _highest(self, score: Float[Tensor, "batch seq"], width: int, memory: Memory) -> Float[Tensor, " batch"]:
        """Among stretches of ``width`` tokens, or all there are where they are fewer; what is not read has -inf."""
        recent = memory.rows.get("recent", score.new_full((len(score), width), -torch.inf))
        score = torch.cat([recent, score], dim=1)
        order = (score > -torch.inf).long().argsort(dim=1, stable=True)  # what is read comes last, in its order
        score = score.gather(1, order)
        memory.rows["recent"] = score[:, -width:]
        stretches = score.unfold(1, width, 1)
        is_read = stretches > -torch.inf
        n = is_read.sum(-1)
        if self.pool == "mean":
            levels = torch.where(is_read, stretches, 0.0).sum(-1) / n
        else:
            levels = SOFTNESS * ((stretches / SOFTNESS).logsumexp(-1) - n.clamp(min=1).log())
        whole = n == width
        whole[:, -1] = n[:, -1] > 0
        return torch.where(whole, levels, -torch.inf).amax(-1)


def conformal_threshold(retain: Float[Tensor, " n"], alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n values: an exchangeable new one exceeds it with
    probability at most alpha. With too few values for that, the largest.
    """
    if not len(retain):
        raise EmptyData("a gate's threshold needs at least one retained sequence")
    rank = min(math.ceil((len(retain) + 1) * (1 - alpha)), len(retain))
    return float(retain.double().sort().values[rank - 1])


def _hot(signal: Signal) -> Bool[Tensor, "batch seq"]:
    return (signal.acts > 0).any(-1)
