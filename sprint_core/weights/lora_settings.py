"""What PEFT and diffusers say of a LoRA beside its tensors: alpha by layer, and whether it is rank-stabilised.

PEFT keeps it in adapter_config.json beside the file, diffusers in the file's header, there with a component in front
of each key: {"transformer.lora_alpha": 8, "transformer.use_rslora": true}. A layer's update is scaled by alpha / rank,
or by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

METADATA_KEY = "lora_adapter_metadata"  # of the header
CONFIG = "adapter_config.json"
COMPONENTS = ("transformer.", "text_encoder.", "")
WRAPPER = "base_model.model."  # in front of the layers of a PEFT model


@dataclass(frozen=True)
class Settings:
    """What is said of the layers whose names begin with a component."""

    alpha: float
    alpha_pattern: Mapping[re.Pattern, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def alpha_of(self, layer: str, rank: int) -> float:
        """The alpha under which alpha / rank is the scale of this layer."""
        alpha = next((value for key, value in self.alpha_pattern.items() if key.match(layer)), self.alpha)
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha


class LoraSettings:
    """The settings of a file by component; none where nothing is said, or where it is damaged, which the log says."""

    def __init__(self, metadata: Mapping[str, str], config_json: Path | None = None, source: str = "this LoRA"):
        self.components: dict[str, Settings] = {}
        try:
            if METADATA_KEY in metadata:
                self._read(json.loads(metadata[METADATA_KEY]))
            elif config_json is not None and config_json.is_file():
                self._read(json.loads(config_json.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError, re.error, RecursionError) as error:
            self.components = {}
            log.warning(
                "%s: its settings (%s) cannot be read (%s): alpha is taken to be the rank, the usual default; if the "
                "effect is too weak or too strong, change the strength",
                source, METADATA_KEY if METADATA_KEY in metadata else CONFIG, error,
            )  # fmt: skip

    def _read(self, data: Mapping[str, Any]) -> None:
        for component in COMPONENTS:
            if (alpha := data.get(f"{component}lora_alpha")) is None:
                continue
            patterns = data.get(f"{component}alpha_pattern") or {}
            # As PEFT matches them: regular expressions of a layer's whole name, or of its end behind a dot.
            compiled = {re.compile(rf"(.*\.)?({key})\Z"): float(value) for key, value in patterns.items()}
            self.components[component] = Settings(float(alpha), compiled, bool(data.get(f"{component}use_rslora")))

    def alpha_of(self, layer: str, rank: int) -> float | None:
        """alpha of a layer as the file names it, under which alpha / rank is its scale; None where nothing is said."""
        name = layer.removeprefix(WRAPPER)
        for component, settings in self.components.items():
            if name.startswith(component):
                return settings.alpha_of(name.removeprefix(component), rank)
        return None
