"""Tensor names of the published files, as data: rename tables and the few functions that apply them.

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
    """One foreign name, and the native names of what its tensor holds."""

    foreign: str
    native: tuple[str, ...]
    conv1x1: bool = False


@dataclass(frozen=True)
class Naming:
    """One way to name all tensors of a model part.

    marker: a tensor that no other naming of the part has; '' fits every file. dropped: tensors that only
    training needs, or that the configuration stands for, as a regular expression of whole names.
    """

    rules: tuple[Rule, ...]
    marker: str = ""
    dropped: str = ""

    def drops(self, name: str) -> bool:
        return bool(self.dropped) and re.fullmatch(self.dropped, name) is not None


def rules(table: Iterable[tuple], prefix: str = "", native_prefix: str = "") -> tuple[Rule, ...]:
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
    left = iter(values)
    return re.sub(r"[*@]", lambda _: next(left), pattern)


def foreign_names(native: Iterable[str], naming: Naming) -> dict[str, tuple[str, ...]]:
    """Every foreign name of these native tensors, with the native names of what it holds."""
    foreign = {}
    for name in set(native):
        for rule in naming.rules:
            if match := _matcher(rule.native[0]).match(name):
                foreign[_fill(rule.foreign, match.groups())] = tuple(_fill(n, match.groups()) for n in rule.native)
    return foreign


def to_native(tensors: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Foreign names to native ones; names that no rule knows stay, for the strict loader to report."""
    native = {}
    for name, tensor in tensors.items():
        if naming.drops(name):
            continue
        for rule in naming.rules:
            if match := _matcher(rule.foreign).match(name):
                tensor = tensor[..., 0, 0] if rule.conv1x1 else tensor
                targets = [_fill(target, match.groups()) for target in rule.native]
                # Where dim 0 is too short there are fewer chunks: the strict loader misses the others.
                native |= dict(zip(targets, tensor.chunk(len(targets)), strict=False))
                break
        else:
            native[name] = tensor
    return native


def from_native(tensors: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """The inverse of `to_native`; where two rules give the same native name the first one counts."""
    foreign = {}
    left = dict(tensors)
    for name in tensors:
        for rule in naming.rules:
            match = _matcher(rule.native[0]).match(name)
            if match and name in left:
                parts = [left.pop(_fill(target, match.groups())) for target in rule.native]
                tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
                foreign[_fill(rule.foreign, match.groups())] = tensor[..., None, None] if rule.conv1x1 else tensor
                break
    return foreign | left
