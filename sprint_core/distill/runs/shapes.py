"""A model of plain shapes, from nothing: every stage of it, and its export as native files.

autoencoder -> fold -> decoder -> latents -> captioning -> teacher -> distill -> export
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...evaluate import scoring
from ...evaluate.frechet import FeatureNetwork
from ...images import preview
from ...latent import SCALE
from ...models.autoencoder import Autoencoder
from ...models.gemma import Gemma, GemmaConfig
from ...models.transformer import SanaTransformer
from ...shapes import captions, examples, judge
from ...text.formats import TextPreset
from ...text.prompts import PromptTokenizer
from ...text.tokenizers import HFTokenizer, tokenizer_state
from ...weights import checkpoint, layouts, tensorfile
from .. import recipes
from ..dataset import scenes
from ..dataset.batch import weights_fingerprint
from ..dataset.scene_latents import SceneLatents, encode_scenes
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from ..engine.randomness import initialise
from ..recipes import Recipe
from ..stages import autoencoder as autoencoder_stages
from ..stages import features
from ..stages.base import Captioned, Preview, Watch
from ..stages.captioning import CaptioningModel, CaptioningStage
from ..stages.rivals import distill_stage
from ..stages.student import continued
from ..stages.teacher import TeacherStage, student_of
from .run import Run, cpu_tensors

SEED = 0
POOL = 20_000  # training scenes
MAX_TOKENS = 24
PROBED = 1000  # scenes that tell the latents' mean and standard deviation
FITTED = 500  # scenes on which the colours of previews are fitted
BATCH = 50
JUDGED = 60  # prompts while it distils
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def tokenizer() -> HFTokenizer:
    """One token per word of the scenes' vocabulary, with Gemma's special tokens."""
    vocab = {piece: i for i, piece in enumerate((*SPECIAL, *captions.VOCABULARY))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    letters = {"type": "Replace", "pattern": {"Regex": "[^a-z]+"}, "content": " "}
    description = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece, **flags} for i, piece in enumerate(SPECIAL)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, letters]},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    return HFTokenizer(json.dumps(description).encode())


def prompts() -> PromptTokenizer:
    """Captions to tokens, without an instruction."""
    return PromptTokenizer(tokenizer(), TextPreset(instruction=None, max_tokens=MAX_TOKENS))


def fresh_gemma(seed: int, config: GemmaConfig = recipes.SHAPES_TEXT) -> Gemma:
    """A text encoder before training, with unit embeddings and norms of gain 1 + 0.

    Gemma scales its embeddings by sqrt(width): of torch's own N(0, 1) they would drown what the layers add,
    and the encoder would stay a bag of words, without word order.
    """
    model = Gemma(config)
    initialise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.mul_(model.config.width**-0.5)
    return model


class ShapesRun(Run):
    """A run on scenes 0 to pool - 1. autoencoder: the file of a trained DC-AE, to do without those stages.

    student: the file of a SANA-Sprint of the teacher in this folder, to distil on from. Raises CheckpointError.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe = recipes.RECIPES["shapes"],
        pool: int = POOL,
        autoencoder: Path | None = None,
        processes: ProcessGroup = SINGLE_PROCESS,
        student: Path | None = None,
    ):
        super().__init__(out, recipe, processes, SEED)
        self.pool, self.autoencoder = pool, autoencoder
        self.start = continued(student) if student else student_of
        self.prompts = prompts()

    def train_autoencoder(self) -> Autoencoder:
        """The DC-AE with unit latents: the one of the file, or after both of its stages. Raises CheckpointError."""
        if self.autoencoder is not None:
            return self.load_autoencoder(self.autoencoder)
        if self.processes.world_size > 1 or self.recipe.stages["autoencoder"].micro_batch:
            raise ValueError(
                "the auto-encoder trains as one process, without micro-batches; then pass it: --autoencoder FILE"
            )
        model = Autoencoder(recipes.SHAPES_AUTOENCODER)
        initialise(model, self.seed)
        steps, images = (
            self.recipe.stages["autoencoder"].steps,
            autoencoder_stages.SeededImages(scenes.images, self.pool),
        )
        folded = self.train(autoencoder_stages.WholeStage(model, images, steps))
        probe = (batch.to(self.device) for batch in self._images(PROBED))
        autoencoder_stages.fold(folded, *autoencoder_stages.latent_statistics(folded, probe))
        stage = autoencoder_stages.DecoderStage(folded, images)
        stage.settings |= {"encoder": weights_fingerprint(folded.encoder)}
        folded.decoder = self.train(stage)
        return folded.eval().requires_grad_(False)

    def encode_dataset(self, autoencoder: Autoencoder) -> SceneLatents:
        """For the teacher and the student."""
        with self.processes.main_process_first():
            return encode_scenes(autoencoder, self.out / "latents", self.pool)

    def train_text_encoder(self) -> Gemma:
        """Pre-trained by captioning questions."""
        model = CaptioningModel(fresh_gemma(self.seed))
        initialise(model.heads, self.seed)
        return self.train(CaptioningStage(model, self.prompts, self.pool)).gemma

    def train_teacher(self, gemma: Gemma, autoencoder: Autoencoder, latents: SceneLatents) -> Captioned:
        config = dataclasses.replace(recipes.SHAPES_TRANSFORMER, guidance_embed=False)
        transformer = SanaTransformer(config)
        initialise(transformer, self.seed)
        model = Captioned(transformer, gemma, self.prompts)
        stage = TeacherStage(model, latents, recipes.SHAPES_FLOW_SHIFT, _preview(autoencoder, latents))
        stage.settings |= {"text_encoder": weights_fingerprint(gemma)}
        return self.train(stage)

    def train_student(self, teacher: Captioned, autoencoder: Autoencoder, latents: SceneLatents) -> SanaTransformer:
        shown = _preview(autoencoder, latents)
        watch = _watch(autoencoder, latents)
        stage = distill_stage(teacher, latents, self.recipe.objective, shown, start=self.start, watch=watch)
        start = weights_fingerprint(stage.student.transformer)
        stage.settings |= {"teacher": weights_fingerprint(teacher), "student": start}
        return self.train(stage).transformer

    def train_features(self) -> FeatureNetwork:
        """The network of the Frechet distance."""
        model = FeatureNetwork(features.QUESTIONS)
        initialise(model, self.seed)
        return self.train(features.FeatureStage(model, self.pool))

    def export_features(self, model: FeatureNetwork, folder: Path, command: str) -> list[Path]:
        path = folder / "features.safetensors"
        provenance = {"provenance": json.dumps(_provenance(command))}
        tensorfile.write(path, cpu_tensors(model, torch.float16), provenance)
        return [path]

    def export_autoencoder(self, autoencoder: Autoencoder, folder: Path, command: str) -> list[Path]:
        """Write the DC-AE alone, for another run to start from."""
        path = folder / "autoencoder.safetensors"
        checkpoint.save(path, [self._part(layouts.AUTOENCODER, autoencoder, {})], _provenance(command))
        return [path]

    def export(
        self, student: SanaTransformer, teacher: Captioned, autoencoder: Autoencoder, folder: Path, command: str
    ) -> list[Path]:
        """Write the model as native files: the student with its encoder and DC-AE, and the teacher."""
        text = {"instruction": None, "max_tokens": MAX_TOKENS, "lower": False}
        encoder = self._part(layouts.TEXT_ENCODER, teacher.gemma, {"text": text})
        encoder.extras |= tokenizer_state(self.prompts.tokenizer)
        colours = preview.fit(autoencoder, self._images(FITTED)).factors()
        decoder = self._part(layouts.AUTOENCODER, autoencoder, {preview.SETTING: dataclasses.asdict(colours)})
        sizes = {"size_px": recipes.SHAPES_PX, "flow_shift": recipes.SHAPES_FLOW_SHIFT}
        sprint = self._part(layouts.TRANSFORMER, student, sizes)
        multi_step = self._part(layouts.TRANSFORMER, teacher.transformer, sizes)
        paths = [folder / "sana_sprint_tiny.safetensors", folder / "sana_tiny_teacher.safetensors"]
        checkpoint.save(paths[0], [sprint, encoder, decoder], _provenance(command))
        checkpoint.save(paths[1], [multi_step], _provenance(command))
        return paths

    def _images(self, count: int) -> Iterator[Tensor]:
        """Batches of the first scenes."""
        return (scenes.images(range(start, start + BATCH)) for start in range(0, min(count, self.pool), BATCH))

    def _part(self, layout: layouts.Layout, model: Any, settings: Mapping[str, Any]) -> checkpoint.Weights:
        return checkpoint.Weights(layout, model.config, cpu_tensors(model, torch.float16), self.out, dict(settings))


def _preview(autoencoder: Autoencoder, latents: SceneLatents) -> Preview:
    """Held-out prompts, one or two of each category."""
    shown = [prompt.text for name in captions.CATEGORIES for prompt in examples.prompts(name, 2)]
    return Preview(shown, tuple(latents.latents.shape[1:]), scaled_decoder(autoencoder))


def _watch(autoencoder: Autoencoder, latents: SceneLatents) -> Watch:
    """Held-out prompts, as many of each category, judged."""
    prompts, decode = scoring.balanced_prompts(JUDGED, SEED), scaled_decoder(autoencoder)

    @torch.no_grad()
    def share_right(scaled: Tensor) -> float:
        images = decode(scaled).float().cpu().numpy()
        right = [judge.judge(image, prompt.requirement) for image, prompt in zip(images, prompts, strict=True)]
        return sum(right) / len(right)

    texts = [prompt.text for prompt in prompts]
    return Watch(texts, tuple(latents.latents.shape[1:]), recipes.SHAPES_FLOW_SHIFT, share_right)


def scaled_decoder(autoencoder: Autoencoder) -> Callable[[Tensor], Tensor]:
    """Scaled latents -> images [b, h, w, 3] in [0, 1]."""
    return lambda latents: autoencoder_stages.displayed(autoencoder.decode(latents / SCALE))


def _provenance(command: str) -> dict:
    return {"source": "trained from nothing on sprint_core.shapes.scenes", "command": command}
