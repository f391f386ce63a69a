"""Nodes for comfyui.py: the core's way from a prompt to an image, on the networks that ComfyUI has loaded."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "sana-sprint"))  # copied beside the pack

import comfy.model_management as mm
import torch

from sprint_core import sampler, trigflow
from sprint_core.latent import DOWNSCALE, LATENT_CHANNELS, SCALE
from sprint_core.text.encoder import TextEncoder
from sprint_core.weights import presets

CATEGORY = "bench"
_encoders = {}  # by CLIP: what is kept of the instruction is kept here as there


class CoreTextToImage:
    """MODEL, CLIP and VAE are on the device already: a run through the ordinary nodes came before."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        sockets = {"model": ("MODEL",), "clip": ("CLIP",), "vae": ("VAE",)}
        return {
            "required": sockets | {"prompt": ("STRING", {}), "seed": ("INT", {}), "size_px": ("INT", {"max": 8192})}
        }

    @torch.inference_mode()
    def run(self, model, clip, vae, prompt, seed, size_px):
        net = model.model.diffusion_model
        device = mm.get_torch_device()
        dtype = model.model.get_dtype_inference()
        forward = type(net).__mro__[1].forward  # the core's, under ComfyUI's call
        if clip not in _encoders:
            prompts = clip.tokenizer
            gemma = clip.cond_stage_model.encoder.transformer
            _encoders[clip] = TextEncoder(gemma, prompts.tokenizer, prompts.preset)
        caption = _encoders[clip].encode([prompt])[0][None].to(device, dtype)
        shape = (LATENT_CHANNELS, size_px // DOWNSCALE, size_px // DOWNSCALE)
        x_s, one = sampler.initial_noise([seed], shape).to(device), torch.ones(1, device=device)

        def denoise(x, s):
            v = forward(net, x.to(dtype), s * one, caption, presets.GUIDANCE * one)
            return trigflow.flow_predict_x0(v.float(), x, s)

        sigmas = torch.tensor(trigflow.sigmas("paper", 1))
        x0 = sampler.sample(denoise, x_s, sigmas, sampler.StepNoise([seed], shape, device))
        image = vae.first_stage_model.decode((x0 / SCALE).to(vae.vae_dtype)).float()
        return (image.add_(1.0).div_(2.0).clamp_(0.0, 1.0).movedim(1, -1).cpu(),)


class Drop:
    """An output node that does nothing with its image, so that saving it is not counted."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, CATEGORY

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    def run(self, image):
        return {"ui": {"text": [f"{image.mean().item():.6f}"]}}


NODES = {"BenchCoreTextToImage": CoreTextToImage, "BenchDrop": Drop}
NODE_CLASS_MAPPINGS = NODES  # ComfyUI-Manager takes a literal here for nodes of this pack
