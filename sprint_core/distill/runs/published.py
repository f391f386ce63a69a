"""Full size: a published SANA becomes a SANA-Sprint, on the user's own images.

    images, captions -> latents, embeddings (once) -> teacher (dense time, q/k norm) -> distill -> export

The DC-AE and Gemma-2 encode and are released; training sees the transformer alone.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...batch import rows
from ...latent import DOWNSCALE, LATENT_CHANNELS
from ...models.autoencoder_config import AutoencoderConfig
from ...models.gemma import GemmaConfig
from ...models.transformer import SanaTransformer
from ...weights import checkpoint, layouts, presets
from ...weights.checkpoint import CheckpointError
from ..dataset.batch import weights_fingerprint
from ..dataset.captioned import captioned
from ..dataset.latent_cache import LatentCache
from ..dataset.pairing import Item
from ..dataset.tokenized import TokenizedCaptions
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from ..engine.randomness import SampleRandom
from ..recipes import Recipe
from ..stages.base import Embed, Embedded, Preview, Watch
from ..stages.rivals import distill_stage
from ..stages.student import WATCHED, continued
from ..stages.teacher import TeacherStage, is_stable, student_of
from .encoders import DataOptions, load_decoder, load_encoders
from .run import Run, cpu_tensors
from .shapes import scaled_decoder

SEED = 42
PROMPTS = (".txt", ".jsonl", ".csv")
SHOWN, SHOWN_STEPS = 4, (1, 2, 4)  # captions of a sample grid, and steps: a row each
SHOWN_PX = 512  # at most, of one image there
NO_MORE = rows.Defaults()


@dataclass(frozen=True)
class Sources:
    """What a run starts from: weights in any layout that the loaders know, and images with captions.

    Or a file of prompts, as batch/rows.py reads it, for methods that look at no image: then without an auto-encoder.
    """

    teacher: Path
    autoencoder: Path | None
    text_encoder: Path
    images: Path
    time_scale: float | None = None  # of the teacher, where its file does not say
    student: Path | None = None  # a SANA-Sprint to distil on from
    data: DataOptions = field(default_factory=DataOptions)

    @property
    def are_prompts(self) -> bool:
        """Whether there are no images."""
        return self.images.suffix.lower() in PROMPTS

    def items(self) -> Iterator[Item]:
        """Images with captions, or prompts. Raises ValueError, OSError."""
        if not self.are_prompts:
            return captioned(self.images)
        return (Item(f"{self.images.name}/{row.id}", row.prompt, _no_image) for row in rows.read(self.images, NO_MORE))


def _no_image() -> Image.Image:
    raise ValueError("a prompt has no image")


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


def _watch(cache: LatentCache) -> Watch:
    """Of some captions of the size that most images have."""
    batch = cache.of_one_size().batch(SampleRandom(SEED, 0, "watch", range(WATCHED)))
    return Watch(batch.captions, tuple(batch.latents.shape[1:]), presets.FLOW_SHIFT)


class PublishedRun(Run):
    """A run of a recipe of a published size. Raises ValueError, CheckpointError or OSError where it cannot be."""

    embed: Embed | None = None  # encodes captions that the dataset holds as texts

    def __init__(self, out: Path, recipe: Recipe, sources: Sources, processes: ProcessGroup = SINGLE_PROCESS):
        super().__init__(out, recipe, processes, SEED)
        self.sources = sources
        self.size_px = presets.PRESETS[recipe.preset].size_px
        self.teacher = checkpoint.load(sources.teacher, layouts.TRANSFORMER, sources.time_scale)
        self.start = continued(sources.student) if sources.student else student_of
        self._check_teacher()
        if sources.are_prompts:
            self._check_without_images()
        elif sources.autoencoder is None:
            raise ValueError(f"{sources.images}: images need --vae, which encodes them")
        else:
            self._check_autoencoder(checkpoint.load(sources.autoencoder, layouts.AUTOENCODER).config)
        self._check_text_encoder(checkpoint.load(sources.text_encoder, layouts.TEXT_ENCODER).config)
        next(sources.items())

    def _check_without_images(self) -> None:
        """Raises ValueError where something learns from images, of which there are none."""
        weights = {"sCM": self.recipe.objective.scm_weight, "LADD": self.recipe.objective.ladd_weight}
        learning = [name for name, weight in weights.items() if weight]
        learning += [] if is_stable(self.teacher.config) else ["the fine-tuning of this teacher"]
        if learning:
            raise ValueError(
                f"{self.sources.images}: prompts alone, and {' and '.join(learning)} would learn from images: let the "
                "teacher make them (python -m sprint_core.batch), or add --set distill.method=dmd, sid or emd"
            )

    def _check_teacher(self) -> None:
        config, preset = self.teacher.config, presets.PRESETS[self.recipe.preset].transformer
        if (config.width, config.depth) != (preset.width, preset.depth):
            raise CheckpointError(
                f"{self.sources.teacher}: width {config.width} and {config.depth} blocks; {self.recipe.preset} has "
                f"{preset.width} and {preset.depth}: choose the recipe of that size"
            )
        if config.guidance_embed:
            raise CheckpointError(f"{self.sources.teacher}: a SANA-Sprint is no teacher; give the multi-step model")

    def _check_autoencoder(self, config: AutoencoderConfig) -> None:
        if (config.latent_channels, config.downscale) != (LATENT_CHANNELS, DOWNSCALE):
            raise CheckpointError(
                f"{self.sources.autoencoder}: a DC-AE f{config.downscale}c{config.latent_channels}; SANA's is "
                f"f{DOWNSCALE}c{LATENT_CHANNELS}: choose another file"
            )

    def _check_text_encoder(self, config: GemmaConfig) -> None:
        if config.width != self.teacher.config.caption_width:
            raise CheckpointError(
                f"{self.sources.text_encoder}: embeddings of width {config.width}; this teacher reads "
                f"{self.teacher.config.caption_width}: choose the text encoder that it was trained with"
            )

    def encode_dataset(self) -> LatentCache:
        """Latents and embeddings of all images; what encodes is released afterwards, if it has no more to do."""
        vae = None if self.sources.are_prompts else self.sources.autoencoder
        encoders = load_encoders(vae, self.sources.text_encoder, self.size_px, self.sources.data, self.device)
        self.embed = encoders.embed
        return encoders.encode(self.sources.items(), self.out / "encoded", processes=self.processes)

    def train_teacher(self, cache: LatentCache) -> Embedded:
        """The given model, fine-tuned with the stabilisers that sCM needs."""
        model = Embedded(stabilised(self.build_copy(self.teacher)).requires_grad_(True), cache.null, self.embed)
        checkpointing = self.recipe.stages["teacher"].activation_checkpointing
        stage = TeacherStage(model, cache, activation_checkpointing=checkpointing)
        stage.settings |= {"teacher": weights_fingerprint(model)}
        return self.train(stage)

    def train_student(self, cache: LatentCache) -> SanaTransformer:
        """Distilled from the given teacher, or from the fine-tuned one where it lacks the stabilisers."""
        stable = is_stable(self.teacher.config)
        checkpointing = self.recipe.stages["distill"].activation_checkpointing
        watch = _watch(cache)
        stage = distill_stage(  # which alone keeps the teacher, in its own precision
            Embedded(self.build_copy(self.teacher), cache.null, self.embed) if stable else self.train_teacher(cache),
            cache,
            self.recipe.objective,
            activation_checkpointing=checkpointing,
            start=self.start,
            preview=self._preview(watch),
            watch=watch,
        )
        stage.sample_every = self.recipe.stages["distill"].check_every
        start = weights_fingerprint(stage.student.transformer)
        stage.settings |= {"student": start, "teacher": weights_fingerprint(stage.teacher)}
        return self.train(stage).transformer

    def _preview(self, watch: Watch) -> Preview | None:
        """The first captions that are watched, in each number of steps: rows of images, where they can be decoded."""
        if self.sources.autoencoder is None:
            return None
        assert not isinstance(watch.captions, TokenizedCaptions)
        return Preview(watch.captions[:SHOWN], watch.shape, self._decode, steps=SHOWN_STEPS)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images [b, h, w, 3] in [0, 1] on the CPU, made smaller, by a DC-AE that then goes."""
        assert self.sources.autoencoder is not None
        autoencoder = load_decoder(self.sources.autoencoder, self.device)
        decode, like = scaled_decoder(autoencoder), next(autoencoder.parameters())
        shrink = max(1, self.size_px // SHOWN_PX)
        images = (decode(latent[None].to(like)).float().movedim(-1, 1) for latent in latents)
        return torch.cat([F.avg_pool2d(image, shrink).movedim(1, -1).cpu() for image in images])

    def export(self, model: SanaTransformer, command: str) -> list[Path]:
        """Write the transformer in bf16, as the loaders read it."""
        name = f"sana_{self.recipe.preset.replace('-', '_')}" + ("" if model.config.guidance_embed else "_teacher")
        path = self.out / f"{name}.safetensors"
        settings = {"size_px": self.size_px, "flow_shift": presets.FLOW_SHIFT}
        provenance = {"source": f"distilled from {self.sources.teacher.name}", "command": command}
        tensors = cpu_tensors(model, torch.bfloat16)
        checkpoint.save(
            path, [checkpoint.Weights(layouts.TRANSFORMER, model.config, tensors, path, settings)], provenance
        )
        return [path]
