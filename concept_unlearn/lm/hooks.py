"""Reading, editing and stopping a live model by torch's own forward hooks, each closed when its block ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import PatchNotReached
from .context import Context, Follower, find_embedding
from .locate import Place, is_hooked, locate, root
from .site import Site

EditFn = Callable[[Float[Tensor, "batch seq d"], Context], Float[Tensor, "batch seq d"]]


class Stopped(Exception):
    """Raised inside a forward pass that has gone as deep as it was asked to."""


@contextmanager
def editing(
    model: nn.Module, edits: Mapping[Site, EditFn], bos_id: int | None, chat_head: Sequence[int] = ()
) -> Iterator[None]:
    """Every forward pass inside the block runs with the activations at these sites edited.

    An edit gets the activation ``[batch, seq, d]`` (heads flattened at ``hook_z``) and the pass's Context,
    and returns a new tensor, or the same one to leave it alone. Hooks of others are never touched.
    """
    places = {site: locate(model, site) for site in edits}
    _refuse_warm_compile(model)
    follower = Follower(bos_id, chat_head)
    with ExitStack() as stack:
        stack.callback(follower.close)
        for handle in _watch(model, follower):
            stack.callback(handle.remove)
        for site, fn in edits.items():
            stack.callback(_hook(places[site], _with_context(fn, follower)).remove)
        yield


@contextmanager
def reading(model: nn.Module, sites: Iterable[Site]) -> Iterator[dict[Site, Float[Tensor, "batch seq d"]]]:
    """The last activation seen at each site, with its gradient history."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            seen[site] = x
            return x

        return fn

    with ExitStack() as stack:
        for site in sites:
            stack.callback(_hook(locate(model, site), keep(site)).remove)
        yield seen


@contextmanager
def stopping(model: nn.Module, site: Site) -> Iterator[None]:
    """Forward passes inside the block raise Stopped right after this site."""

    def stop(_: Tensor) -> Tensor:
        raise Stopped

    handle = _hook(locate(model, site), stop)
    try:
        yield
    finally:
        handle.remove()


def _with_context(fn: EditFn, follower: Follower) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        return fn(x, follower.context(x))

    uncompiled: Callable[[Tensor], Tensor] = torch.compiler.disable(call)
    return uncompiled


def _hook(place: Place, fn: Callable[[Tensor], Tensor]) -> RemovableHandle:
    def flat(x: Tensor) -> Tensor:
        if x.ndim == 3:
            return fn(x)
        y = fn(rearrange(x, "batch seq head d -> batch seq (head d)"))
        return rearrange(y, "batch seq (head d) -> batch seq head d", head=x.shape[2])

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # blocks of transformers before 5, and attention modules
            x = output[0]
            y = flat(x)
            return output if y is x else (y, *output[1:])
        return flat(output)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (flat(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": flat(kwargs["hidden_states"])}

    if place.side == "in":
        return place.module.register_forward_pre_hook(before, with_kwargs=True)
    return place.module.register_forward_hook(after)


def _watch(model: nn.Module, follower: Follower) -> list[RemovableHandle]:
    base = root(model)
    if is_hooked(base):
        return _watch_hooked_transformer(base, follower)
    is_seq2seq = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    mask_name = "decoder_attention_mask" if is_seq2seq else "attention_mask"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        follower.begin(kwargs.get(mask_name), kwargs.get("past_key_values"))

    handles = [base.register_forward_pre_hook(begin, with_kwargs=True)]
    return handles + _watch_embedding(base, follower)


def _watch_hooked_transformer(model: Any, follower: Follower) -> list[RemovableHandle]:
    """Its ``generate`` never calls the model itself, so a pass is known by the first block."""
    strings: list[Any] = []

    def keep_strings(_: nn.Module, args: tuple[Any, ...]) -> None:
        strings[:] = args[0] if args and isinstance(args[0], list) else []

    def begin(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and strings and follower.ids is not None:  # padded on the right by the model itself
            from transformer_lens.utilities import get_attention_mask

            mask = get_attention_mask(model.tokenizer, follower.ids, model.cfg.default_prepend_bos)
        strings.clear()
        follower.begin(mask, kwargs.get("past_kv_cache_entry"))

    handles = [
        model.register_forward_pre_hook(keep_strings),
        model.blocks[0].register_forward_pre_hook(begin, with_kwargs=True),
    ]
    return handles + _watch_embedding(model, follower)


def _watch_embedding(model: nn.Module, follower: Follower) -> list[RemovableHandle]:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def see(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            follower.see_ids(args[0])

    embedding = find_embedding(model)
    return [] if embedding is None else [embedding.register_forward_pre_hook(see)]


def _refuse_warm_compile(model: nn.Module) -> None:
    """torch.compile ignores a hook that is added after the first compiled call: say so."""
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    inner = getattr(model, "_orig_mod", model)
    if not _has_compiled_code(inner):
        return
    advice = (
        f"{type(inner).__name__} already ran compiled, and torch.compile ignores hooks added after that: "
        "switch the patch on before the first compiled call, or call torch._dynamo.reset() first"
    )
    if compiled:
        raise PatchNotReached(advice)
    warnings.warn(advice, stacklevel=4)


def _has_compiled_code(model: nn.Module) -> bool:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    functions: list[Any] = [type(model).forward, nn.Module._call_impl, nn.Module._wrapped_call_impl]
    while functions:
        function = functions.pop()
        if hasattr(function, "__wrapped__"):
            functions.append(function.__wrapped__)
        code = getattr(function, "__code__", None)
        if code is not None and _debug_get_cache_entry_list(code):
            return True
    return False
