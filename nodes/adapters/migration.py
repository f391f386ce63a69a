"""Graphs of the packs that ran SANA before: which of our nodes ComfyUI offers in place of theirs.

Their nodes and widgets are those of city96/ComfyUI_ExtraModels and of lawrence-cj's fork of it. ComfyUI acts on this
only where a graph holds a node that no installed pack has: its page offers the exchange, and a queued prompt is read
so. What has no counterpart (docs/migration.md) stays as it is. Names of files pass unchanged, for the user to choose.
"""

import sys
from dataclasses import dataclass

from comfy_api.latest import ComfyAPI, io


@dataclass(frozen=True)
class Replacement:
    """One of their nodes as one of ours."""

    old: str
    new: str
    widgets: tuple[str, ...]  # theirs, in the order in which graphs save their values
    inputs: dict[str, str]  # our input -> theirs
    values: dict[str, str]  # our inputs that theirs do not have


# The page moves an output's links by this. A queued prompt needs no moving, as the indices are the same, and ComfyUI
# fails at it where the node at the other end was exchanged before: old_idx is text, which counts in the page alone.
OUTPUTS: list = [{"old_idx": "0", "new_idx": 0}]
PROMPT = {"clip": "GEMMA", "text": "text"}
# The page hands no values to what comes with a choice, which is where a dot is: sides are then entered there.
SIDES = {"size.width": "width", "size.height": "height", "batch_size": "batch_size"}
DEFAULT = {"instruction": "model default", "prompt_format": "authors"}
PLAIN = DEFAULT | {"instruction": "off"}  # Gemma without SANA's instruction: these packs encode negative prompts so
AUTO, CUSTOM = {"dtype": "auto"}, {"size": "custom"}
MODEL, ENCODER, VAE = "SanaSprintModelLoader", "SanaSprintTextEncoderLoader", "SanaSprintVAELoader"
ENCODE, LATENT = "SanaSprintTextEncode", "SanaSprintEmptyLatent"
# fmt: off
REPLACEMENTS = (
    Replacement("SanaCheckpointLoader", MODEL, ("ckpt_name", "model", "dtype"), {"model": "ckpt_name"},
                AUTO | {"time_scale": "auto"}),
    Replacement("GemmaLoader", ENCODER, ("model_name", "device", "dtype"), {"text_encoder": "model_name"}, AUTO),
    Replacement("ExtraVAELoader", VAE, ("vae_name", "vae_type", "dtype"), {"vae": "vae_name"}, AUTO),
    Replacement("SanaTextEncode", ENCODE, ("text",), PROMPT, DEFAULT),
    Replacement("GemmaTextEncode", ENCODE, ("text",), PROMPT, PLAIN),
    Replacement("EmptySanaLatentImage", LATENT, tuple(SIDES.values()), SIDES, CUSTOM),
    Replacement("EmptyDCAELatentImage", LATENT, tuple(SIDES.values()), SIDES, CUSTOM),
)
# fmt: on


async def offer() -> None:
    """Tell ComfyUI, if it exchanges nodes (its `node_replacement`) and runs as a server, which alone does so."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    api = getattr(ComfyAPI(), "node_replacement", None)
    if api is None or not hasattr(server, "node_replace_manager"):
        return
    for one in REPLACEMENTS:
        mapping = [{"new_id": new, "old_id": old} for new, old in one.inputs.items()]
        mapping += [{"new_id": new, "set_value": value} for new, value in one.values.items()]
        await api.register(
            io.NodeReplace(
                new_node_id=one.new,
                old_node_id=one.old,
                old_widget_ids=list(one.widgets),
                input_mapping=mapping,
                output_mapping=OUTPUTS,
            )
        )
