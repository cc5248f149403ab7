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

from ..errors import NotExact, PatchNotReached
from .context import Context, Follower, find_embedding
from .locate import Place, is_hooked, locate, root
from .own import insertions, own
from .site import Site

EditFn = Callable[[Float[Tensor, "batch seq d"], Context], Float[Tensor, "batch seq d"]]
LogitsFn = Callable[[Float[Tensor, "batch kept vocab"], Context, "int | Tensor"], Float[Tensor, "batch kept vocab"]]
"""Of logits at the last positions, as many as the number says, or at those that the tensor names."""


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
            stack.enter_context(_hook(places[site], _with_context(fn, follower)))
        yield


@contextmanager
def editing_logits(model: nn.Module, fn: LogitsFn, bos_id: int | None, chat_head: Sequence[int] = ()) -> Iterator[None]:
    """Every forward pass inside the block says what ``fn`` makes of its logits.

    Raises NotExact for an encoder-decoder and for a model that caps its logits where no hook reaches.
    """
    _refuse_warm_compile(model)
    base: Any = _as_called(model)
    if bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False)):
        raise NotExact(f"{type(base).__name__} is an encoder-decoder: only the logits of decoders are edited")
    hooked = is_hooked(base)
    if hooked and (base.cfg.output_logits_soft_cap or 0) > 0:
        raise NotExact(f"{type(base).__name__} caps its logits after the unembedding: use the Hugging Face model")
    follower = Follower(bos_id, chat_head)
    module = base.unembed if hooked else base

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if hooked:
            return fn(output, follower.context(args[0]), args[0].shape[1])
        return _say(output, args, kwargs, follower, fn, base)

    with ExitStack() as stack:
        stack.callback(follower.close)
        for handle in _watch(base, follower):
            stack.callback(handle.remove)
        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        stack.callback(_EDITED.remove, id(module))
        _EDITED.append(id(module))
        yield


_EDITED: list[int] = []
"""By id, the modules whose logits are edited, as often as they are."""


def edits_logits(model: nn.Module) -> bool:
    """Whether what the model says is not what its head makes of its last hidden state, because of a patch."""
    base = _as_called(model)
    return id(base.unembed if is_hooked(base) else base) in _EDITED


def _as_called(model: nn.Module) -> Any:
    """The module that every pass goes through, also of a compiled model, which generates with what it compiled."""
    base = root(model)
    return getattr(base, "_orig_mod", base)


def _say(
    output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], follower: Follower, fn: LogitsFn, base: Any
) -> Any:
    """The output of a Hugging Face model with its logits, and its loss where it has one, made anew."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None or not hasattr(output, "logits"):
        raise PatchNotReached(
            f"a patch of logits reads the tokens: call {type(base).__name__} with input_ids, not with embeddings, and "
            "leave return_dict alone"
        )
    follower.see_ids(ids)
    context, logits = follower.context(ids), output.logits
    kept = kwargs.get("logits_to_keep", 0)
    said = fn(logits, context, kept if isinstance(kept, Tensor) else logits.shape[1])
    if said is not logits:
        output.logits = said
        if getattr(output, "loss", None) is not None:
            output.loss = base.loss_function(
                logits=said, labels=kwargs["labels"], vocab_size=base.config.get_text_config().vocab_size
            )
    return output


@contextmanager
def reading(model: nn.Module, sites: Iterable[Site]) -> Iterator[dict[Site, Float[Tensor, "batch seq d"]]]:
    """The last activation seen at each site, of the tokens that were given, with its gradient history."""
    seen: dict[Site, Tensor] = {}
    at_work = insertions(root(model))

    def keep(site: Site) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            seen[site] = own(x, at_work)
            return x

        return fn

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(_hook(locate(model, site), keep(site)))
        yield seen


@contextmanager
def stopping(model: nn.Module, site: Site) -> Iterator[None]:
    """Forward passes inside the block raise Stopped right after this site."""

    def stop(_: Tensor) -> Tensor:
        raise Stopped

    with _hook(locate(model, site), stop):
        yield


def _with_context(fn: EditFn, follower: Follower) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        return fn(x, follower.context(x))

    uncompiled: Callable[[Tensor], Tensor] = torch.compiler.disable(call)
    return uncompiled


@contextmanager
def _hook(place: Place, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    shape: list[int] = []
    """[batch, seq] of the pass, where the block has been asked."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape[:] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    def flat(x: Tensor) -> Tensor:
        if x.ndim == 3:
            return fn(x)
        if x.ndim == 2:
            rows = x.unflatten(0, shape)
            y = fn(rows)
            return x if y is rows else y.flatten(0, 1)
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

    with ExitStack() as stack:
        if place.block is not None:
            stack.callback(place.block.register_forward_pre_hook(measure, with_kwargs=True).remove)
        if place.side == "in":
            stack.callback(place.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        else:
            stack.callback(place.module.register_forward_hook(after).remove)
        yield


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
