"""Loader nodes: a file or folder of any published layout -> MODEL, CLIP, VAE."""

import math

from comfy_api.latest import io

from ..sprint_core.weights.presets import BUNDLED_CONTROL_NAME
from ..sprint_core.weights.quantise import FORMATS
from .adapters import clip, control, folders, lora, model, options, screen, sources, vae

CATEGORY = "SANA-Sprint/loaders"
DTYPE_TIP = (
    "Precision of the weights. auto: ComfyUI chooses for your device, as for its own models. "
    "bf16 halves the memory of fp32."
)
EIGHT_BITS_TIP = (
    f"{DTYPE_TIP} fp8_e4m3fn and int8 round the weights of linear layers to 8 bits while loading, for about half of "
    "bf16's memory and a small error. A file that is in 8 bits already stays so."
)
MODEL_FOLDERS = ("diffusion_models", "checkpoints")
TEXT_FOLDERS = ("text_encoders", "checkpoints")
VAE_FOLDERS = ("vae", "checkpoints", "vae_approx")
CONTROL_FOLDERS = ("controlnet",)


def dtype_input(*names: str, tip: str = DTYPE_TIP) -> io.Combo.Input:
    return io.Combo.Input("dtype", options=["auto", *names], default="auto", advanced=True, tooltip=tip)


def average_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "average",
        default=False,
        advanced=True,
        optional=True,
        tooltip="Of a training checkpoint, load the EMA weights, the moving average (state_dict_ema), not the "
        "weights themselves (state_dict), which the authors' pipelines read. The log says which were read.",
    )


class LoadSprint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaSprintLoader",
            display_name="Load SANA-Sprint",
            category=CATEGORY,
            description="Loads a whole SANA model: transformer, text encoder and VAE from one choice.",
            search_aliases=["sana", "sana sprint", "load checkpoint", "sana loader"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=folders.choices("checkpoints"),
                    tooltip="A diffusers pipeline in models/diffusers, or a file in models/checkpoints that holds all "
                    "parts. The first entry comes with this pack: a tiny model of emoji, 256x256, that needs "
                    "no download.",
                ),
                dtype_input("bf16", "fp32"),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer, for any sampler."),
                io.Clip.Output(tooltip="Gemma-2 with SANA's prompt format, for any text encode node."),
                io.Vae.Output(tooltip="DC-AE, 32 pixels to a latent cell."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, dtype):
        return folders.stamp(model, "checkpoints"), dtype

    @classmethod
    @screen.one_sentence
    def execute(cls, **kwargs) -> io.NodeOutput:
        source = sources.opened(folders.find(kwargs["model"], "checkpoints"))  # a file with all parts is opened once
        chosen = options.parse(dtype=kwargs["dtype"])
        return io.NodeOutput(
            model.load_model(source, chosen), clip.load_clip(source, chosen), vae.load_vae(source, chosen)
        )


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaSprintModelLoader",
            display_name="Load SANA Model",
            category=CATEGORY,
            description="Loads a SANA transformer: Sprint, its teachers, SANA 1.0 and 1.5, in any published layout.",
            search_aliases=["sana unet", "sana diffusion model", "sana transformer"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=folders.choices(*MODEL_FOLDERS),
                    tooltip="From models/diffusion_models, models/checkpoints or models/diffusers: the authors' .pth, "
                    "safetensors, or a diffusers folder. What it is, is read off the file.",
                ),
                dtype_input("bf16", "fp16", "fp32", *FORMATS, tip=EIGHT_BITS_TIP),
                io.Combo.Input(
                    "time_scale",
                    options=list(options.TIME_SCALES),
                    default="auto",
                    advanced=True,
                    tooltip="Timestep scale that the model was trained with. Only a single file of SANA 1.5 "
                    "(0..1000) and of the Sprint 1.6B teacher (0..1) cannot be told apart: auto assumes 0..1000 there "
                    "and says so in the log.",
                ),
                average_input(),
            ],
            outputs=[io.Model.Output(tooltip="The transformer, for any sampler.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model, dtype, time_scale, average=False):
        return folders.stamp(model, *MODEL_FOLDERS), dtype, time_scale, average

    @classmethod
    @screen.one_sentence
    def execute(cls, **kwargs) -> io.NodeOutput:
        path = folders.find(kwargs.pop("model"), *MODEL_FOLDERS)
        return io.NodeOutput(model.load_model(path, options.parse(**kwargs, eight_bits=True)))


class LoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaSprintTextEncoderLoader",
            display_name="Load SANA Text Encoder (Gemma-2)",
            category=CATEGORY,
            description="Loads Gemma-2-2B-IT with SANA's instruction and token selection.",
            search_aliases=["gemma", "gemma 2", "sana clip", "sana text encoder"],
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=folders.choices(*TEXT_FOLDERS),
                    tooltip="From models/text_encoders, models/checkpoints or models/diffusers: a Hugging Face folder "
                    "with its tokenizer, or ComfyUI's single file of gemma-2-2b-it.",
                ),
                dtype_input("bf16", "fp32", *FORMATS, tip=EIGHT_BITS_TIP),
                io.Combo.Input(
                    "device",
                    options=list(options.DEVICES),
                    default="auto",
                    advanced=True,
                    optional=True,
                    tooltip="cpu: stays in the computer's memory and encodes there, which takes seconds for a new "
                    "prompt and no graphics memory. auto: ComfyUI moves it to your device and back.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="For SANA-Sprint Text Encode or CLIP Text Encode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder, dtype, device="auto"):
        return folders.stamp(text_encoder, *TEXT_FOLDERS), dtype, device

    @classmethod
    @screen.one_sentence
    def execute(cls, text_encoder, dtype, device="auto") -> io.NodeOutput:
        path = folders.find(text_encoder, *TEXT_FOLDERS)
        return io.NodeOutput(clip.load_clip(path, options.parse(dtype=dtype, device=device, eight_bits=True)))


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaSprintVAELoader",
            display_name="Load SANA VAE",
            category=CATEGORY,
            description="Loads a DC-AE f32c32: sana 1.0 and 1.1, the faster lite and turbo decoders; or a TAESANA.",
            search_aliases=["dc-ae", "dcae", "sana vae", "deep compression autoencoder", "taesana"],
            inputs=[
                io.Combo.Input(
                    "vae",
                    options=folders.choices(*VAE_FOLDERS),
                    tooltip="From models/vae, models/checkpoints or models/diffusers, in its authors' or in diffusers' "
                    "layout. A TAESANA, for drafts, also from models/vae_approx: taesana_decoder, with taesana_encoder "
                    "beside it if images are to be encoded, too.",
                ),
                dtype_input("bf16", "fp32"),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    advanced=True,
                    optional=True,
                    tooltip="Compile it with torch.compile, for a GPU with Triton: the first image of a size takes "
                    "a minute or so longer. On a CPU it was slower.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="For VAE Decode, VAE Encode and their tiled versions.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae, dtype, compile=False):
        return folders.stamp(vae, *VAE_FOLDERS), dtype, compile

    @classmethod
    @screen.one_sentence
    def execute(cls, **kwargs) -> io.NodeOutput:
        path = folders.find(kwargs["vae"], *VAE_FOLDERS)
        chosen = options.parse(dtype=kwargs["dtype"], compile=kwargs.get("compile", False))
        return io.NodeOutput(vae.load_vae(path, chosen))


class LoadControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaSprintControlNetLoader",
            display_name="Load SANA ControlNet",
            category=CATEGORY,
            description="Loads a SANA ControlNet: the authors' .pth, diffusers' folders, and those trained here.",
            search_aliases=["sana controlnet", "load controlnet", "hed", "scribble"],
            inputs=[
                io.Combo.Input(
                    "control_net",
                    options=folders.choices(*CONTROL_FOLDERS, bundled=BUNDLED_CONTROL_NAME),
                    tooltip="From models/controlnet or models/diffusers. The first entry belongs to the tiny model "
                    "that comes with this pack. Its size must be the model's: 0.6B or 1.6B.",
                ),
                dtype_input("bf16", "fp32"),
                io.Combo.Input(
                    "time_scale",
                    options=list(options.TIME_SCALES),
                    default="auto",
                    advanced=True,
                    tooltip="Timestep scale that it was trained with. auto: 0..1000 for those of SANA 1.0, the "
                    "published ones, and 0..1 for those of a Sprint.",
                ),
                io.Combo.Input(
                    "wiring",
                    options=list(options.WIRINGS),
                    default="auto",
                    advanced=True,
                    tooltip="authors: from the output of the trunk's first block, as it was trained; their .pth has "
                    "what that takes. diffusers: from its own embedding, one block later. auto: authors where it can.",
                ),
                average_input(),
            ],
            outputs=[io.ControlNet.Output(tooltip="For SANA-Sprint ControlNet Apply or Apply ControlNet.")],
        )

    @classmethod
    def fingerprint_inputs(cls, control_net, dtype, time_scale, wiring, average=False):
        return folders.stamp(control_net, *CONTROL_FOLDERS), dtype, time_scale, wiring, average

    @classmethod
    @screen.one_sentence
    def execute(cls, control_net, dtype, time_scale, wiring, average=False) -> io.NodeOutput:
        path = folders.find(control_net, *CONTROL_FOLDERS)
        return io.NodeOutput(control.load_control(path, options.parse(dtype, time_scale, wiring, average=average)))


class LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        return io.Schema(
            node_id="SanaSprintLoraLoader",
            display_name="Load SANA LoRA",
            category=CATEGORY,
            description="Applies a LoRA in any naming: diffusers and PEFT, kohya, OneTrainer, LyCORIS, and the "
            "authors' with fused layers. Says what it matched, and fails if nothing did.",
            search_aliases=["sana lora", "load lora", "lora loader", "dora", "lycoris"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The SANA that the LoRA was trained on. One of SANA 1.5 or of a "
                    "teacher may or may not suit a Sprint.",
                ),
                io.Combo.Input("lora_name", options=lora.names(), tooltip="From models/loras."),
                io.Float.Input("strength_model", **strength, tooltip="LoRA strength for the model; may be negative."),
                io.Float.Input("strength_clip", **strength, tooltip="LoRA strength for the text encoder."),
                io.Clip.Input("clip", optional=True, tooltip="Only for a LoRA that changes the text encoder as well."),
            ],
            outputs=[
                io.Model.Output(tooltip="With the LoRA; load several one after the other."),
                io.Clip.Output(tooltip="With the LoRA, if a CLIP came in."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name, **kwargs):
        return lora_name, lora.stamp(lora_name)

    @classmethod
    @screen.one_sentence
    def execute(cls, model, lora_name, strength_model, strength_clip, clip=None) -> io.NodeOutput:
        screen.require(model=model)
        if not (math.isfinite(strength_model) and math.isfinite(strength_clip)):
            raise ValueError(f"the LoRA's strengths are {strength_model:g} and {strength_clip:g}; enter numbers")
        if strength_model == 0.0 and (clip is None or strength_clip == 0.0):
            return io.NodeOutput(model, clip)
        model, clip, summary = lora.apply(model, clip, lora_name, strength_model, strength_clip)
        screen.say(cls.hidden.unique_id, summary)
        return io.NodeOutput(model, clip)
