"""Laws of every component: it is its own frozen, strict configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from l2d_framework.component import Component
from l2d_framework.testing.laws import Laws, ensure

law = Laws()


@law
def check_name_is_literal(component: Component) -> None:
    """A run file selects the component by `name`, so the field allows exactly one value, its default."""
    cls = type(component)
    ensure(bool(cls.kind), f"{cls.__qualname__} has no kind; inherit from one of the six interfaces.")
    ensure("name" in cls.model_fields, f'{cls.__qualname__} needs a field `name: Literal["..."] = "..."`.')
    field = cls.model_fields["name"]
    ensure(
        get_origin(field.annotation) is Literal and get_args(field.annotation) == (field.default,),
        f"{cls.__qualname__}.name must be a Literal of its default {field.default!r}; got {field.annotation}.",
    )


@law
def check_json_round_trip(component: Component) -> None:
    """A component saved as JSON comes back equal, both from the text and from the values a YAML reader makes of it."""
    cls = type(component)
    text = component.model_dump_json()
    values = json.loads(text)
    problem = _problem(cls, values)
    ensure(problem is None, f"{component!r} cannot be read back from {text}: {problem}")
    for again in (cls.model_validate_json(text), cls.model_validate(values)):
        ensure(again == component, f"JSON changed {component!r} into {again!r}.")


@law
def check_unknown_field_is_refused(component: Component) -> None:
    """A misspelt option is an error, in the component and in each of its sections."""
    for section in _sections(component):
        problem = _problem(type(section), {**section.model_dump(mode="json"), "no_such_option": 1})
        name = type(section).__qualname__
        ensure(problem is not None, f'{name} accepts the unknown option "no_such_option"; set extra="forbid".')


@law
def check_is_frozen(component: Component) -> None:
    """A component never changes after it was made, nor do its sections."""
    for section in _sections(component):
        for field in type(section).model_fields:
            name = f"{type(section).__qualname__}.{field}"
            ensure(not _is_assignable(section, field), f"{name} can be assigned to; set frozen=True.")


@law
def check_defaults_are_valid(component: Component) -> None:
    """What a field is when left out would also be accepted when written out."""
    cls = type(component)
    required = {name: value for name, value in component.to_json().items() if cls.model_fields[name].is_required()}
    problem = _problem(cls, cls.model_validate(required).to_json())
    ensure(problem is None, f"A default of {cls.__qualname__} is not valid: {problem}")


@law
def check_types_are_strict(component: Component) -> None:
    """A number written as text is refused instead of guessed at."""
    for section in _sections(component):
        data = section.model_dump(mode="json")
        for field, value in data.items():
            if isinstance(value, int | float):
                problem = _problem(type(section), {**data, field: str(value)})
                name = f"{type(section).__qualname__}.{field}"
                ensure(problem is not None, f"{name} accepts the text {str(value)!r}; set strict=True.")


@law
def check_extra_is_named(component: Component) -> None:
    """A component that needs more than the core dependencies says what to install."""
    cls = type(component)
    claim = f"{cls.__qualname__} requires {cls.requires} but its `extra` does not say what to install."
    ensure(not cls.requires or bool(cls.extra), claim)


def _sections(model: BaseModel) -> Iterator[BaseModel]:
    yield model
    for field in type(model).model_fields:
        value = getattr(model, field)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, BaseModel):
                yield from _sections(item)


def _is_assignable(section: BaseModel, field: str) -> bool:
    try:
        setattr(section, field, getattr(section, field))
    except ValidationError:
        return False
    return True


def _problem(cls: type[BaseModel], data: dict[str, Any]) -> str | None:
    """Why a model cannot be made of some values, or None if it can."""
    try:
        cls.model_validate(data)
    except ValidationError as error:
        return str(error)
    return None
