"""ControlNet nodes: an image's edges, and applying a SANA ControlNet to a prompt."""

from pathlib import Path

from comfy_api.latest import io

from ..sprint_core.images import edges
from ..sprint_core.models.controlnet import MAX_STRENGTH, check_strength_and_range
from ..sprint_core.weights.finite import is_finite
from .adapters import annotators, folders, screen
from .adapters import control as adapter

CATEGORY = "SANA-Sprint/conditioning"
SOFT = "soft"
METHODS = ("auto", annotators.HED, SOFT)


class ControlNetApply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        share = {"min": 0.0, "max": 1.0, "step": 0.001}
        return io.Schema(
            node_id="SanaSprintControlNetApply",
            display_name="SANA-Sprint ControlNet Apply",
            category=CATEGORY,
            description="Steers an image by edges or by a drawing. Apply ControlNet does the same with the same "
            "CONTROL_NET; this one needs no negative prompt.",
            search_aliases=["sana controlnet", "apply controlnet", "scribble", "hed", "sketch to image"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The encoded prompt."),
                io.ControlNet.Input("control_net", tooltip="From Load SANA ControlNet."),
                io.Image.Input(
                    "image",
                    tooltip="White edges or lines on black: from Soft Edges, or drawn. Cropped to the "
                    "proportions of the result and resized; one, or one for each image of the batch.",
                ),
                io.Vae.Input("vae", tooltip="SANA's VAE: the ControlNet reads the image as a latent."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=MAX_STRENGTH,
                    step=0.01,
                    tooltip="Control strength. 0 turns it off.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    **share,
                    tooltip="Share of sampling after which it starts to act: 0 at pure noise, 1 at the image.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    **share,
                    tooltip="Share of sampling after which it stops. By the paper's schedule and at denoise 1, 2 steps "
                    "lie at 0 and 0.17, 4 at 0, 0.17, 0.3 and 0.62: an end of 0.1 steers the first step alone. With "
                    "less denoise the first step lies later.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Only for the multi-step models, which have a negative prompt.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="For the sampler."),
                io.Conditioning.Output("negative", tooltip="The negative with control; the positive if none came."),
            ],
        )

    @classmethod
    def validate_inputs(cls, strength=None, start_percent=None, end_percent=None):
        return screen.fault_of(check_strength_and_range, strength, start_percent, end_percent)

    @classmethod
    @screen.one_sentence
    def execute(
        cls, positive, control_net, image, vae, strength, start_percent, end_percent, negative=None
    ) -> io.NodeOutput:
        screen.require(positive=positive, control_net=control_net, image=image)
        if not isinstance(control_net, adapter.SanaControl):
            raise ValueError("this CONTROL_NET is not of SANA; connect Load SANA ControlNet, or use Apply ControlNet")
        if strength == 0.0:
            return io.NodeOutput(positive, positive if negative is None else negative)
        applied = adapter.apply(positive, negative, control_net, image, vae, strength, start_percent, end_percent)
        return io.NodeOutput(*applied)


def hed_of(method: str) -> Path | None:
    """HED's weights for a method; None for soft edges. Raises ValueError where they are asked for and not there."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    path = None if method == SOFT else annotators.hed_file()
    if path is None and method == annotators.HED:
        raise ValueError(f"no {annotators.NAMES[0]} in models/{annotators.FOLDER}; put it there, or choose auto")
    return path


class SoftEdges(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaSprintSoftEdges",
            display_name="Soft Edges",
            category="SANA-Sprint/image",
            description="The edges of an image, white on black, as SANA's ControlNets read them. Works at once; with "
            "ControlNetHED.pth in models/annotators it uses HED, which the published ControlNets were trained with.",
            search_aliases=["hed", "softedge", "edge detection", "scribble", "controlnet preprocessor", "annotator"],
            inputs=[
                io.Image.Input("image", tooltip="Any image."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="auto: HED if its weights are there, else soft edges from the image's gradients. The "
                    "node says which one ran.",
                ),
                io.Boolean.Input(
                    "scribble",
                    default=False,
                    tooltip="Even lines along the edges, as drawn by hand. The published ControlNets saw these.",
                ),
                io.Int.Input(
                    "resolution",
                    default=edges.RESOLUTION,
                    min=64,
                    max=4096,
                    step=64,
                    tooltip="Shorter side in pixels at which edges are looked for; larger finds finer ones.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="For SANA-Sprint ControlNet Apply; as large as the image.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, method, **kwargs):
        path = None if method == SOFT else annotators.hed_file()
        return None if path is None else folders.stamp_of([path])

    @classmethod
    def validate_inputs(cls, method=None):
        return screen.fault_of(hed_of, method)

    @classmethod
    @screen.one_sentence
    def execute(cls, image, method, scribble, resolution) -> io.NodeOutput:
        screen.require(image=image)
        if image.ndim != 4 or image.shape[-1] != 3 or 0 in image.shape:
            raise ValueError(
                f"this image has shape {list(image.shape)}; Soft Edges needs the 3 channels of an image without "
                "alpha; use Split Image with Alpha"
            )
        if not is_finite(image):
            raise ValueError("the image for Soft Edges holds NaN or infinity; check the node that made it")
        path = hed_of(method)
        drawn = annotators.detect(image, path, scribble, resolution)
        screen.say(cls.hidden.unique_id, f"edges: {annotators.HED if path else annotators.SOFT}")
        return io.NodeOutput(drawn)
