"""Distillation: one turn of the student (sCM and LADD) and one of the critic, at the bundled model's size.

Their side has the same losses on diffusers' transformer, of the very same weights and random numbers.
"""

import contextlib
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.theirs import accepted
from sprint_core.distill import recipes
from sprint_core.distill.dataset.batch import Batch
from sprint_core.distill.engine.randomness import SampleRandom, initialise
from sprint_core.distill.losses.jvp import plain_attention
from sprint_core.distill.stages.base import Embedded
from sprint_core.distill.stages.student import DistillStage
from sprint_core.distill.stages.teacher import student_of
from sprint_core.emoji.scenes import CANVAS_PX
from sprint_core.latent import DOWNSCALE, LATENT_CHANNELS
from sprint_core.models.layers import sdpa
from sprint_core.models.transformer import SanaTransformer
from sprint_core.weights import layouts

RECIPE = recipes.RECIPES["demo"]
SCHEDULE = dataclasses.replace(RECIPE.stages["distill"], batch=32)  # the recipe's own is for a GPU
IMAGES = 2 * SCHEDULE.batch  # of both turns
STEP = max(RECIPE.objective.ladd_from, RECIPE.objective.tangent_warmup_steps)  # from where on all losses take part
CAPTION_TOKENS = 12


class TheirTransformer(nn.Module):
    """diffusers' SanaTransformer2DModel with weights of ours, called as the losses call ours."""

    def __init__(self, ours: SanaTransformer):
        from diffusers import SanaTransformer2DModel

        super().__init__()
        self.config = ours.config
        config = accepted(layouts.transformer.config_to_diffusers(self.config), SanaTransformer2DModel)
        self.network = SanaTransformer2DModel(**config).to(next(ours.parameters()).device)
        self.network.load_state_dict(layouts.TRANSFORMER.to_diffusers(ours.state_dict(), self.config))

    def forward(self, x_s, s, caption, guidance=None, mask=None, attention=sdpa, around_block=None) -> Tensor:
        """As SanaTransformer's, but that around_block sees a block's result alone and cannot run it otherwise."""
        hooks = []
        if around_block is not None:
            for i, block in enumerate(self.network.transformer_blocks):
                hooks.append(
                    block.register_forward_hook(lambda _, args, x, i=i: around_block(i, lambda *_: x, x, None))
                )
        # In forward mode differentiable is only what torch makes of single operations.
        with sdpa_kernel(SDPBackend.MATH) if attention is plain_attention else contextlib.nullcontext():
            v = self.network(
                x_s,
                encoder_hidden_states=caption,
                encoder_attention_mask=mask,
                guidance=None if guidance is None else guidance * self.config.guidance_scale,
                timestep=s * self.config.time_scale,
                return_dict=False,
            )[0]
        for hook in hooks:
            hook.remove()
        return v


class Noise:
    """Latents and captions of the bundled model's size, as good as any: numbers of the sample's own."""

    fingerprint = "noise"

    def batch(self, random: SampleRandom) -> Batch:
        side = CANVAS_PX // DOWNSCALE
        captions = random.normal(CAPTION_TOKENS, recipes.EMOJI_TRANSFORMER.caption_width)
        return Batch(random.normal(LATENT_CHANNELS, side, side), list(captions))


class Training:
    """A student and a critic in training, of a teacher with first values. `turn` trains both by a batch."""

    def __init__(self, side: str, device: torch.device, dtype: torch.dtype):
        config = dataclasses.replace(recipes.EMOJI_TRANSFORMER, guidance_embed=False)
        teacher = SanaTransformer(config, device=device)
        initialise(teacher, 0)
        student = student_of(teacher)
        if side == "theirs":
            teacher, student = TheirTransformer(teacher), TheirTransformer(student)
        null = torch.zeros(1, config.caption_width)
        stage = DistillStage(Embedded(teacher, null), Noise(), RECIPE.objective, start=lambda _: student)
        self.stage = stage
        self.device = device
        self.dtype = dtype
        self.optimizers = {
            name: torch.optim.AdamW(module.parameters(), SCHEDULE.lr, SCHEDULE.betas, weight_decay=0.0)
            for name, module in stage.modules.items()
        }

    def turn(self, seed: int) -> Tensor:
        """Both losses and what they are made of, [n]."""
        measured = []
        with torch.inference_mode(False), torch.enable_grad():
            for phase, optimizer in self.optimizers.items():
                for module in self.stage.modules.values():
                    module.zero_grad(set_to_none=True)
                random = SampleRandom(seed, STEP, phase, range(SCHEDULE.batch))
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                    loss, metrics = self.stage.loss(phase, STEP, random)
                loss.backward()
                optimizer.step()
                measured += [loss.detach(), *metrics.values()]
        return torch.stack(measured)
