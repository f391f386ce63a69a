"""What PEFT and diffusers say of a LoRA beside its tensors: alpha by layer, and whether it is rank-stabilised.

PEFT keeps it in adapter_config.json beside the file, diffusers in the file's header, there with a component in front
of each key: {"transformer.lora_alpha": 8, "transformer.use_rslora": true}. A layer's update is scaled by alpha / rank,
or by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import disk, messages

log = messages.logger(__name__)

METADATA_KEY = "lora_adapter_metadata"  # of the header
CONFIG = "adapter_config.json"
KEYS = ("lora_alpha", "alpha", "peft_type", "alpha_pattern", "use_rslora", "r", "rank_pattern")
LYCORIS = ("LOHA", "LOKR")  # call it alpha
COMPONENTS = ("transformer.", "text_encoder.", "")
WRAPPER = "base_model.model."  # in front of the layers of a PEFT model


@dataclass(frozen=True)
class Settings:
    """What is said of the layers whose names begin with a component."""

    alpha: float
    alpha_pattern: Mapping[re.Pattern, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    rank: float | None = None
    rank_pattern: Mapping[re.Pattern, float] = field(default_factory=dict)

    def alpha_of(self, layer: str, rank: int) -> float:
        """The alpha under which alpha / rank is the scale of this layer."""
        alpha = _first_match(self.alpha_pattern, layer, self.alpha)
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha

    def scale_of(self, layer: str) -> float:
        """alpha / rank by the settings alone."""
        rank = _first_match(self.rank_pattern, layer, self.rank)
        return self.alpha_of(layer, 1) / rank if rank else 1.0


def _first_match(patterns: Mapping[re.Pattern, float], layer: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if key.match(layer)), default)


def _patterns(data: Mapping[str, Any]) -> dict[re.Pattern, float]:
    """As PEFT matches them: regular expressions of a layer's whole name, or of its end behind a dot."""
    return {re.compile(rf"(.*\.)?({key})\Z"): float(value) for key, value in data.items()}


class LoraSettings:
    """The settings of a file by component; none where nothing is said, or where it is damaged, which the log says."""

    def __init__(self, metadata: Mapping[str, str], config_json: Path | None = None, source: str = "this LoRA"):
        self.components: dict[str, Settings] = {}
        try:
            if METADATA_KEY in metadata:
                self._read(json.loads(metadata[METADATA_KEY]))
            elif config_json is not None and config_json.is_file():
                self._read(disk.read_json(config_json))
        except (OSError, ValueError, TypeError, AttributeError, re.error, RecursionError) as error:
            self.components = {}
            log.warning(
                "%s: its settings (%s) cannot be read (%s): alpha is taken to be the rank, the usual default; if the "
                "effect is too weak or too strong, change the strength",
                source, METADATA_KEY if METADATA_KEY in metadata else CONFIG, error,
            )  # fmt: skip

    def _read(self, data: Mapping[str, Any]) -> None:
        for component in COMPONENTS:
            of_component = {key: data.get(f"{component}{key}") for key in KEYS}
            alpha = of_component["lora_alpha"]
            if alpha is None and of_component["peft_type"] in LYCORIS:
                alpha = of_component["alpha"]
            if alpha is None:
                continue
            self.components[component] = Settings(
                float(alpha),
                _patterns(of_component["alpha_pattern"] or {}),
                bool(of_component["use_rslora"]),
                None if of_component["r"] is None else float(of_component["r"]),
                _patterns(of_component["rank_pattern"] or {}),
            )

    def alpha_of(self, layer: str, rank: int) -> float | None:
        """alpha of a layer as the file names it, under which alpha / rank is its scale; None where nothing is said."""
        of_layer = self._of(layer)
        return of_layer[0].alpha_of(of_layer[1], rank) if of_layer else None

    def scale_of(self, layer: str) -> float:
        """The scale of a LoKr whose tensors do not show a rank, which is PEFT's alone; 1 where nothing is said."""
        of_layer = self._of(layer)
        return of_layer[0].scale_of(of_layer[1]) if of_layer else 1.0

    def _of(self, layer: str) -> tuple[Settings, str] | None:
        name = layer.removeprefix(WRAPPER)
        for component, settings in self.components.items():
            if name.startswith(component):
                return settings, name.removeprefix(component)
        return None
