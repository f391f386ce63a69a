"""TrigFlow's schedule and sampler as SIGMAS and SAMPLER, and both in one node."""

import torch
from comfy_api.latest import io

from ..sprint_core import trigflow
from ..sprint_core.weights import presets
from .adapters import sampling as adapter
from .adapters import screen

CATEGORY = "SANA-Sprint/sampling"
SCHEDULES = ("paper", "app", "custom")
MAX_SEED = 2**64 - 1


def schedule_inputs() -> list:
    """The inputs that TrigFlow Schedule and SANA-Sprint Sampler share."""
    return [
        io.Int.Input(
            "steps",
            default=2,
            min=1,
            max=trigflow.APP_MAX_STEPS,
            tooltip="1 to 4: what SANA-Sprint was trained for. One network serves them all; 2 is its best value for "
            "money. More than 4 needs the schedule 'app' and does not improve the image.",
        ),
        io.Combo.Input(
            "schedule",
            options=list(SCHEDULES),
            default="paper",
            tooltip="paper: the angles found best in the paper (1 to 4 steps; 3 is ours). app: the authors' demo, "
            "evenly spaced but for 2 steps. custom: the angles below.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="1 for text-to-image. Below 1, for image-to-image: every angle is multiplied by it, so that "
            "less of the image is repainted.",
        ),
        io.String.Input(
            "angles",
            default="1.5708, 1.3",
            tooltip="Used when schedule is custom: TrigFlow angles, falling, in (0, pi/2]; pi/2 = 1.5708 is pure "
            "noise. As many steps as angles.",
        ),
    ]


def schedule_of(steps: int, schedule: str, denoise: float, angles: str) -> str | tuple[float, ...]:
    """The name or the angles that trigflow takes for these inputs. Raises ValueError if it would refuse them."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    name = trigflow.parse_angles(angles) if schedule == "custom" else schedule
    trigflow.schedule(name, steps, denoise)
    return name


def sigmas_of(node_id: str | None, steps: int, schedule: str, denoise: float, angles: str) -> torch.Tensor:
    """SIGMAS of the node's inputs, with the angles shown on the node. Raises ValueError."""
    name = schedule_of(steps, schedule, denoise, angles)
    shown = trigflow.schedule(name, steps, denoise)[:-1]
    screen.say(node_id, "angles used: " + ", ".join(f"{t:.4g}" for t in shown))
    return torch.tensor(trigflow.sigmas(name, steps, denoise))


class Schedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaSprintSchedule",
            display_name="TrigFlow Schedule",
            category=CATEGORY,
            description="SANA-Sprint's published schedules as SIGMAS, for SamplerCustom and SamplerCustomAdvanced.",
            search_aliases=["sana scheduler", "scm", "trigflow", "sigmas"],
            inputs=schedule_inputs(),
            outputs=[io.Sigmas.Output(tooltip="Flow times, falling from at most 1 to 0.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, steps=None, schedule=None, denoise=None, angles=None):
        return screen.fault_of(schedule_of, steps, schedule, denoise, angles)

    @classmethod
    @screen.one_sentence
    def execute(cls, steps, schedule, denoise, angles) -> io.NodeOutput:
        return io.NodeOutput(sigmas_of(cls.hidden.unique_id, steps, schedule, denoise, angles))


class TrigFlowSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaSprintTrigFlowSampler",
            display_name="TrigFlow Sampler",
            category=CATEGORY,
            description="SANA-Sprint's multistep consistency sampler. Like lcm, but its noise comes from the CPU: the "
            "same seed gives the same image on every device.",
            search_aliases=["scm sampler", "sana sampler", "consistency sampler", "lcm"],
            inputs=[],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    @screen.one_sentence
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(adapter.sampler())


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaSprintSampler",
            display_name="SANA-Sprint Sampler",
            category=CATEGORY,
            description="Samples SANA-Sprint in 1 to 4 steps: schedule, sampler, guidance and seed in one node. "
            "Image i of a batch is the image that seed + i gives alone.",
            search_aliases=["sana ksampler", "sana sprint", "sprint sampler"],
            inputs=[
                io.Model.Input("model", tooltip="A SANA-Sprint, from Load SANA-Sprint or Load SANA Model."),
                io.Conditioning.Input(
                    "positive", tooltip="The encoded prompt. There is no negative: guidance is built in."
                ),
                io.Latent.Input("latent_image", tooltip="Empty SANA Latent, or an encoded image with denoise below 1."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The same seed gives the same image, on every device.",
                ),
                io.Float.Input(
                    "guidance",
                    default=presets.GUIDANCE,
                    min=0.1,
                    max=30.0,
                    step=0.1,
                    tooltip="How strongly to follow the prompt; trained for 4 to 5. It costs no extra pass.",
                ),
                *schedule_inputs(),
            ],
            outputs=[io.Latent.Output(tooltip="For VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, steps=None, schedule=None, denoise=None, angles=None):
        return screen.fault_of(schedule_of, steps, schedule, denoise, angles)

    @classmethod
    @screen.one_sentence
    def execute(cls, model, positive, latent_image, seed, guidance, steps, schedule, denoise, angles) -> io.NodeOutput:
        screen.require(model=model, positive=positive, latent_image=latent_image)
        sigmas = sigmas_of(cls.hidden.unique_id, steps, schedule, denoise, angles)
        return io.NodeOutput(adapter.sample(model, positive, latent_image, sigmas, seed, guidance))
