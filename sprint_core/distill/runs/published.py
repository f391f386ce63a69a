"""Full size: a published SANA becomes a SANA-Sprint, on the user's own pictures.

    pictures, captions -> latents, embeddings (once) -> teacher (dense time, q/k norm) -> distill -> export

The DC-AE and Gemma-2 encode and are released; training sees the transformer alone.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...latent import DOWNSCALE, LATENT_CHANNELS, SCALE
from ...models.autoencoder_config import AutoencoderConfig
from ...models.gemma import GemmaConfig
from ...models.transformer import SanaTransformer
from ...text.encoder import TextEncoder
from ...text.loading import find_tokenizer, prompt_format
from ...weights import checkpoint, layouts, presets
from ...weights.checkpoint import CheckpointError, Weights
from ..dataset import scenes as data
from ..dataset.captioned import Item, captioned
from ..dataset.latent_cache import EncodedPictures
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from ..engine.trainer import Stage, Trainer
from ..recipes import Recipe
from ..stages.base import Embedded
from ..stages.student import DistillStage, continued
from ..stages.teacher import TeacherStage, is_stable, student_of

SEED = 42


@dataclass(frozen=True)
class Sources:
    """What a run starts from: weights in any layout that the loaders know, and pictures with captions."""

    teacher: Path
    autoencoder: Path
    text_encoder: Path
    pictures: Path
    time_scale: float | None = None  # of the teacher, where its file does not say
    student: Path | None = None  # a SANA-Sprint to distil on from


def stabilised(teacher: SanaTransformer) -> SanaTransformer:
    """The teacher with dense time embedding and q/k norm, fresh where it had none: to be fine-tuned. Shares weights."""
    config = dataclasses.replace(teacher.config, time_scale=1.0, qk_norm=True)
    model = SanaTransformer(config, device="meta")
    weights = teacher.state_dict()
    like = next(iter(weights.values()))
    for name, tensor in model.state_dict().items():
        if name not in weights:
            weights[name] = torch.ones(tensor.shape, dtype=like.dtype, device=like.device)
    model.load_state_dict(weights, assign=True)
    return model


def encode_pictures(
    items: Iterable[Item],
    folder: Path,
    autoencoder: Weights,
    text_encoder: Weights,
    size_px: int,
    processes: ProcessGroup,
    control: Callable[[Tensor], Tensor] | None = None,
    made_by: str = "",
) -> EncodedPictures:
    """Latents and embeddings of all pictures, encoded once; both encoders are released afterwards.

    control: makes a ControlNet's images of pictures, made_by: what tells it from other ways to make them.
    """
    device, dtype = processes.device, _inference_dtype(processes.device)
    vae, gemma = (checkpoint.build(weights, dtype=dtype, device=device) for weights in (autoencoder, text_encoder))
    encoder = TextEncoder(gemma, find_tokenizer(text_encoder), prompt_format(text_encoder))

    @torch.inference_mode()
    def encode_image(images: Tensor) -> Tensor:
        return (vae.encode(images.to(device, dtype)) * SCALE).float().cpu()

    fingerprint = f"{data.weights_fingerprint(vae)} {data.weights_fingerprint(gemma)} {size_px} {made_by}".strip()
    with processes.main_process_first():
        return EncodedPictures(items, folder, encode_image, encoder.encode, size_px, fingerprint, control)


class Published:
    """A run in one folder. Raises ValueError, CheckpointError or OSError before the first step where it cannot be."""

    def __init__(self, out: Path, recipe: Recipe, sources: Sources, processes: ProcessGroup = SINGLE_PROCESS):
        self.out, self.recipe, self.sources, self.processes = Path(out), recipe, sources, processes
        self.size_px = presets.PRESETS[recipe.preset].size_px
        self.given = checkpoint.load(sources.teacher, layouts.TRANSFORMER, sources.time_scale)
        self.encoders = {
            "autoencoder": checkpoint.load(sources.autoencoder, layouts.AUTOENCODER),
            "text_encoder": checkpoint.load(sources.text_encoder, layouts.TEXT_ENCODER),
        }
        self.start = continued(sources.student) if sources.student else student_of
        self._check_teacher()
        self._check_encoders(*(weights.config for weights in self.encoders.values()))
        self.items = captioned(sources.pictures)

    def _check_teacher(self) -> None:
        found, asked = self.given.config, presets.PRESETS[self.recipe.preset].transformer
        if (found.width, found.depth) != (asked.width, asked.depth):
            raise CheckpointError(
                f"{self.sources.teacher}: width {found.width} and {found.depth} blocks; {self.recipe.preset} has "
                f"{asked.width} and {asked.depth}: choose the recipe of that size"
            )
        if found.guidance_embed:
            raise CheckpointError(f"{self.sources.teacher}: a SANA-Sprint is no teacher; give the multi-step model")

    def _check_encoders(self, vae: AutoencoderConfig, gemma: GemmaConfig) -> None:
        if (vae.latent_channels, vae.downscale) != (LATENT_CHANNELS, DOWNSCALE):
            raise CheckpointError(
                f"{self.sources.autoencoder}: a DC-AE f{vae.downscale}c{vae.latent_channels}; SANA's is "
                f"f{DOWNSCALE}c{LATENT_CHANNELS}: choose another file"
            )
        if gemma.width != self.given.config.caption_width:
            raise CheckpointError(
                f"{self.sources.text_encoder}: embeddings of {gemma.width} numbers; this teacher reads "
                f"{self.given.config.caption_width}: choose the text encoder that it was trained with"
            )

    @functools.cached_property
    def encoded(self) -> EncodedPictures:
        """Latents and embeddings of all pictures, encoded once; both encoders are released afterwards."""
        vae, gemma = self.encoders.pop("autoencoder"), self.encoders.pop("text_encoder")
        return encode_pictures(self.items, self.out / "encoded", vae, gemma, self.size_px, self.processes)

    def teacher(self) -> Embedded:
        """The given model, fine-tuned with the stabilisers that sCM needs."""
        model = Embedded(stabilised(self._transformer()).requires_grad_(True), self.encoded.null)
        stage = TeacherStage(
            model, self.encoded, activation_checkpointing=self.recipe.stages["teacher"].activation_checkpointing
        )
        return self._train(stage, model)

    def student(self) -> SanaTransformer:
        """Distilled from the given teacher, or from the fine-tuned one where it lacks the stabilisers."""
        stable = is_stable(self.given.config)
        teacher = Embedded(self._transformer(), self.encoded.null) if stable else self.teacher()
        checkpointing = self.recipe.stages["distill"].activation_checkpointing
        stage = DistillStage(
            teacher, self.encoded, self.recipe.objective, activation_checkpointing=checkpointing, start=self.start
        )
        stage.settings |= {"student": data.weights_fingerprint(stage.modules["student"].transformer)}
        return self._train(stage, teacher).transformer

    def export(self, model: SanaTransformer, command: str) -> list[Path]:
        """Write the transformer in bf16, as the loaders read it."""
        name = f"sana_{self.recipe.preset.replace('-', '_')}" + ("" if model.config.guidance_embed else "_teacher")
        path = self.out / f"{name}.safetensors"
        tensors = {key: tensor.detach().to("cpu", torch.bfloat16) for key, tensor in model.state_dict().items()}
        settings = {"size_px": self.size_px, "flow_shift": presets.FLOW_SHIFT}
        provenance = {"source": f"distilled from {self.sources.teacher.name}", "command": command}
        weights = checkpoint.Weights(layouts.TRANSFORMER, model.config, tensors, path, settings)
        checkpoint.save(path, [weights], provenance)
        return [path]

    def _transformer(self) -> SanaTransformer:
        """The given one, in fp32 and copied out of its file: training changes weights in place."""
        return copy.deepcopy(checkpoint.build(self.given, dtype=torch.float32, device=self.processes.device))

    def _train(self, stage: Stage, teacher: Embedded) -> nn.Module:
        """The moving average of a stage that starts from this teacher; from another one it would be another run."""
        stage.settings = {**stage.settings, "teacher": data.weights_fingerprint(teacher)}
        return Trainer(stage, self.recipe.stages[stage.name], self.out, SEED, self.processes).train().eval()


def _inference_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
