"""TrigFlow's schedule and sampler as SIGMAS and SAMPLER, and both in one node."""

import torch
from comfy_api.latest import io

from ..sprint_core import trigflow
from ..sprint_core.weights import presets
from .adapters import choices, screen
from .adapters import sampling as adapter

CATEGORY = "SANA-Sprint/sampling"
SCHEDULES = ("auto", "paper", "app", "custom")
RULES = {"paper": "by the paper", "app": "by the authors' app", "custom": "as entered"}
MAX_SEED = 2**64 - 1


def schedule_inputs() -> list:
    """The inputs that TrigFlow Schedule and SANA-Sprint Sampler share."""
    angles = io.String.Input(
        "angles",
        default="1.5708, 1.3",
        optional=True,
        tooltip="TrigFlow angles, decreasing, in (0, pi/2]; pi/2 = 1.5708 is pure noise. As many steps as angles.",
    )
    return [
        io.Int.Input(
            "steps",
            default=2,
            min=1,
            max=trigflow.APP_MAX_STEPS,
            tooltip="1 to 4: what SANA-Sprint was trained for. One network serves them all; 2 is the best trade-off "
            "of speed and quality. More than 4 do not improve the image. With the schedule custom there are as many as "
            "angles.",
        ),
        io.DynamicCombo.Input(
            "schedule",
            options=[io.DynamicCombo.Option(name, [angles] if name == "custom" else []) for name in SCHEDULES],
            tooltip="auto: paper for 1 to 4 steps, app for more. paper: the angles found best in the paper (1 to 4 "
            "steps; 3 is ours). app: the authors' demo, evenly spaced but for 2 steps. custom: angles of your own. "
            "The node says which were used.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="1 for text-to-image. Below 1, for image-to-image: every angle is multiplied by it, so that "
            "less of the image changes.",
        ),
    ]


def schedule_of(steps: int, denoise: float, schedule: dict | str, others: dict) -> tuple[str, str | tuple[float, ...]]:
    """(its rule, what trigflow takes for it) of these inputs; others: the node's further ones. Raises ValueError."""
    choice, own = choices.chosen("schedule", schedule, SCHEDULES, others)
    name = trigflow.parse_angles(str(own.get("angles", ""))) if choice == "custom" else choice
    trigflow.schedule(name, steps, denoise)
    return RULES[trigflow.rule_of(choice, steps)], name


def sigmas_of(node_id: str | None, steps: int, denoise: float, schedule: dict | str, others: dict) -> torch.Tensor:
    """SIGMAS of the node's inputs, with the steps and angles shown on the node. Raises ValueError."""
    rule, name = schedule_of(steps, denoise, schedule, others)
    angles = trigflow.schedule(name, steps, denoise)[:-1]
    shown = ", ".join(f"{t:.4g}" for t in angles)
    screen.say(node_id, f"{len(angles)} {'step' if len(angles) == 1 else 'steps'}, angles {rule}: {shown}")
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
            outputs=[io.Sigmas.Output(tooltip="Sigmas, which are flow-matching times: from at most 1 down to 0.")],
            hidden=[io.Hidden.unique_id],
            accept_all_inputs=True,
        )

    @classmethod
    def validate_inputs(cls, steps=None, denoise=None, schedule=None, **others):
        return screen.fault_of(schedule_of, steps, denoise, schedule, others)

    @classmethod
    @screen.one_sentence
    def execute(cls, steps, denoise, schedule=SCHEDULES[0], **others) -> io.NodeOutput:
        return io.NodeOutput(sigmas_of(cls.hidden.unique_id, steps, denoise, schedule, others))


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
                    "positive", tooltip="The encoded prompt. For a negative prompt take SANA-Sprint Negative (NAG)."
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
            accept_all_inputs=True,
        )

    @classmethod
    def validate_inputs(cls, steps=None, denoise=None, schedule=None, angles=None):
        # ComfyUI marks each input that this names, and tells what came with a dynamic combo only to who names them all.
        unknown = isinstance(schedule, dict) and None in schedule.values() and angles is None
        return unknown or screen.fault_of(schedule_of, steps, denoise, schedule, {"angles": angles})

    @classmethod
    @screen.one_sentence
    def execute(
        cls, model, positive, latent_image, seed, guidance, steps, denoise, schedule=SCHEDULES[0], **others
    ) -> io.NodeOutput:
        screen.require(model=model, positive=positive, latent_image=latent_image)
        sigmas = sigmas_of(cls.hidden.unique_id, steps, denoise, schedule, others)
        return io.NodeOutput(adapter.sample(model, positive, latent_image, sigmas, seed, guidance))
