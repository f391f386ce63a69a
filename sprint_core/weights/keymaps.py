"""Tensor names of the published files, as data: rename tables and the one function that applies them.

A rule pairs one foreign name with the native ones. In patterns `*` stands for an index and `@` for
`weight` or `bias`; several native names share a foreign tensor in equal chunks along dim 0;
`conv1x1` rules see a 1x1 convolution where the native layer is linear. Native names are diffusers',
but for `scale_shift_table.weight` (layers.table_rows says why).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    foreign: str
    native: tuple[str, ...]
    conv1x1: bool = False


def _rules(table: Iterable[tuple], prefix: str = "", native_prefix: str = "") -> tuple[Rule, ...]:
    """Rules of rows (foreign, native or natives[, conv1x1])."""
    rows = []
    for foreign, native, *flags in table:
        natives = (native,) if isinstance(native, str) else native
        rows.append(Rule(prefix + foreign, tuple(native_prefix + n for n in natives), *flags))
    return tuple(rows)


@cache
def _matcher(pattern: str) -> re.Pattern:
    escaped = re.escape(pattern).replace(r"\*", r"(\d+)").replace("@", "(weight|bias)")
    return re.compile(escaped + r"\Z")


def _fill(pattern: str, values: tuple[str, ...]) -> str:
    values = iter(values)
    return re.sub(r"[*@]", lambda _: next(values), pattern)


def foreign_names(native: Iterable[str], rules: tuple[Rule, ...]) -> dict[str, tuple[str, ...]]:
    """Every foreign name of some native tensors, with the native ones that it holds."""
    names, found = set(native), {}
    for name in names:
        for rule in rules:
            if match := _matcher(rule.native[0]).match(name):
                found[_fill(rule.foreign, match.groups())] = tuple(_fill(n, match.groups()) for n in rule.native)
    return found


def to_native(tensors: Mapping[str, Tensor], rules: tuple[Rule, ...], dropped: Iterable[str] = ()) -> dict[str, Tensor]:
    """Foreign names to native ones; names that no rule knows stay, for the strict loader to report."""
    native = {}
    for name, tensor in tensors.items():
        if name in dropped:
            continue
        for rule in rules:
            if match := _matcher(rule.foreign).match(name):
                tensor = tensor[..., 0, 0] if rule.conv1x1 else tensor
                for target, part in zip(rule.native, tensor.chunk(len(rule.native))):
                    native[_fill(target, match.groups())] = part
                break
        else:
            native[name] = tensor
    return native


def from_native(tensors: Mapping[str, Tensor], rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """The inverse of `to_native`; where two rules give the same native name the first one counts."""
    foreign, left = {}, dict(tensors)
    for name in list(tensors):
        for rule in rules:
            match = _matcher(rule.native[0]).match(name)
            if match and name in left:
                parts = [left.pop(_fill(target, match.groups())) for target in rule.native]
                tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
                foreign[_fill(rule.foreign, match.groups())] = tensor[..., None, None] if rule.conv1x1 else tensor
                break
    return foreign | left
