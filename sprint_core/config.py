"""Configurations are frozen dataclasses; this reads them back from JSON and checks what files and people write."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

Config = TypeVar("Config")

LARGEST = 1_000_000  # of any integer: vocabularies are a quarter of it
DEEPEST = 1000  # layers: a network of more, from a damaged file, would fill the memory with empty modules


def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict`, also through JSON, whose lists become tuples again.

    Raises ValueError on keys that `cls` has not.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is {data!r}, not an object")
    unknown = sorted(set(data) - {f.name for f in fields(cls)})
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {', '.join(unknown)}; it was written by a newer version")
    return cls(**{key: _freeze(value) for key, value in data.items()})


def check_numbers(config: Any, positive: tuple[str, ...] = ()) -> None:
    """Raise ValueError for a field of the wrong type or out of any sensible range; `positive` ones must not be 0."""
    for f in fields(config):
        value = getattr(config, f.name)
        lowest = 1 if f.name in positive else 0
        if f.type is int:
            good = isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= LARGEST
            good = good and (f.name != "depth" or value <= DEEPEST)
        elif f.type is float:
            good = isinstance(value, int | float) and math.isfinite(value) and (value > 0 if lowest else value >= 0)
        else:
            good = f.type is not bool or isinstance(value, bool)
        if not good:
            raise ValueError(f"{f.name} is {value!r}")


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value
