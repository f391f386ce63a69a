"""Configurations are frozen dataclasses; this reads them back from JSON."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

Config = TypeVar("Config")


def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict`, also through JSON, whose lists become tuples again.

    Raises ValueError on keys that `cls` has not.
    """
    unknown = sorted(set(data) - {f.name for f in fields(cls)})
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {', '.join(unknown)}; it was written by a newer version")
    return cls(**{key: _freeze(value) for key, value in data.items()})


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value
