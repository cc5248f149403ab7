"""Tokens put before what a prompt says on its way into a live model; what comes back is of the prompt alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..errors import InvalidData, NotExact, PatchNotReached
from .context import Context, Follower
from .forward import new_cache
from .locate import is_hooked, root
from .own import Inserted, insertions

ChosenFn = Callable[[Int[Tensor, "batch seq"], Context], Bool[Tensor, " batch"]]
"""Of a pass that begins sequences, which of them are prefixed."""


@contextmanager
def inserting(
    model: nn.Module, tokens: Sequence[int], chosen: ChosenFn, bos_id: int | None, chat_head: Sequence[int]
) -> Iterator[None]:
    """In passes inside the block ``tokens`` stand before the first token of the text of each chosen sequence.

    Its logits, and activations that are read, are those of its own tokens. It is prefixed where it begins, and its
    cache holds the prefix from then on. Sequences of a batch in which none is chosen pass untouched.
    Raises NotExact for an encoder-decoder or HookedTransformer, PatchNotReached for a prompt that comes as embeddings.
    """
    base: Any = root(model)
    base = getattr(base, "_orig_mod", base)
    if is_hooked(base) or bool(getattr(base.config, "is_encoder_decoder", False)):
        raise NotExact(f"tokens are put before prompts of Hugging Face decoders; given: {type(base).__name__}")
    insertion = _Insertion(base, tokens, chosen, Follower(bos_id, chat_head))
    at_work = insertions(base)
    with ExitStack() as stack:
        at_work.append(insertion)
        stack.callback(at_work.remove, insertion)
        stack.callback(insertion.follower.close)
        stack.callback(base.register_forward_pre_hook(insertion.before, with_kwargs=True, prepend=True).remove)
        stack.callback(base.register_forward_hook(insertion.after, with_kwargs=True).remove)
        yield


class _Insertion:
    """At work on one model."""

    def __init__(self, model: Any, tokens: Sequence[int], chosen: ChosenFn, follower: Follower) -> None:
        self.model, self.tokens, self.chosen, self.follower = model, list(tokens), chosen, follower
        self._has_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.inserted: Inserted | None = None
        self._asking = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._asking:  # whoever chooses may run the model himself
            return None
        self.inserted = None
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise PatchNotReached("a prefix is put before tokens, and this prompt came as embeddings: give input_ids")
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask is not None and mask.ndim != 2:
            raise PatchNotReached("a prefix needs an attention mask of [batch, seq], or none")
        begins = not (cache is not None and cache.get_seq_length())
        if cache is None and kwargs.get("use_cache", self.model.config.use_cache):
            cache = new_cache(self.model, len(ids))  # the model would make its own, and nobody could follow it
        self.follower.begin(mask, cache)
        self.follower.see_ids(ids)
        context = self.follower.context(ids[..., None])
        change = self._begun(ids, context, kwargs) if begins else self._continued(ids, mask, kwargs)
        if change is None:
            return None
        new, seen = change
        kwargs = kwargs | {"attention_mask": seen.long(), "past_key_values": cache}
        if self._has_positions:
            kwargs["position_ids"] = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": new})

    def _begun(self, ids: Tensor, context: Context, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        self._asking = True
        try:
            chosen = self.chosen(ids, context).to(ids.device)
        finally:
            self._asking = False
        width = len(self.tokens)
        if not width or not chosen.any():
            return None
        keep = kwargs.get("logits_to_keep", 0)
        if kwargs.get("labels") is not None or isinstance(keep, Tensor):
            raise NotExact("a prefixed prompt has no loss, and keeps logits by number: leave out labels")
        at = torch.where(chosen, context.text.long().argmax(1), 0)
        column = torch.arange(ids.shape[1] + width, device=ids.device)
        offset = column - at[:, None]
        inside = (offset >= 0) & (offset < width)
        source = (column - width * (offset >= width)).clamp(0, ids.shape[1] - 1)
        prefix = torch.tensor(self.tokens, device=ids.device)[offset.clamp(0, width - 1)]
        new = torch.where(inside, prefix, ids.gather(1, source))
        seen = torch.where(inside, chosen[:, None], context.real.gather(1, source))
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and (longest := int(seen.sum(1).max())) > limit:
            raise InvalidData(f"with its prefix a prompt has {longest} tokens, and the model reads {limit}")
        self.follower.memory.rows["prefixed"] = seen
        if keep:
            kwargs["logits_to_keep"] = keep + width
        self.inserted = Inserted(at, width, ids.shape[1])
        return new, seen

    def _continued(self, ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        head = self.follower.memory.rows.get("prefixed")
        if head is None:
            return None
        total = int(kwargs["past_key_values"].get_seq_length()) + ids.shape[1]
        beyond = head.new_ones(len(ids), total - head.shape[1]) if mask is None else mask.bool()
        return ids, torch.cat([head, beyond[:, beyond.shape[1] - (total - head.shape[1]) :]], 1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, _: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> Any:
        if self._asking or self.inserted is None:
            return None
        if not hasattr(output, "logits"):
            raise PatchNotReached("what a prefixed prompt says is read from an output with logits: leave return_dict")
        output.logits = self.inserted.left_out(output.logits)
        return output
