"""Options as pydantic models: their base class, and validation with errors in the words of the project."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import cleandoc
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from flexcache.errors import ConfigError, nearest

_UNION_PART = re.compile(r"(literal|list|tuple|dict|constrained|function)[-\[].*|int|str|bool|float")
_PLAIN = {"tuple_type": "a list", "list_type": "a list", "dict_type": "a dict", "string_type": "text"}
"""Kinds of value in the words of the project, by the type of an error of pydantic."""
OLD_NAMES = {
    "patience": ("heartbeat_timeout", "write heartbeat_timeout: 120, in seconds"),
    "buffer_mb": ("buffer_bytes", "write buffer_bytes: 256 MiB; a plain number counts bytes"),
}
"""Former names of options: the name of today, and how it is written. For Python, YAML and the command line alike."""


def _use_summary(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Describe a model in JSON schemas by the first line of its docstring."""
    schema["description"] = (model.__doc__ or "").partition("\n")[0]


if TYPE_CHECKING:
    _Model = BaseModel
else:

    class _OptionsType(type(BaseModel)):
        """Metaclass that raises ConfigError, not ValidationError, when options are constructed."""

        def __call__(cls, *args: Any, **fields: Any) -> Any:
            try:
                return super().__call__(*args, **fields)
            except ValidationError as error:
                raise config_error(error, cls, cls.__name__) from None

    class _Model(BaseModel, metaclass=_OptionsType):
        """A model whose constructor raises ConfigError."""


class Options(_Model):
    """Base of all options: booleans are not numbers, and docstrings list the fields with their descriptions.

    >>> from flexcache import Windows
    >>> Windows(length=True)
    Traceback (most recent call last):
    ...
    flexcache.errors.ConfigError: key 'length' has a value that cannot be used
      where: Windows
      expected: a number, not true or false
      found: True
    """

    model_config = ConfigDict(json_schema_extra=_use_summary)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        lines = [f"{name}\n    {_sentence(field)}" for name, field in cls.model_fields.items() if name in cls.names()]
        cls.__doc__ = "\n".join([cleandoc(cls.__doc__ or ""), "", "Attributes", "----------", *lines])

    @field_validator("*", mode="before")
    @classmethod
    def _check_no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        given = value if isinstance(value, list | tuple | set) else (value,)
        if kinds & {int, float} and bool not in kinds and any(isinstance(item, bool) for item in given):
            raise PydanticCustomError("boolean", "a number, not true or false")
        return value

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names that a user can set."""
        return tuple(cls.model_fields)


def _sentence(field: FieldInfo) -> str:
    """Return the description of a field, and its default, as sentences."""
    text = field.description or ""
    default = None if field.is_required() else field.default
    return f"{text[:1].upper()}{text[1:]}." + ("" if default is None else f" By default {default!r}.")


def _kinds(annotation: Any) -> set[Any]:
    """Return an annotation and those inside it, such as the members of a union."""
    return {annotation}.union(*map(_kinds, get_args(annotation))) if annotation.__hash__ else set()


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], data: Mapping[str, Any], where: str, *, stored: bool = False) -> Model:
    """Return *data* as a pydantic model, or raise ConfigError with the first thing that is wrong.

    Parameters
    ----------
    stored
        True for values that a store holds: `flexcache.spec.CaptureSpec` then takes them as they are.

    Raises
    ------
    ConfigError
        An unknown key, with the nearest known one; a missing key; or a value that cannot be used.
    """
    try:
        return model.model_validate(_without_numpy(data), context={"stored": stored})
    except ValidationError as error:
        raise config_error(error, model, where) from None


def config_error(error: ValidationError, model: type[BaseModel], where: str) -> ConfigError:
    """Return the first error of a validation as a ConfigError, with all types of value that the key can have."""
    found = error.errors(include_url=False)
    first, path = found[0], _key(found[0]["loc"])
    parent = _model_at(model, first["loc"][:-1])
    names = parent.names() if parent and issubclass(parent, Options) else tuple(parent.model_fields) if parent else ()
    if first["type"] == "extra_forbidden":
        return unknown_key(path, names, where)
    if first["type"] == "missing":
        return ConfigError(f"key {path!r} is missing", where=where, expected=f"one of {', '.join(names)}")
    return ConfigError(
        f"key {path!r} has a value that cannot be used",
        where=where,
        expected=" or ".join(
            dict.fromkeys(
                _PLAIN.get(one["type"]) or one["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
                for one in found
                if _key(one["loc"]) == path
            )
        ),
        found=repr(first["input"]),
    )


def _key(place: tuple[int | str, ...]) -> str:
    """Return the key of a place that pydantic names, without the types of a union that it tried there."""
    return ".".join(str(part) for part in place if not _UNION_PART.fullmatch(str(part)))


def unknown_key(path: str, names: tuple[str, ...], where: str) -> ConfigError:
    """Return the error for a key that is not among *names*: with its new name if it was renamed, else the nearest one.

    >>> print(unknown_key("buffer_mb", ("buffer_bytes",), "run.yaml"))
    key 'buffer_mb' is now called 'buffer_bytes'
      where: run.yaml
      what to do: write buffer_bytes: 256 MiB; a plain number counts bytes
    """
    name = path.rpartition(".")[2]
    new, remedy = OLD_NAMES.get(name, (None, None))
    if new in names:
        return ConfigError(f"key {path!r} is now called {new!r}", where=where, remedy=remedy)
    return ConfigError(f"unknown key {path!r}", where=where, remedy=nearest(name, names))


def _without_numpy(value: Any) -> Any:
    """Return plain values in place of the numbers and arrays of numpy."""
    if isinstance(value, Mapping):
        return {key: _without_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without_numpy, value)) if type(value) in (list, tuple) else value
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _model_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    current: Any = model
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), current)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None
