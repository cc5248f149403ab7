"""A place in a transformer, named as TransformerLens names it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ..errors import SiteNotFound

# In the order in which a block computes them: (stream, TransformerLens hook name inside the block).
STREAMS = {
    "resid_pre": "hook_resid_pre",
    "hook_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_in": "ln2.hook_normalized",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
_ORDER = {stream: i for i, stream in enumerate(STREAMS)}
_ALIASES = {hook: stream for stream, hook in STREAMS.items()} | {
    "attn.hook_attn_out": "attn_out",
    "mlp.hook_in": "mlp_in",
    "z": "hook_z",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_SHORT = re.compile(r"(\w+)\.(\d+)")


@total_ordering
@dataclass(frozen=True)
class Site:
    """``Site("resid_post", 7)``, written ``blocks.7.hook_resid_post``; sites sort as the model computes them.

    ``mlp_in`` is what the MLP reads (``ln2.hook_normalized``), where transcoders look; ``hook_z`` is the
    attention output per head before the output projection, with the heads flattened.
    """

    stream: str
    layer: int

    @classmethod
    def parse(cls, name: str | Site) -> Site:
        """``"blocks.7.hook_resid_post"`` or ``"resid_post.7"``. Raises SiteNotFound naming the known streams."""
        if isinstance(name, Site):
            return name
        if match := _BLOCK.fullmatch(name):
            layer, hook = int(match[1]), match[2]
            stream = _ALIASES.get(hook)
        elif match := _SHORT.fullmatch(name):
            layer, stream = int(match[2]), match[1] if match[1] in STREAMS else None
        else:
            layer, stream = 0, None
        if stream is None:
            known = ", ".join(f"blocks.<layer>.{hook}" for hook in STREAMS.values())
            raise SiteNotFound(f"no site named {name!r}; known: {known}")
        return cls(stream, layer)

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{STREAMS[self.stream]}"

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        return (self.layer, _ORDER[self.stream]) < (other.layer, _ORDER[other.stream])

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            cls.parse,
            core_schema.is_instance_schema(cls),
            serialization=core_schema.plain_serializer_function_ser_schema(str),
            json_schema_input_schema=core_schema.str_schema(),
        )
