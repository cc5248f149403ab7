"""One forward pass of any kind of model, with or without a cache."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .hooks import Stopped
from .locate import is_hooked, root


class Pass(NamedTuple):
    logits: Float[Tensor, "batch kept vocab"]
    cache: Any


def new_cache(model: nn.Module, batch: int) -> Any:
    if root(model) is model and is_hooked(model):
        from transformer_lens import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, batch)
    from transformers import DynamicCache

    return DynamicCache(config=root(model).config)


def forward(
    model: nn.Module,
    ids: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch total"] | None = None,
    *,
    cache: Any = None,
    keep: int = 0,
) -> Pass:
    """``mask`` covers the cached tokens too; ``keep`` computes logits for that many last positions only (0: all).

    Positions count real tokens, so a row padded on the left gets what it would get alone. An encoder-decoder reads the
    text twice: the encoder the whole of it, the decoder token by token behind its start token.
    """
    base = root(model)
    if base is model and is_hooked(model):
        new_mask = None if mask is None else mask[:, -ids.shape[1] :].long()
        logits = model(ids, return_type="logits", attention_mask=new_mask, past_kv_cache=cache)
        return Pass(logits[:, -keep:] if keep else logits, cache)
    accepted = inspect.signature(base.forward).parameters
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
    if mask is not None:
        arguments["attention_mask"] = mask.long()
        if "position_ids" in accepted:
            arguments["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if getattr(base.config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=ids)  # type: ignore[operator]
        if mask is not None:
            arguments["decoder_attention_mask"] = mask.long()
    if cache is not None:
        arguments["past_key_values"] = cache
    if keep and "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = keep
    output = base(**arguments)
    return Pass(output.logits[:, -keep:] if keep else output.logits, cache)


def run_until_stopped(model: nn.Module, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]) -> None:
    """A pass whose logits nobody reads, cut short by ``hooks.stopping``."""
    needless = not is_hooked(model) and bool(mask.all())  # attention is quicker without; TransformerLens guesses one
    with contextlib.suppress(Stopped):
        forward(model, ids, None if needless else mask, keep=1)


def log_softmax(logits: Tensor) -> Float[Tensor, "... vocab"]:
    """In float32, whatever the model computes in."""
    return torch.log_softmax(logits.float(), dim=-1)
