"""Where a site lives on a live model: the one file that knows Hugging Face from TransformerLens."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..errors import SiteNotFound
from .site import STREAMS, Site

Side = Literal["in", "out"]

_ATTENTION = ("self_attn", "attn.attention", "attn", "attention", "self_attention", "layer.0.SelfAttention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe", "layer.2.DenseReluDense", "layer.1.DenseReluDense")
_PROJECTION = ("o_proj", "c_proj", "dense", "out_proj", "out_lin", "o", "wo")
_BLOCK_LISTS = ("layers", "h", "blocks", "block", "layer")


@dataclass(frozen=True)
class Place:
    """A module, the side of it where the activation passes, and how the activation comes there."""

    module: nn.Module
    side: Side
    by_head: bool = False
    """As [batch, seq, head, d_head]."""
    block: nn.Module | None = None
    """What reads [batch, seq, d] before, where the activation may come as [batch * seq, d] (OPT)."""


def is_hooked(model: nn.Module) -> bool:
    """True for a HookedTransformer or a TransformerBridge: both publish their hook points."""
    return hasattr(model, "hook_dict")


def root(model: nn.Module) -> nn.Module:
    """The module whose call sees the attention mask and the cache of every forward pass."""
    inner = getattr(model, "original_model", None)
    return inner if is_hooked(model) and isinstance(inner, nn.Module) else model


def locate(model: nn.Module, site: Site) -> Place:
    """Raises SiteNotFound, which says what the model has."""
    return _locate_hook_point(model, site) if is_hooked(model) else _locate_module(model, site)


def locate_units(model: nn.Module, layer: int) -> Place:
    """The hidden units of a dense feed-forward: what its last linear map reads. Raises SiteNotFound."""
    place = locate(model, Site("mlp_in", layer))
    if is_hooked(model):
        block: Any = model.blocks[layer]  # type: ignore[index]
        point = getattr(block.mlp, "hook_post", None)
        if not isinstance(point, nn.Module):
            raise SiteNotFound(f"{type(model).__name__}: the feed-forward of block {layer} has no hook_post")
        return Place(point, "out")
    for module in (locate(model, Site("mlp_out", layer)).module, place.module):  # the branch's norm; OPT's fc1 and fc2
        linear = [m for m in module.modules() if not any(m.children()) and _is_matrix(getattr(m, "weight", None))]
        if linear:
            return Place(linear[-1], "in")
    raise SiteNotFound(f"{type(place.module).__name__} of block {layer} has no linear map whose hidden units to read")


def find_router(model: nn.Module, layer: int) -> nn.Module | None:
    """What chooses among the experts of a block's feed-forward; None where that is dense. Raises SiteNotFound."""
    mlp: Any = locate(model, Site("mlp_in", layer)).module
    if is_hooked(model) or not hasattr(mlp, "experts"):
        return None
    for name in ("gate", "router"):
        if isinstance(found := getattr(mlp, name, None), nn.Module):
            return found
    have = ", ".join(name for name, _ in mlp.named_children())
    raise SiteNotFound(f"{type(mlp).__name__} of block {layer} has experts but no gate or router; it has {have}")


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and weight.ndim == 2


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer's block list: the outermost list as long as the config says the model is deep.

    Of an encoder-decoder the decoder's. Raises SiteNotFound where no list or several fit.
    """
    if is_hooked(model):
        return model.blocks  # type: ignore[return-value]
    depth = n_layers(model)
    inner = _decoder(model)
    found = {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and name.rsplit(".", 1)[-1] in _BLOCK_LISTS
    }
    outermost = min((name.count(".") for name in found), default=0)
    lists = [module for name, module in found.items() if name.count(".") == outermost]
    if len(lists) != 1:
        raise SiteNotFound(f"{type(model).__name__}: {len(lists)} lists of {depth} blocks, expected exactly one")
    return lists[0]


def n_layers(model: nn.Module) -> int:
    config: Any = model.cfg if is_hooked(model) else text_config(model)
    for name in ("n_layers", "num_decoder_layers", "num_hidden_layers", "n_layer"):
        if (depth := getattr(config, name, None)) is not None:
            return int(depth)
    raise SiteNotFound(f"{type(model).__name__}: its config does not say how many layers it has")


def text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config(decoder=True)


def _decoder(model: nn.Module) -> nn.Module:
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    return decoder if isinstance(decoder, nn.Module) else model


def _locate_hook_point(model: nn.Module, site: Site) -> Place:
    depth = n_layers(model)
    _check_layer(model, site, depth)
    point: Any = model.blocks[site.layer]  # type: ignore[index]
    for part in STREAMS[site.stream].split("."):  # aliases on a bridge are attributes, not submodules
        point = getattr(point, part, None)
    if not isinstance(point, nn.Module):
        raise SiteNotFound(f"{type(model).__name__} has no {site}")
    block: Any = model.blocks[site.layer]  # type: ignore[index]
    flattens = site.stream in ("mlp_in", "mlp_out") and hasattr(getattr(block, "original_component", None), "fc1")
    return Place(point, "out", by_head=site.stream == "hook_z", block=block if flattens else None)


def _locate_module(model: nn.Module, site: Site) -> Place:
    layers = blocks(model)
    _check_layer(model, site, len(layers))
    block = layers[site.layer]
    match site.stream:
        case "resid_pre":
            return Place(block, "in")
        case "resid_post":
            return Place(block, "out")
        case "attn_out":
            norm = getattr(block, "post_attention_layernorm", None) if _norms_branches(block) else None
            return Place(norm or _branch(block, _ATTENTION, site), "out")
        case "mlp_out":
            norm = getattr(block, "post_feedforward_layernorm", None) if _norms_branches(block) else None
            last = norm or _branch(block, (*_MLP, "fc2"), site)
            return Place(last, "out", block=block if last is getattr(block, "fc2", None) else None)
        case "mlp_in":
            first = _child(block, (*_MLP, "fc1"), site)
            return Place(first, "in", block=block if first is getattr(block, "fc1", None) else None)
        case "hook_z":
            return Place(_child(_child(block, _ATTENTION, site), _PROJECTION, site), "in")
    raise AssertionError(site)


def _norms_branches(block: nn.Module) -> bool:
    """Gemma 2 and 3 and OLMo 2 norm a branch before they add it; TransformerLens hooks after that norm."""
    return hasattr(block, "post_feedforward_layernorm")


def _branch(block: nn.Module, names: tuple[str, ...], site: Site) -> nn.Module:
    branch = _child(block, names, site)
    if "residual" in inspect.signature(branch.forward).parameters:  # Bloom, Falcon: its output is no branch
        raise SiteNotFound(f"{site}: {type(branch).__name__} adds the residual itself, so its output is not the branch")
    return branch


def _child(module: nn.Module, names: tuple[str, ...], site: Site) -> nn.Module:
    for name in names:
        try:
            return module.get_submodule(name)
        except AttributeError:
            continue
    have = ", ".join(name for name, _ in module.named_children())
    raise SiteNotFound(f"{type(module).__name__} has no place for {site}: looked for {', '.join(names)}; it has {have}")


def _check_layer(model: nn.Module, site: Site, depth: int) -> None:
    if not 0 <= site.layer < depth:
        raise SiteNotFound(f"{site}: {type(model).__name__} has layers 0 to {depth - 1}")
