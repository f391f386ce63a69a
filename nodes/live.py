"""SANA-Sprint Live Canvas: a drawing -> the image that it becomes, while it is drawn and afterwards."""

import dataclasses
import functools
import time

import torch
from comfy_api.latest import io
from PIL import Image

from ..sprint_core.images import drawing as drawings
from ..sprint_core.images import frames, sizes
from ..sprint_core.live import LiveSession
from ..sprint_core.weights import presets
from .adapters import folders, live_run, live_socket, screen, underlay
from .adapters import model as model_adapter
from .adapters.live_painter import ComfyPainter
from .adapters.live_socket import Run

LINES, PAINT, BOTH = MODES = ("lines", "paint", "both")
AUTO = "auto"
SIZES = sizes.choices()
EMPTY = "no lines are drawn: painted without the ControlNet, as at strength 0"
NO_CONTROL = "no CONTROL_NET is connected: the lines steer nothing; connect Load SANA ControlNet"


def inputs() -> list:
    """The node's widgets."""
    return [
        io.String.Input(
            "text", multiline=True, dynamic_prompts=True, tooltip="What to paint; (word:1.2) gives a word more weight."
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=frames.MAX_SEED,
            control_after_generate=True,
            tooltip="The same seed and drawing give the same image.",
        ),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            default=LINES,
            tooltip="lines: what is drawn steers the ControlNet. paint: the coloured sheet is repainted, as much as "
            "denoise says. both: at once.",
        ),
        io.Combo.Input(
            "size",
            options=[AUTO, *SIZES],
            default=AUTO,
            tooltip="Of the image. auto: the size that the model was trained at. The others are scaled to it, as Empty "
            "SANA Latent does.",
        ),
        io.Int.Input(
            "steps", default=1, min=1, max=frames.MAX_STEPS, tooltip="While drawing; 1 is the fastest. Live only."
        ),
        io.Int.Input(
            "final_steps",
            default=2,
            min=1,
            max=frames.MAX_STEPS,
            tooltip="When the pen is lifted, and for the image that leaves this node.",
        ),
        io.Float.Input(
            "guidance",
            default=presets.GUIDANCE,
            min=0.1,
            max=frames.MAX_GUIDANCE,
            step=0.1,
            tooltip="How strongly to follow the prompt; trained for 4 to 5. It costs no extra pass.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=frames.MAX_STRENGTH,
            step=0.05,
            tooltip="How strictly the ControlNet follows the lines. 0 switches it off, and so does an empty drawing.",
        ),
        io.Float.Input(
            "denoise",
            default=0.6,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="How much of the paint is repainted, in the modes paint and both: at 1 nothing of it stays.",
        ),
        io.Boolean.Input(
            "live",
            default=True,
            tooltip="On: a run goes on while you draw, until you stop it, queue something else, or draw nothing for a "
            "minute. Off, or without a page that listens: the drawing is painted once.",
        ),
        io.String.Input(
            "drawing",
            default="",
            socketless=True,
            extra_dict={"widgetType": "SANA_SPRINT_CANVAS"},
            tooltip="The strokes, which are saved with the graph.",
        ),
    ]


def size_of(size: str, model) -> tuple[int, int]:
    """(width, height) in pixels for a model. Raises ValueError."""
    if size not in (AUTO, *SIZES):
        raise ValueError(f"size is {size!r}, which it does not offer; choose one that the node lists")
    width, height = SIZES.get(size, (sizes.SIDE_PX, sizes.SIDE_PX))
    return sizes.scaled(width, height, model_adapter.native_size_px(model))


def frame_of(sheet: drawings.Drawing, mode: str, size: tuple[int, int], image, **settings) -> frames.Frame:
    """What a drawing asks for in a mode; settings: the further fields of a Frame. Raises ValueError."""
    lines = drawings.lines(sheet, *size).tobytes() if mode != PAINT else None
    paint = drawings.sheet(sheet, *size, underlay.below(sheet, image, size)).tobytes() if mode != LINES else None
    return frames.Frame(*size, lines=lines, paint=paint, **settings)


def pictured(frame: frames.Frame) -> torch.Tensor:
    """The drawing as IMAGE [b, h, w, 3]: the lines, the sheet, or a batch of both."""
    images = [frame.control_image()] if frame.lines is not None else []
    return torch.cat(images + ([frame.sheet()] if frame.paint is not None else []))


def redrawn(image, text: str, frame: frames.Frame) -> frames.Frame:
    """A page's frame with the pixels that its strokes have here, so that a run of the saved graph gives the same."""
    mode = BOTH if frame.lines is not None and frame.paint is not None else LINES if frame.paint is None else PAINT
    drawn = frame_of(drawings.parse(text), mode, frame.size, image)
    return dataclasses.replace(frame, lines=drawn.lines, paint=drawn.paint)


def jpeg_of(image, size: tuple[int, int]) -> bytes:
    """The node's image as its page shows it, below the paint; nothing without one."""
    below = underlay.below(drawings.Drawing(), image, size)
    return b"" if below is None else live_socket.jpeg(Image.fromarray(below))


def notice(frame: frames.Frame, canvas: LiveSession) -> str:
    """Why the lines of a frame do not steer; nothing where they do."""
    if frame.lines is None:
        return ""
    return NO_CONTROL if not canvas.painter.steers else EMPTY if frame.empty else ""


class LiveCanvas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaSprintLiveCanvas",
            display_name="SANA-Sprint Live Canvas",
            category="SANA-Sprint/image",
            description="Draw, and watch it painted: lines steer the ControlNet, colours are repainted. The "
            "graph keeps the strokes.",
            search_aliases=["live", "canvas", "draw", "sketch", "paint", "scribble", "realtime", "img2img"],
            inputs=[
                io.Model.Input("model", tooltip="A SANA-Sprint, before or after its LoRAs."),
                io.Clip.Input("clip", tooltip="From Load SANA-Sprint or Load SANA Text Encoder."),
                io.Vae.Input("vae", tooltip="SANA's VAE; a TAESANA is faster and less exact."),
                io.ControlNet.Input(
                    "control_net", optional=True, tooltip="From Load SANA ControlNet, for the modes lines and both."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The first image lies below the paint, unless another was put on the canvas.",
                ),
                *inputs(),
            ],
            outputs=[
                io.Image.Output("picture", tooltip="What was painted last."),
                io.Image.Output(
                    "drawing", tooltip="White lines on black, or the sheet of paint; with both, a batch of the two."
                ),
                io.Latent.Output(tooltip="The picture's, for a second sampler or a decoder of your choice."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, drawing=None, live=None, **others):
        if live and live_run.listens(live_run.client_of_run()):
            return time.monotonic_ns()  # somebody may draw on: never what an earlier run left
        return None if not isinstance(drawing, str) else folders.stamp_of(underlay.files_of(drawing))

    @classmethod
    def validate_inputs(cls, drawing=None):
        return screen.fault_of(drawings.parse, drawing)

    @classmethod
    @screen.one_sentence
    def execute(
        cls, model, clip, vae, mode, size, steps, final_steps, live, drawing, control_net=None, image=None, **settings
    ) -> io.NodeOutput:
        screen.require(model=model, clip=clip, vae=vae)
        canvas = LiveSession(ComfyPainter(model, clip, vae, control_net))
        area = size_of(size, model)
        frame = frame_of(drawings.parse(drawing), mode, area, image, steps=final_steps, **settings)
        session = live_run.session_of(cls.hidden.unique_id, live_run.LISTEN_SEC if live else 0.0)
        if live and session is not None:
            run = Run(dataclasses.replace(frame, steps=steps), final_steps, notice(frame, canvas), jpeg_of(image, area))
            frame = live_run.follow(
                session, canvas, run, functools.partial(redrawn, image), functools.partial(notice, canvas=canvas)
            )
        painted = canvas.paint(frame)
        if session is not None:
            session.answer(0, painted.image, painted.ms)
        if said := notice(frame, canvas):
            screen.say(cls.hidden.unique_id, said)
        return io.NodeOutput(painted.image, pictured(frame), {"samples": painted.latent})
