"""SANA-Sprint Text Encode: a prompt with the authors' instruction -> CONDITIONING."""

from comfy_api.latest import io

from .adapters import choices, lines, screen
from .adapters import clip as adapter

INSTRUCTIONS = ("model default", "off", "custom")


def instruction_of(instruction: dict | str, others: dict) -> tuple[str, str]:
    """(choice, custom instruction) of these inputs; others: the node's further ones. Raises ValueError."""
    choice, own = choices.chosen("instruction", instruction, INSTRUCTIONS, others)
    return choice, str(own.get("custom_instruction", ""))


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        own = io.String.Input(
            "custom_instruction",
            multiline=True,
            default="",
            optional=True,
            tooltip="Your own instruction; the prompt is appended to it as it stands.",
        )
        return io.Schema(
            node_id="SanaSprintTextEncode",
            display_name="SANA-Sprint Text Encode",
            category="SANA-Sprint/conditioning",
            description="Encodes a prompt as SANA was trained to read it. CLIP Text Encode does the same with the "
            "defaults; this node lets you change the instruction in front of the prompt.",
            search_aliases=["sana prompt", "complex human instruction", "chi", "gemma prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="From Load SANA-Sprint or Load SANA Text Encoder."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. (word:1.2) gives a word more weight, (word:0.8) less.",
                ),
                io.DynamicCombo.Input(
                    "instruction",
                    options=[io.DynamicCombo.Option(name, [own] if name == "custom" else []) for name in INSTRUCTIONS],
                    tooltip="The text that the model was trained to see before each prompt. It is encoded once and "
                    "then costs nothing. custom: a text of your own.",
                ),
                io.Combo.Input(
                    "prompt_format",
                    options=list(adapter.FORMATS),
                    default="authors",
                    advanced=True,
                    tooltip="authors: as in training. diffusers: lower case, and single quotes in the instruction.",
                ),
                io.Boolean.Input(
                    "one_prompt_per_line",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Each line of the text is a prompt of its own: line 1 for the first image of the batch, "
                    "line 2 for the second. If there are more images than lines, it begins again with line 1. Empty "
                    "lines are left out. Set batch_size of Empty SANA Latent to the number of lines.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the positive input of any sampler or guider.")],
            accept_all_inputs=True,
        )

    @classmethod
    def validate_inputs(cls, text=None, instruction=None):
        fault = screen.fault_of(adapter.check_prompt, text)
        return fault if fault is not True else screen.fault_of(instruction_of, instruction, {})

    @classmethod
    @screen.one_sentence
    def execute(
        cls, clip, text, prompt_format, instruction=INSTRUCTIONS[0], one_prompt_per_line=False, **others
    ) -> io.NodeOutput:
        screen.require(clip=clip)
        preset = adapter.preset_of(clip, *instruction_of(instruction, others), prompt_format)
        if one_prompt_per_line:
            return io.NodeOutput(lines.encode_lines(clip, text, preset))
        tokens = clip.tokenize(text, sana_preset=preset)
        return io.NodeOutput(clip.encode_from_tokens_scheduled(tokens))
