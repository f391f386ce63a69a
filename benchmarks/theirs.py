"""The same parts by diffusers and transformers, on the very same weights, as SanaSprintPipeline calls them.

Captions are padded to 300 tokens and masked, as the pipeline has them. Nothing of this is needed to make images.
"""

import functools
import inspect

import torch
from torch import Tensor, nn

from benchmarks.networks import SHORT, Ours, Parts, Words, prompt_of
from sprint_core.latent import SCALE
from sprint_core.models.controlnet import PUBLISHED_BLOCKS
from sprint_core.sampler import initial_noise
from sprint_core.weights import keymaps, layouts
from sprint_core.weights.layouts.autoencoder import config_to_diffusers

CAPTION_TOKENS = 300  # that the pipeline pads to


def accepted(config: dict, cls: type) -> dict:
    """Of a configuration file what the class takes."""
    return {k: v for k, v in config.items() if k in inspect.signature(cls.__init__).parameters}


def _with_weights(cls: type, config: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """The class on tensors of ours, none of them copied."""
    with torch.device("meta"):
        model = cls(**accepted(config, cls))
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def sana_sprint(**parts):
    """Their pipeline, silent."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    tokenizer = Words(parts["text_encoder"].config.vocab_size)
    pipeline = SanaSprintPipeline(tokenizer=tokenizer, scheduler=SCMScheduler(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def instruction() -> list[str]:
    """What their pipeline puts in front of a prompt; its method for prompts alone would leave it out."""
    from diffusers import SanaSprintPipeline

    return inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default


def version() -> str:
    """Of diffusers. Raises ValueError where it is missing."""
    try:
        import diffusers
    except ImportError:
        raise ValueError("--against diffusers: install it first, with pip install diffusers") from None
    return diffusers.__version__


class Theirs(Parts):
    """Their side of what `Ours` has, by the same names. Raises ValueError where diffusers is missing."""

    def __init__(self, ours: Ours):
        version()
        if ours.preset is None:
            raise ValueError("--against diffusers: its pipeline cannot run the bundled model; choose --model 0.6B")
        self.ours = ours

    @functools.cached_property
    def transformer(self) -> nn.Module:
        from diffusers import SanaTransformer2DModel

        config = self.ours.preset.transformer
        tensors = layouts.TRANSFORMER.to_diffusers(self.ours.transformer.state_dict(), config)
        return _with_weights(SanaTransformer2DModel, layouts.transformer.config_to_diffusers(config), tensors)

    @functools.cached_property
    def net(self) -> nn.Module:
        """Untrained, too. It knows no guidance, and starts from its own embedder instead of the trunk's first block."""
        from diffusers import SanaControlNetModel

        described = layouts.transformer.config_to_diffusers(self.ours.preset.transformer) | {
            "num_layers": PUBLISHED_BLOCKS
        }
        with torch.device("meta"):
            net = SanaControlNetModel(**accepted(described, SanaControlNetModel))
        net = net.to_empty(device=self.ours.device).to(self.ours.dtype)
        trunk = self.transformer.state_dict()
        for name, tensor in net.state_dict().items():
            tensor.copy_(trunk[name]) if name.startswith("transformer_blocks.") else tensor.zero_()
        return net.eval().requires_grad_(False)

    @functools.cached_property
    def autoencoder(self) -> nn.Module:
        from diffusers import AutoencoderDC

        net = self.ours.autoencoder
        return _with_weights(AutoencoderDC, config_to_diffusers(net.config), net.state_dict())

    @functools.cached_property
    def text_encoder(self) -> nn.Module:
        from transformers import Gemma2Config, Gemma2Model

        ours = self.ours.text_encoder.gemma
        config = layouts.text_encoder.config_to_hf(ours.config)
        with torch.device("meta"):
            model = Gemma2Model(Gemma2Config(**config))
        tensors = keymaps.from_native(ours.state_dict(), layouts.text_encoder.GEMMA_BARE)
        tensors = {name: tensor.to(self.ours.dtype) for name, tensor in tensors.items()}
        model.load_state_dict(tensors, strict=True, assign=True)
        least = Gemma2Model(Gemma2Config(**{**config, "num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 1}))
        for name, buffer in least.named_buffers():  # angles and scales, which are in no file
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, buffer.to(self.ours.device))
        return model.eval().requires_grad_(False)

    @functools.cached_property
    def pipeline(self):
        return sana_sprint(text_encoder=self.text_encoder, transformer=self.transformer, vae=self.autoencoder)

    @functools.cached_property
    def text_pipeline(self):
        return sana_sprint(text_encoder=self.text_encoder, transformer=None, vae=None)

    def _caption(self, seed: int) -> tuple[Tensor, Tensor]:
        """Ours, padded."""
        caption = self.ours.inputs(seed)["caption"]
        mask = caption.new_zeros(1, CAPTION_TOKENS)
        mask[:, : caption.shape[1]] = 1
        return nn.functional.pad(caption, (0, 0, 0, CAPTION_TOKENS - caption.shape[1])), mask

    def _text(self, tokens: int, seed: int) -> Tensor:
        rows, mask = self.text_pipeline.encode_prompt(
            prompt_of(tokens, seed), device=self.ours.device, complex_human_instruction=instruction()
        )
        return rows[0, mask[0].bool()]

    def step(self, seed: int, control: tuple[Tensor, ...] | None = None) -> Tensor:
        inputs = self.ours.inputs(seed)
        caption, mask = self._caption(seed)
        return self.transformer(
            inputs["x_s"],
            encoder_hidden_states=caption,
            encoder_attention_mask=mask,
            guidance=inputs["guidance"] * self.transformer.config.guidance_embeds_scale,
            timestep=inputs["s"],
            controlnet_block_samples=control,
            return_dict=False,
        )[0]

    def control(self, seed: int) -> Tensor:
        return self._controlled(seed, self.ours.kept_hint)

    def _controlled(self, seed: int, hint: Tensor) -> Tensor:
        inputs = self.ours.inputs(seed)
        caption, mask = self._caption(seed)
        call = {"encoder_attention_mask": mask, "return_dict": False}
        (residuals,) = self.net(inputs["x_s"], caption, inputs["s"], hint, **call)
        return self.step(seed, residuals)

    def encode(self, seed: int) -> Tensor:
        return self.autoencoder.encode(self.ours.image(seed), return_dict=False)[0]

    def decode(self, seed: int) -> Tensor:
        return self.autoencoder.decode(self.ours.latent(seed) / SCALE, return_dict=False)[0]

    def images(self, seed: int, count: int) -> Tensor:
        """[b, h, w, 3] in [0, 1], from the noise that ours start from."""
        side = self.ours.size_px
        noise = torch.cat([self._noise(seed + i) for i in range(count)])
        images = self.pipeline(
            prompt_of(SHORT, seed),
            num_inference_steps=1,
            intermediate_timesteps=None,
            num_images_per_prompt=count,
            height=side,
            width=side,
            latents=noise,
            use_resolution_binning=False,
            output_type="pt",
        ).images
        return images.float().movedim(1, -1)

    def _noise(self, seed: int) -> Tensor:
        return initial_noise([seed], tuple(self.ours.latent(0).shape[1:])).to(self.ours.device)
