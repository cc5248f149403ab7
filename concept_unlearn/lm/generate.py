"""Text from a model: batches of similar length, padded on the left, answered in the order they were asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..data.encode import pad
from ..tracking import Progress
from .locate import is_hooked, root


def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    end_ids: Sequence[int],
    batch_size: int,
    device: torch.device,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The new ids of each prompt, up to and without the first end token. ``temperature`` 0 is greedy."""
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    run = _hooked_transformer if is_hooked(model) and root(model) is model else _transformers
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = run(
                model, [prompts[i] for i in batch], max_new_tokens, temperature, list(end_ids), device, use_cache
            )
            for i, row in zip(batch, rows, strict=True):
                results[i] = _until_end(row, end_ids)
            if progress:
                progress(len(batch))
    return results


def _transformers(
    model: nn.Module,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    end_ids: list[int],
    device: torch.device,
    use_cache: bool,
) -> list[list[int]]:
    base: Any = root(model)
    ids, mask = pad(prompts, side="left", device=device)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    output = base.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=max_new_tokens,
        use_cache=use_cache,
        eos_token_id=end_ids or None,
        pad_token_id=end_ids[0] if end_ids else 0,
        **sampling,
    )
    return [row[ids.shape[1] :].tolist() for row in output]


def _hooked_transformer(
    model: Any,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    end_ids: list[int],
    device: torch.device,
    use_cache: bool,
) -> list[list[int]]:
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
        rows.append(output[0, len(prompt) :].tolist())
    return rows


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in end_ids), ids)
