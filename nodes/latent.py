"""Empty SANA Latent: an image size -> LATENT."""

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..sprint_core.images import sizes
from ..sprint_core.images.sizes import SIDE_PX, label
from ..sprint_core.latent import DOWNSCALE, LATENT_CHANNELS
from .adapters import choices, screen
from .adapters import model as adapter

CUSTOM = "custom"
SIZES = sizes.choices()
FIRST, *OTHERS = SIZES
OLDER = {label(*size): size for size in sizes.BINS}  # as version 0.1.0 wrote them


def size_of(size: dict | str, others: dict) -> tuple[bool, tuple[int, int]]:
    """(whether custom, (width, height)) of these inputs; others: the further ones of the node. Raises ValueError."""
    choice, own = choices.chosen("size", size, {CUSTOM, *SIZES, *OLDER}, others)
    if choice == CUSTOM:
        return True, (int(own.get("width", SIDE_PX)), int(own.get("height", SIDE_PX)))
    return False, (SIZES | OLDER)[choice]


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        side = {"default": SIDE_PX, "min": sizes.MIN_PX, "max": sizes.MAX_PX, "step": DOWNSCALE, "optional": True}
        sides = [
            io.Int.Input(name, **side, tooltip="In pixels; rounded to a multiple of 32.")
            for name in ("width", "height")
        ]
        return io.Schema(
            node_id="SanaSprintEmptyLatent",
            display_name="Empty SANA Latent",
            category="SANA-Sprint/latent",
            description="The start of text-to-image. Offers the sizes SANA was trained on.",
            search_aliases=["empty latent", "sana size", "aspect ratio", "resolution"],
            inputs=[
                io.DynamicCombo.Input(
                    "size",
                    options=[io.DynamicCombo.Option(FIRST, []), io.DynamicCombo.Option(CUSTOM, sides)]
                    + [io.DynamicCombo.Option(name, []) for name in OTHERS],
                    tooltip="Aspect ratio, width x height: the sizes SANA was trained on; or custom, for your own. A "
                    "model that comes in scales the listed ones to its size. The node says what it made.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many images to generate at once."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Scales the listed sizes to the model's own, for those not trained at 1024 px (2K, 4K).",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="For the latent input of any sampler.")],
            hidden=[io.Hidden.unique_id],
            accept_all_inputs=True,
        )

    @classmethod
    def validate_inputs(cls, size=None):
        return screen.fault_of(size_of, size, {})

    @classmethod
    @screen.one_sentence
    def execute(cls, batch_size, size=FIRST, model=None, **others) -> io.NodeOutput:
        custom, requested = size_of(size, others)
        scaled = model is not None and not custom
        width, height = (
            sizes.scaled(*requested, adapter.native_size_px(model)) if scaled else sizes.round_size(*requested)
        )
        if custom and (width, height) != requested:
            screen.warn(cls.hidden.unique_id, f"{label(*requested)} rounded to {label(width, height)}")
        else:
            fitted = ", the model's own size" if (width, height) != requested else ""
            screen.say(cls.hidden.unique_id, f"{label(width, height)} pixels{fitted}")
        shape = (batch_size, LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE)
        samples = torch.zeros(shape, device=mm.intermediate_device())
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": DOWNSCALE})
