"""Dynamic combos: choices that bring inputs of their own, which a node shows only then.

A prompt writes them as {"schedule": "custom", "schedule.angles": "1.5, 1"}, and the node gets
{"schedule": {"schedule": "custom", "angles": "1.5, 1"}}. In prompts saved by version 0.1 such inputs are the node's:
{"schedule": "custom", "angles": "1.5, 1"}. With `accept_all_inputs` ComfyUI hands these over as well, and so it does a
choice that is none, which it would otherwise leave out.
"""

from collections.abc import Collection, Mapping
from typing import Any


def chosen(
    name: str, value: Mapping[str, Any] | str, offered: Collection[str], others: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The choice of the dynamic combo `name`, and the inputs that come with it, so far as they are known.

    value: what ComfyUI hands over for it. others: further inputs of the node. Raises ValueError for a choice that is
    not among those offered.
    """
    own = dict(value) if isinstance(value, Mapping) else {name: value}
    choice = own.pop(name)
    if choice not in offered:
        listed = f"one of {', '.join(offered)}" if len(offered) <= 5 else "one that the node lists"
        raise ValueError(f"{name} is {choice!r}, which it does not offer; choose {listed}")
    known = [(key.removeprefix(f"{name}."), entry) for key, entry in (*others.items(), *own.items())]
    return choice, {key: entry for key, entry in known if entry is not None}
