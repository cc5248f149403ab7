"""lm-eval's Hugging Face model with a patch on: the room that cannot be imported without lm_eval."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ..activations.processes import Processes
from ..errors import InvalidConfig, InvalidData
from ..lm import LM
from ..lm.locate import is_hooked, root
from ..lm.score import answer_batches
from ..patches import Patch, load_patch

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""(the request as text, context, continuation) as lm-eval hands it over; no text for a window of running text."""


class PatchedHFLM(HFLM):  # type: ignore[misc]
    """lm-eval's model type ``concept_unlearn``: its ``hf`` around a live model, with a patch on during every request.

    Without a patch it is ``hf``. With one, what is asked is a prompt and what is scored is the model's reply to it, as
    gates see them when the model is used, and no gate sees padding. Tokens, windows and stops are those of ``hf``.
    """

    def __init__(
        self,
        pretrained: str | LM,
        patch: str | Path | Patch | None = None,
        *,
        strength: float | None = None,
        any_base: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = 64,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
    ) -> None:
        """``pretrained`` is loaded as ``LM.load`` does; ``patch`` is a saved patch's folder, at its own strength
        unless another is given. The rest is as for ``hf``, but log-probabilities are always taken in float32.
        """
        self._is_ready = False
        if not isinstance(pretrained, LM):
            there = device if device and (torch.cuda.is_available() or not device.startswith("cuda")) else None
            pretrained = LM.load(
                pretrained, dtype=dtype, device=there, revision=revision, trust_remote_code=trust_remote_code
            )
        self.lm = pretrained
        base = root(self.lm.model)
        if is_hooked(base) or getattr(base.config, "is_encoder_decoder", False):
            raise InvalidConfig(f"lm-eval asks decoder-only Hugging Face models; {self.lm.name} is none")
        if patch is not None and not isinstance(patch, Patch):
            patch = load_patch(patch, self.lm, any_base=any_base)
        self.patch = patch if patch is None or strength is None else patch.at(strength)
        with _no_advice():
            super().__init__(
                pretrained=base, backend="causal", tokenizer=copy.deepcopy(self.lm.tokenizer), softmax_dtype="float32",
                batch_size=batch_size, max_batch_size=max_batch_size, max_length=max_length,
                add_bos_token=add_bos_token, prefix_token_id=prefix_token_id, enable_thinking=enable_thinking,
                think_end_token=think_end_token,
            )  # fmt: skip
        self._is_ready = True
        here = Processes.here()
        if here.world > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=self.lm.device.type == "cpu")
            self._rank, self._world_size = here

    @property
    def model(self) -> Any:
        """None while HFLM is made: it would tie weights and set the mode of a model that is used as it was given."""
        return self._model if self._is_ready else None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._patched():
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        with self._patched():
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        with self._patched(), torch.no_grad():
            return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        with self.patch.on(self.lm) if self.patch is not None else contextlib.nullcontext():
            yield

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.patch is None or not requests:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # type: ignore[no-any-return]
        if requests[0][0] is None:
            return self._running_text(requests, override_bs)
        return self._replies(requests, disable_tqdm)

    def _running_text(self, windows: Sequence[Encoded], override_bs: int | None) -> list[tuple[float, bool]]:
        """Windows of one length at a time: HFLM gives the model no mask, so a gate would read padding."""
        by_length: dict[int, list[int]] = {}
        for i, (_, context, continuation) in enumerate(windows):
            by_length.setdefault(len(context) + len(continuation), []).append(i)
        found: dict[int, tuple[float, bool]] = {}
        for which in by_length.values():
            rows = super()._loglikelihood_tokens([windows[i] for i in which], True, override_bs)
            found.update(zip(which, rows, strict=True))
        return [found[i] for i in range(len(windows))]

    def _replies(self, requests: Sequence[Encoded], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Continuations of the same context together, which is read once."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise InvalidData(
                    f"a continuation has {len(continuation)} tokens; the model scores 1 to {self.max_length}"
                )
            groups.setdefault(tuple(context[-(self.max_length + 1 - len(continuation)) :]), []).append(i)
        prompts, members = list(groups), list(groups.values())
        answers = [[requests[i][2] for i in which] for which in members]
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring replies") as bar:
            for batch in answer_batches(self.lm.model, prompts, answers, self._rows(requests)):
                rows = self.lm.score([prompts[p] for p in batch], [answers[p] for p in batch], batch_size=10**9)
                for p, row in zip(batch, rows, strict=True):
                    for i, scored in zip(members[p], row, strict=True):
                        found[i] = float(scored.logprobs.sum()), bool(scored.greedy.all())
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                bar.update(sum(len(members[p]) for p in batch))
        return [found[i] for i in range(len(requests))]

    def _rows(self, requests: Sequence[Encoded]) -> int:
        if self.batch_size == "auto":
            return int(self._detect_batch_size([max(requests, key=lambda r: len(r[1]) + len(r[2]))]))
        return int(self.batch_size)


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """HFLM warns of whatever may go wrong with a model that it did not load."""
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
