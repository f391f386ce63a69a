"""The bundled model, from nothing, on scenes of emoji.

autoencoder -> fold -> decoder -> captioning -> latents -> teacher -> distill -> export
features, by itself: the network of the second opinion and of the Frechet distance
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ...emoji import art, captions, judge, scenes
from ...emoji.art import Art
from ...evaluate import contrastive
from ...evaluate.contrastive import ContrastiveNetwork
from ...evaluate.frechet import INPUT_PX
from ...images import preview
from ...latent import SCALE
from ...models.autoencoder import Autoencoder
from ...models.gemma import Gemma
from ...models.transformer import SanaTransformer
from ...text.tokenizers import BOS, PAD, tokenizer_state
from ...weights import checkpoint, layouts, presets, tensorfile
from .. import recipes
from ..dataset import emoji_scenes
from ..dataset.batch import weights_fingerprint
from ..dataset.emoji_images import EmojiImages
from ..dataset.emoji_scenes import CaptionedScenes
from ..dataset.emoji_text import prompts, tokenizer
from ..dataset.resident import ResidentLatents
from ..dataset.scene_latents import stored_latents
from ..dataset.tokenized import TokenizedCaptions
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from ..engine.randomness import initialise
from ..recipes import Recipe
from ..stages import autoencoder as autoencoder_stages
from ..stages.base import Captioned, Watch
from ..stages.captioning import CaptioningModel, TokenCaptioningStage
from ..stages.contrastive import ContrastiveStage
from ..stages.rivals import distill_stage
from ..stages.student import continued
from ..stages.teacher import TeacherStage, student_of
from .run import Run, cpu_tensors
from .shapes import fresh_gemma, scaled_decoder

SEED = 0
POOL = 200_000  # captions
WHOLE, SHAPES = 6000, 500  # images of the auto-encoder's pools
PROBED = 1500  # scenes that tell the latents' mean and standard deviation
BATCH, SHARD = 250, 2000
CPU_BATCH = 25  # which its caches hold: a third faster than ten times as many
FITTED = 500  # scenes on which the colours of previews are fitted
FLOW_SHIFT = 12.0  # below s = 0.9 a thing shows through the noise: only above it does a model learn its name
JUDGED = 60  # prompts while it distils


class EmojiRun(Run):
    """A run on the art in `sprites` (emoji/art.py).

    autoencoder, text_encoder, teacher: files of trained ones, to do without those stages. student: of a SANA-Sprint of
    this teacher, to distil on from. among: numbers of the concepts that the model learns; pairs: how often
    a training caption names two. Raises OSError, ValueError, CheckpointError.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        sprites: Path,
        pool: int = POOL,
        autoencoder: Path | None = None,
        processes: ProcessGroup = SINGLE_PROCESS,
        student: Path | None = None,
        text_encoder: Path | None = None,
        teacher: Path | None = None,
        among: Sequence[int] = captions.ALL,
        pairs: float = captions.PAIRS,
    ):
        super().__init__(out, recipe, processes, SEED)
        self.art: Art = art.load(sprites).to(self.device)
        self.pool = pool
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.teacher = None if teacher is None else _teacher(teacher)
        self.start = continued(student) if student else student_of
        self.prompts, self.among, self.pairs = prompts(), among, pairs

    def train_autoencoder(self) -> Autoencoder:
        """The DC-AE with unit latents: the one of the file, or after both of its stages."""
        if self.autoencoder is not None:
            return self.load_autoencoder(self.autoencoder)
        model = Autoencoder(recipes.EMOJI_AUTOENCODER).to(self.device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        initialise(model, self.seed)
        images = EmojiImages(self.art, WHOLE, SHAPES)
        steps = self.recipe.stages["autoencoder"].steps
        folded = self.train(autoencoder_stages.WholeStage(model, images, steps))
        with torch.no_grad():
            statistics = autoencoder_stages.latent_statistics(folded, images.batches(BATCH, PROBED))
        autoencoder_stages.fold(folded, *statistics)
        critic = autoencoder_stages.PatchCritic()
        initialise(critic, self.seed)
        stage = autoencoder_stages.DecoderStage(folded, images, critic)
        stage.settings |= {"encoder": weights_fingerprint(folded.encoder)}
        folded.decoder = self.train(stage)
        return folded.eval().requires_grad_(False)

    def export_autoencoder(self, model: Autoencoder, command: str = "") -> list[Path]:
        """Write the DC-AE alone, for another run to start from."""
        path = self.out / "autoencoder.safetensors"
        checkpoint.save(path, [self._part(layouts.AUTOENCODER, model, {})], {"command": command})
        return [path]

    def train_features(self, drawn: CaptionedScenes) -> ContrastiveNetwork:
        """The network that judges besides the templates, and whose features the Frechet distance compares."""
        model = ContrastiveNetwork(recipes.EMOJI_TEXT.vocab)
        initialise(model, self.seed)
        parts = tqdm(drawn.packed.split(CPU_BATCH), desc="scenes for the features", leave=False)
        images = torch.cat([thumbnails(scenes.paint(part, self.art)) for part in parts])
        tokens = drawn.tokens[: len(images)].long()
        return self.train(ContrastiveStage(model, images, tokens.to(images.device), drawn.fingerprint))

    def export_features(self, model: ContrastiveNetwork, command: str) -> list[Path]:
        """Write it alone."""
        path = self.out / contrastive.FILE.name
        contrastive.save(model, path, json.dumps(_provenance(command)))
        return [path]

    def draw_scenes(self) -> CaptionedScenes:
        """Those of the pool, with captions."""
        return emoji_scenes.draw(self.pool, among=self.among, pairs=self.pairs)

    def train_text_encoder(self, drawn: CaptionedScenes) -> Gemma:
        """The one of the file, or pre-trained by questions about captions."""
        if self.text_encoder is not None:
            return self.build_copy(checkpoint.load(self.text_encoder, layouts.TEXT_ENCODER)).requires_grad_(False)
        model = CaptioningModel(fresh_gemma(self.seed, recipes.EMOJI_TEXT), emoji_scenes.QUESTIONS)
        initialise(model.heads, self.seed)
        tokens, labels = drawn.tokens.to(self.device), drawn.labels.to(self.device)
        return self.train(TokenCaptioningStage(model, tokens, labels, drawn.fingerprint)).gemma

    @torch.inference_mode()
    def encode_dataset(self, autoencoder: Autoencoder, drawn: CaptionedScenes) -> Tensor:
        """Scaled latents [images, 32, 8, 8] in fp16 of packed scenes, then of shapes: in shards that are kept."""
        source = {"autoencoder": weights_fingerprint(autoencoder), "scenes": drawn.fingerprint}
        parts = []
        for name, images in (("emoji", drawn.packed), ("shapes", drawn.shapes)):
            chunks = images.split(SHARD) if len(images) else ()
            for number, chunk in enumerate(tqdm(chunks, desc=f"latents of {name}", leave=False)):
                path = self.out / "latents" / f"{name}_{number:04d}.safetensors"
                latents = stored_latents(path, source, len(chunk))
                if latents is None:
                    batches = chunk.split(CPU_BATCH if self.device.type == "cpu" else BATCH)
                    latents = torch.cat([encode(autoencoder, self._painted(part)) for part in batches])
                    tensorfile.write(path, {"latents": latents.cpu()}, source)
                parts.append(latents.to(self.device))
        return torch.cat(parts)

    def _painted(self, images: Tensor) -> Tensor:
        """Packed scenes, or images that are there already: [b, 3, 256, 256] uint8, where the art is."""
        return scenes.paint(images, self.art) if images.ndim == 2 else images.to(self.device)

    def dataset(self, latents: Tensor, drawn: CaptionedScenes) -> ResidentLatents:
        """Latents with the captions of their images."""
        image = drawn.image.to(latents.device)
        return ResidentLatents(latents[image], tokenized(drawn), drawn.fingerprint, device=self.device)

    def train_teacher(self, gemma: Gemma, dataset: ResidentLatents) -> Captioned:
        """The one of the file, or trained from nothing."""
        if self.teacher is not None:
            return Captioned(self.build_copy(self.teacher), gemma, self.prompts).eval().requires_grad_(False)
        transformer = SanaTransformer(dataclasses.replace(recipes.EMOJI_TRANSFORMER, guidance_embed=False))
        initialise(transformer, self.seed)
        stage = TeacherStage(Captioned(transformer, gemma, self.prompts), dataset, FLOW_SHIFT)
        stage.settings |= {"text_encoder": weights_fingerprint(gemma)}
        return self.train(stage)

    def train_student(self, teacher: Captioned, autoencoder: Autoencoder, dataset: ResidentLatents) -> SanaTransformer:
        watch = self.watch(autoencoder, dataset)
        stage = distill_stage(teacher, dataset, self.recipe.objective, start=self.start, watch=watch)
        stage.settings |= {"teacher": weights_fingerprint(teacher)}
        return self.train(stage).transformer

    def watch(self, autoencoder: Autoencoder, dataset: ResidentLatents) -> Watch:
        """Held-out prompts, judged."""
        prompts, decode = captions.prompts(JUDGED, among=self.among), scaled_decoder(autoencoder)
        requirements = [prompt.requirement for prompt in prompts]

        @torch.no_grad()
        def share_right(scaled: Tensor) -> float:
            return judge.judge(decode(scaled).float(), requirements).names.float().mean().item()

        texts = [prompt.text for prompt in prompts]
        return Watch(texts, tuple(dataset.latents.shape[1:]), FLOW_SHIFT, share_right)

    def export(
        self, student: SanaTransformer, teacher: Captioned, autoencoder: Autoencoder, command: str
    ) -> list[Path]:
        """Write the model as native files: the student with its encoder and DC-AE, and the teacher."""
        text = {"instruction": None, "max_tokens": self.prompts.preset.max_tokens, "lower": False}
        encoder = self._part(layouts.TEXT_ENCODER, teacher.gemma, {"text": text})
        encoder.extras |= tokenizer_state(tokenizer(self.among))
        fitted = EmojiImages(self.art, FITTED, 0).batches(BATCH, FITTED)
        colours = preview.fit(autoencoder, fitted).factors()
        decoder = self._part(layouts.AUTOENCODER, autoencoder, {preview.SETTING: dataclasses.asdict(colours)})
        sizes = {"size_px": scenes.CANVAS_PX, "flow_shift": FLOW_SHIFT, "world": "emoji", "concepts": list(self.among)}
        sprint = self._part(layouts.TRANSFORMER, student, sizes)
        guided = {"guidance": presets.GUIDANCE * self.recipe.objective.teacher_guidance}
        multi_step = self._part(layouts.TRANSFORMER, teacher.transformer, sizes | guided)
        paths = [self.out / "sana_sprint_tiny.safetensors", self.out / "sana_tiny_teacher.safetensors"]
        checkpoint.save(paths[0], [sprint, encoder, decoder], _provenance(command))
        checkpoint.save(paths[1], [multi_step], _provenance(command))
        return paths

    def _part(self, layout: layouts.Layout, model: Any, settings: Mapping[str, Any]) -> checkpoint.Weights:
        return checkpoint.Weights(layout, model.config, cpu_tensors(model, torch.float16), self.out, dict(settings))


def _teacher(path: Path) -> checkpoint.Weights[Any, SanaTransformer]:
    """A multi-step model of this world. Raises CheckpointError, ValueError."""
    weights = checkpoint.load(path, layouts.TRANSFORMER)
    if weights.config.guidance_embed:
        raise ValueError(f"{path}: a SANA-Sprint; --teacher takes the multi-step model that it is made of")
    if weights.config.caption_width != recipes.EMOJI_TEXT.width:
        raise ValueError(
            f"{path}: it reads captions of width {weights.config.caption_width}, and the text encoder of emoji has "
            f"{recipes.EMOJI_TEXT.width}; --teacher takes a model of emoji here"
        )
    return weights


def _provenance(command: str) -> dict[str, str]:
    return {"source": "trained from nothing on Fluent Emoji (Microsoft, MIT)", "command": command}


def thumbnails(images: Tensor) -> Tensor:
    """Images [b, 3, h, w] uint8 as small as the contrastive network sees them."""
    return F.interpolate(images.float(), (INPUT_PX, INPUT_PX), mode="area").round().byte()


def encode(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Scaled latents in fp16 of images [b, 3, h, w] uint8."""
    pixels = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        return (autoencoder.encode(pixels) * SCALE).half()


def tokenized(drawn: CaptionedScenes) -> TokenizedCaptions:
    """The captions of drawn scenes, and the empty one."""
    ids = drawn.tokens.long()
    null = torch.full((ids.shape[1],), PAD)
    null[0] = BOS
    return TokenizedCaptions(ids, ids != PAD, (null, null != PAD))
