"""The base of all configuration classes, their unions, and what to say where a value fits none."""

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from rlsparse.errors import nearest


class Config(BaseModel):
    """Base of all configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def function_or(*words: str) -> Any:
    """Field of a text that is one of ``words`` or names a function; errors tell its description."""
    pattern = rf"^({'|'.join(words)}|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$"
    return Field(pattern=pattern, description=f"{', '.join(words)} or module:function")


Location = Sequence[str | int]
"""Where a value lies: the keys that lead there. Pydantic's hold the names of members, too."""


def models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """All configuration classes that an annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType, tuple, list):
        for argument in typing.get_args(annotation):
            yield from models_of(argument)


def tag_of(model: type[BaseModel]) -> str | None:
    """What ``name`` or ``kind`` says in a member of a union; None for other classes."""
    for field in ("name", "kind"):
        if field in model.model_fields:
            values = typing.get_args(model.model_fields[field].annotation)
            if len(values) == 1:
                return str(values[0])
    return None


def defaults_of(union: Any, tag: str) -> dict[str, Any]:
    """The defaults of a union's member; without the fields that have none, empty for no member."""
    return {
        name: field.get_default(call_default_factory=True, validated_data={})
        for model in models_of(union)
        if tag_of(model) == tag
        for name, field in model.model_fields.items()
        if not field.is_required()
    }


def models_at(root: type[BaseModel], location: Location) -> list[type[BaseModel]]:
    """The configuration classes, of those inside ``root``, that may stand at a location."""
    found = [root]
    for part in location:
        tagged = [model for model in found if part in (tag_of(model), model.__name__)]
        if tagged or isinstance(part, int):
            found = tagged or found
        else:
            annotations = [m.model_fields[part].annotation for m in found if part in m.model_fields]
            found = [model for annotation in annotations for model in models_of(annotation)]
    return found


def place_of(root: type[BaseModel], value: Any, error: Mapping[str, Any]) -> list[str | int]:
    """Keys that lead to the cause of one of pydantic's errors on ``value``, read as a ``root``.

    Pydantic's own location holds names of members as well. An unknown member is an error of the key
    that names it.
    """
    place: list[str | int] = []
    for count, part in enumerate(error["loc"]):
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            if not any(
                part in model.model_fields for model in models_at(root, error["loc"][:count])
            ):
                continue
        place.append(part)
    return [*place, _key_of(error)] if error["type"] == "union_tag_invalid" else place


def _key_of(error: Mapping[str, Any]) -> str:
    """The key that names the member of a union: ``name`` or ``kind``."""
    return str(error["ctx"]["discriminator"]).strip("'")


def _quoted(text: str) -> list[str]:
    """The words of pydantic's list of what is expected: 'a', 'b' or 'c'."""
    return re.findall(r"'([^']*)'", text)


def _items(count: int) -> str:
    return f"{count} item{'s' if count > 1 else ''}"


def explain(root: type[BaseModel], value: Any, error: Mapping[str, Any]) -> str:
    """One of pydantic's errors on ``value`` in a line: where, what, what is allowed, what it is.

    Text that fits no pattern is told the field's description instead.
    """
    kind, given = error["type"], error["input"]
    name = ".".join(map(str, place_of(root, value, error)))
    if kind == "extra_forbidden":
        models = models_at(root, error["loc"][:-1])
        fields = [pair for model in models for pair in model.model_fields.items()]
        known = sorted({field.alias or name for name, field in fields})
        return f"unknown key {name}; {nearest(str(error['loc'][-1]), known)}"
    members = sorted(filter(None, map(tag_of, models_at(root, error["loc"]))))
    if kind == "union_tag_invalid":
        return f"unknown {name} {error['ctx']['tag']}; {nearest(error['ctx']['tag'], members)}"
    if kind in ("literal_error", "enum") and isinstance(given, str):
        return f"unknown {name} {given}; {nearest(given, _quoted(error['ctx']['expected']))}"
    if kind == "missing" and isinstance(error["loc"][-1], int):
        return f"{name}: must have {error['loc'][-1] + 1} or more items"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "union_tag_not_found":
        message = f"{_key_of(error)} is missing; known: {', '.join(members)}"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        example = f", such as {{name: {given}}}" if given in members else ""
        message = f"must be a mapping{example} (got {given!r})"
    elif kind == "string_pattern_mismatch":
        *outer, field = error["loc"]
        described = [m.model_fields[str(field)].description for m in models_at(root, outer)]
        message = f"must be {described[0]} (got {given!r})"
    elif kind == "too_short":
        message = f"must have at least {_items(error['ctx']['min_length'])} (got {given!r})"
    elif kind == "too_long":
        message = f"must have at most {_items(error['ctx']['max_length'])} (got {given!r})"
    elif kind not in ("missing", "value_error"):
        message += f" (got {given!r})"
    return f"{name}: {message}" if name else message


def distinct(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Pydantic's errors but those that follow from others: of lists that lost their wrong items."""
    return [
        error
        for error in errors
        if error["type"] != "too_short" or len(error["input"]) < error["ctx"]["min_length"]
    ]
