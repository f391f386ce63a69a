"""SANA-Sprint Text Encode: a prompt with the authors' instruction -> CONDITIONING."""

from comfy_api.latest import io

from .adapters import clip as adapter
from .adapters import lines, screen

INSTRUCTIONS = ("model default", "off", "custom")


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
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
                    tooltip="What to paint. (word:1.2) gives a word more weight, (word:0.8) less.",
                ),
                io.Combo.Input(
                    "instruction",
                    options=list(INSTRUCTIONS),
                    default=INSTRUCTIONS[0],
                    tooltip="The text that the model was trained to see before each prompt. It is encoded once and "
                    "then costs nothing.",
                ),
                io.Combo.Input(
                    "prompt_format",
                    options=list(adapter.FORMATS),
                    default="authors",
                    tooltip="authors: as in training. diffusers: lower case, and single quotes in the instruction.",
                ),
                io.String.Input(
                    "custom_instruction",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Used when instruction is 'custom'; the prompt is appended to it as it stands.",
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
        )

    @classmethod
    def validate_inputs(cls, text=None):
        return screen.fault_of(adapter.check_prompt, text)

    @classmethod
    @screen.one_sentence
    def execute(
        cls, clip, text, instruction, prompt_format, custom_instruction="", one_prompt_per_line=False
    ) -> io.NodeOutput:
        screen.require(clip=clip)
        preset = adapter.preset_of(clip, instruction, prompt_format, custom_instruction)
        if one_prompt_per_line:
            return io.NodeOutput(lines.encode_lines(clip, text, preset))
        tokens = clip.tokenize(text, sana_preset=preset)
        return io.NodeOutput(clip.encode_from_tokens_scheduled(tokens))
