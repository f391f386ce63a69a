"""Empty SANA Latent: an image size -> LATENT."""

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..sprint_core.images import sizes
from ..sprint_core.latent import DOWNSCALE, LATENT_CHANNELS
from .adapters import model as adapter
from .adapters import screen

CUSTOM = "custom"


def label(width: int, height: int) -> str:
    return f"{width} x {height}"


SIZES = {label(*size): size for size in sizes.BINS}


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        side = {"min": sizes.MIN_PX, "max": sizes.MAX_PX, "step": DOWNSCALE}
        return io.Schema(
            node_id="SanaSprintEmptyLatent",
            display_name="Empty SANA Latent",
            category="SANA-Sprint/latent",
            description="The start of text-to-image. Offers the sizes SANA was trained on.",
            search_aliases=["empty latent", "sana size", "aspect ratio", "resolution"],
            inputs=[
                io.Combo.Input(
                    "size",
                    options=[CUSTOM, *SIZES],
                    default=label(1024, 1024),
                    tooltip="Width x height of the aspect ratios SANA was trained on, or custom for the two numbers "
                    "below.",
                ),
                io.Int.Input("width", default=1024, **side, tooltip="Used when size is custom; a multiple of 32."),
                io.Int.Input("height", default=1024, **side, tooltip="Used when size is custom; a multiple of 32."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Images in one go."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Scales the listed sizes to the model's own, for those not trained at 1024 px (2K, 4K).",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="For the latent input of any sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @screen.one_sentence
    def execute(cls, size, width, height, batch_size, model=None) -> io.NodeOutput:
        requested = (width, height) if size == CUSTOM else SIZES[size]
        if model is not None and size != CUSTOM:
            requested = sizes.scaled(*requested, adapter.native_size_px(model))
        width, height = sizes.round_size(*requested)
        if (width, height) != requested:
            screen.warn(cls.hidden.unique_id, f"{label(*requested)} rounded to {label(width, height)}")
        shape = (batch_size, LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE)
        samples = torch.zeros(shape, device=mm.intermediate_device())
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": DOWNSCALE})
