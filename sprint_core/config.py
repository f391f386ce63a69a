"""Configurations are frozen dataclasses whose type hints say everything that a field may hold.

    width: Count = 2240                       an integer from 1
    softcap: PositiveNumber | None = 50.0     a number above 0, or None
    wiring: Literal["authors", "diffusers"]   one of two words
    channels: tuple[Annotated[int, Range(1, 65536)], ...]

`check_fields`, called from `__post_init__`, holds the values against these hints; `from_dict` reads a configuration
back from JSON. Both guard against damaged files and against what people write by hand.
"""

import functools
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


@dataclass(frozen=True)
class Range:
    """Limits of a number, as the annotation of an int or a float; both belong to the range unless `above` says not."""

    lowest: float = 0.0
    highest: float = math.inf
    above: bool = False  # the lowest value itself is refused

    def __contains__(self, value: float) -> bool:
        return self.lowest <= value <= self.highest and not (self.above and value == self.lowest)

    def __str__(self) -> str:
        start = f"above {self.lowest:g}" if self.above else f"from {self.lowest:g}"
        return start if self.highest == math.inf else f"{start} to {self.highest:.9g}"


Count = Annotated[int, Range(1, 1e6)]  # vocabularies are a quarter of the limit
CountOrZero = Annotated[int, Range(0, 1e6)]
Depth = Annotated[int, Range(1, 1000)]  # layers: the modules of more, from a damaged file, would fill the memory
Number = Annotated[float, Range(0)]
PositiveNumber = Annotated[float, Range(0, above=True)]


def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict`, also through JSON, whose lists become tuples again.

    Raises ValueError on data that is no mapping and on keys that `cls` does not have; `cls` checks the values.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is {data!r}, not an object")
    unknown = sorted(set(data) - set(_hints(cls)))
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {', '.join(unknown)}; it was written by a newer version")
    return cls(**{key: _freeze(value) for key, value in data.items()})


def check_fields(config: Any) -> None:
    """Raise ValueError, naming class, field and value, for the first field whose value is not what its hint says.

    An int passes for a float, a bool for neither. Floats must be finite, with or without a Range.
    """
    cls = type(config)
    for name, hint in _hints(cls).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            raise ValueError(f"{cls.__name__}.{name} is {value!r}; it must be {_description(hint)}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The type hint of each field, in the fields' order, with its Annotated ranges."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}  # pyright: ignore[reportArgumentType]: dataclass


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0]) and value in arguments[1]
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:  # of any length
        return isinstance(value, tuple) and all(_fits(entry, arguments[0]) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "None"}


def _description(hint: Any) -> str:
    """What a hint admits, in words, as the end of 'it must be ...'."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_description(arguments[0])} {arguments[1]}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_description, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list, of which each entry is {_description(arguments[0])}"
    return _WORDS[hint]


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value
