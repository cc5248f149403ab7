"""A component is a frozen pydantic model with one ``__call__``; its fields are its configuration.

``{kind: clamp, to: -50}`` *is* ``Clamp(to=-50)``. A family (``Edit``, ``Gate``, ``Score``, ...) is an
abstract component; its members register themselves when their class is made, so adding one touches one
file and its import line. Unknown keys and unknown kinds fail and name the known ones.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from .errors import InvalidConfig, UnknownName

T = TypeVar("T", bound=BaseModel)


class Frozen(BaseModel):
    """An immutable record that refuses unknown keys and names the known ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and (unknown := [key for key in data if key not in cls.model_fields]):
            known = ", ".join(cls.model_fields) or "it takes none"
            raise InvalidConfig(f"{_label(cls)} has no {unknown[0]!r}; known: {known}")
        return data


class Component(Frozen):
    """Base of every family: ``class Gate(Component, family=True)``, then ``class TokenGate(Gate)``, kind "token".

    A class whose name begins with an underscore is shared ground of some members and no member itself.
    """

    kind: ClassVar[str]
    members: ClassVar[dict[str, type[Self]]]
    _family: ClassVar[bool] = False
    _suffix: ClassVar[str] = ""

    def __init_subclass__(cls, family: bool = False) -> None:
        super().__init_subclass__()
        cls._family = family
        if family:
            cls.members = {}
            cls._suffix = f"_{_snake(cls.__name__)}"
        elif not cls.__name__.startswith("_"):
            cls.kind = _snake(cls.__name__).removesuffix(cls._suffix)
            cls.members[cls.kind] = cls  # type: ignore[assignment]

    @classmethod
    def parse(cls, spec: Any) -> Self:
        """``"zero"``, ``{"kind": "clamp", "to": -5}`` or a ready component -> component.

        Raises UnknownName for an unknown kind, InvalidConfig for anything else that does not fit.
        """
        if isinstance(spec, cls):
            return spec
        if isinstance(spec, str):
            spec = {"kind": spec}
        if not isinstance(spec, dict) or "kind" not in spec:
            raise InvalidConfig(f"a spec of {_label(cls)} is a mapping with a 'kind'; given: {spec!r}")
        fields = dict(spec)
        kind = fields.pop("kind")
        if kind not in cls.members:
            raise UnknownName(_label(cls), str(kind), cls.members)
        return build(cls.members[kind], fields)

    def spec(self) -> dict[str, Any]:
        """Plain data from which ``parse`` makes an equal component."""
        return {"kind": self.kind, **self.model_dump(mode="json")}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls._family:
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(lambda member: member.spec())
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        if not cls._family:
            return handler(schema)
        by_name = {"enum": sorted(name for name, member in cls.members.items() if not _requires(member))}
        if cls in _UNDER_WAY:  # a member with a member inside: there only the kind is checked
            kind = {"properties": {"kind": {"enum": sorted(cls.members)}}, "required": ["kind"], "type": "object"}
            return {"anyOf": [by_name, kind]}
        _UNDER_WAY.append(cls)
        try:
            return {"anyOf": [by_name, *(_member_schema(member) for _, member in sorted(cls.members.items()))]}
        finally:
            _UNDER_WAY.remove(cls)


_UNDER_WAY: list[type[Component]] = []
"""Families whose JSON schema is being written."""


def build(cls: type[T], fields: dict[str, Any]) -> T:
    """Validate ``fields`` into ``cls``; what does not fit becomes one readable InvalidConfig."""
    try:
        return cls(**fields)
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc'])) or '(whole)'}: {e['msg']}" for e in error.errors())
        raise InvalidConfig(f"{_label(cls)}: {'; '.join(lines)}") from None


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _label(cls: type) -> str:
    return _snake(cls.__name__).replace("_", " ")


def _requires(member: type[Component]) -> bool:
    return any(field.is_required() for field in member.model_fields.values())


def _member_schema(member: type[Component]) -> JsonSchemaValue:
    schema: JsonSchemaValue = member.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    schema["properties"] = {"kind": {"const": member.kind}, **schema.get("properties", {})}
    schema["required"] = ["kind", *schema.get("required", [])]
    schema["title"] = member.kind
    return schema


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema that stands inside another one cannot keep definitions of its own."""
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}
