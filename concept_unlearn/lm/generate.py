"""Text from a model: batches of similar length, padded on the left, answered in the order they were asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..data.encode import pad
from ..tracking import Progress
from .forward import log_softmax
from .locate import is_hooked, root
from .score import score_answers


class Written(NamedTuple):
    """What a model wrote behind one prompt, up to and without the first end token."""

    ids: list[int]
    logprobs: Float[Tensor, " n"]
    """Of the ids, to the model itself, whatever they were drawn by; empty where nobody asked for them."""


def write(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    end_ids: Sequence[int],
    batch_size: int,
    device: torch.device,
    logprobs: bool,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> list[Written]:
    """``temperature`` 0 is greedy. ``logprobs`` come from the passes that write, but of a HookedTransformer, whose own
    generation lets nobody listen, from one pass more.
    """
    results: dict[int, Written] = {}
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    run = _hooked_transformer if is_hooked(model) and root(model) is model else _transformers
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = run(
                model,
                [prompts[i] for i in batch],
                max_new_tokens,
                temperature,
                list(end_ids),
                device,
                use_cache,
                logprobs,
            )
            results |= dict(zip(batch, rows, strict=True))
            if progress:
                progress(len(batch))
    return [results[i] for i in range(len(prompts))]


def _transformers(
    model: nn.Module,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    end_ids: list[int],
    device: torch.device,
    use_cache: bool,
    logprobs: bool,
) -> list[Written]:
    base: Any = root(model)
    ids, mask = pad(prompts, side="left", device=device)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    with _listening(base) if logprobs else nullcontext() as ear:
        output = base.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            use_cache=use_cache,
            eos_token_id=end_ids or None,
            pad_token_id=end_ids[0] if end_ids else 0,
            stopping_criteria=None if ear is None else [ear],
            **sampling,
        )
    rows = [_until_end(row[ids.shape[1] :].tolist(), end_ids) for row in output]
    if ear is None:
        return [Written(row, torch.empty(0)) for row in rows]
    heard = torch.stack(ear.logprobs, 1).cpu()
    return [Written(row, own[: len(row)]) for row, own in zip(rows, heard, strict=True)]


class _Ear:
    """Hears the logits of every pass, and as a stopping criterion, which never stops, what was made of them."""

    def __init__(self) -> None:
        self.logits: Float[Tensor, "batch vocab"] | None = None
        self.logprobs: list[Float[Tensor, " batch"]] = []

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        assert self.logits is not None
        self.logprobs.append(log_softmax(self.logits).gather(-1, ids[:, -1:])[:, 0])
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@contextmanager
def _listening(model: nn.Module) -> Iterator[_Ear]:
    ear = _Ear()

    def hear(_: nn.Module, __: Any, output: Any) -> None:
        ear.logits = output.logits[:, -1]

    handle = model.register_forward_hook(hear)
    try:
        yield ear
    finally:
        handle.remove()


def _hooked_transformer(
    model: Any,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    end_ids: list[int],
    device: torch.device,
    use_cache: bool,
    logprobs: bool,
) -> list[Written]:
    rows = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([list(prompt)], device=device),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            stop_at_eos=bool(end_ids),
            eos_token_id=end_ids[0] if end_ids else None,
            use_past_kv_cache=use_cache,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
        )
        rows.append(_until_end(output[0, len(prompt) :].tolist(), end_ids))
    if not logprobs:
        return [Written(row, torch.empty(0)) for row in rows]
    asked = [[row] if row else [] for row in rows]
    scored = score_answers(model, prompts, asked, device=device, batch_size=len(prompts))
    return [
        Written(row, group[0].logprobs if group else torch.empty(0)) for row, group in zip(rows, scored, strict=True)
    ]


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in end_ids), ids)
