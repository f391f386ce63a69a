"""SANA-Sprint Negative (NAG): what to avoid, for models without classifier-free guidance."""

from comfy_api.latest import io

from ..sprint_core.models.nag import MAX_SCALE, MAX_TAU, NAG
from .adapters import negative as adapter
from .adapters import screen

DEFAULT = NAG()


class Negative(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        share = {"min": 0.0, "max": 1.0, "step": 0.001}
        return io.Schema(
            node_id="SanaSprintNegative",
            display_name="SANA-Sprint Negative (NAG)",
            category="SANA-Sprint/conditioning",
            description="A negative prompt for SANA-Sprint in 1 to 4 steps, by normalized attention guidance. It costs "
            "one more cross-attention in each block rather than a second pass.",
            search_aliases=["negative prompt", "nag", "normalized attention guidance", "avoid", "naguidance"],
            inputs=[
                io.Model.Input("model", tooltip="A SANA-Sprint, before or after its LoRAs."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="The encoded prompt of what to avoid in all images, in the words of a prompt: 'a red "
                    "car' rather than 'no red car'.",
                ),
                io.Float.Input(
                    "scale",
                    default=DEFAULT.scale,
                    min=1.0,
                    max=MAX_SCALE,
                    step=0.1,
                    tooltip="How strongly to avoid it. 1 switches it off; 3 is the paper's value for SANA.",
                ),
                io.Float.Input(
                    "alpha",
                    default=DEFAULT.alpha,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How much of the guided attention goes on; the rest is the prompt's own. 0 switches it "
                    "off, and less is calmer.",
                ),
                io.Float.Input(
                    "tau",
                    default=DEFAULT.tau,
                    min=1.0,
                    max=MAX_TAU,
                    step=0.1,
                    advanced=True,
                    tooltip="How much larger the guided attention may become than the prompt's own.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=DEFAULT.start,
                    **share,
                    advanced=True,
                    tooltip="Share of sampling after which it starts to act: 0 at pure noise, 1 at the image.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=DEFAULT.end,
                    **share,
                    advanced=True,
                    tooltip="Share of sampling after which it stops. By the paper's schedule and at denoise 1, 2 steps "
                    "lie at 0 and 0.17, 4 at 0, 0.17, 0.3 and 0.62: an end of 0.1 steers the first step alone. With "
                    "less denoise the first step lies later.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="For the sampler. A second negative prompt replaces the first.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, scale=None, alpha=None, tau=None, start_percent=None, end_percent=None):
        return screen.fault_of(NAG, scale, alpha, tau, start_percent, end_percent)

    @classmethod
    @screen.one_sentence
    def execute(cls, model, negative, scale, alpha, tau, start_percent, end_percent) -> io.NodeOutput:
        screen.require(model=model, negative=negative)
        patched, unread = adapter.apply(model, negative, NAG(scale, alpha, tau, start_percent, end_percent))
        if unread:
            screen.warn(
                cls.hidden.unique_id, f"the negative's {', '.join(unread)} is not read: it acts everywhere, as set here"
            )
        return io.NodeOutput(patched)
