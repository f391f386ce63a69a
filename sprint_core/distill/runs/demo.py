"""The bundled model, from nothing: every stage of it, and its export as native files.

    autoencoder -> fold -> decoder -> latents -> captioning -> teacher -> distill -> export

Each stage resumes where it stopped; one that has ended costs nothing.
"""

import dataclasses
import functools
import json
from pathlib import Path

import torch

from ...evaluate.frechet import FeatureNetwork
from ...images import preview
from ...latent import SCALE
from ...models.autoencoder import Autoencoder
from ...models.gemma import Gemma
from ...models.transformer import SanaTransformer
from ...shapes import captions, examples
from ...text.formats import TextPreset
from ...text.prompts import PromptTokenizer
from ...text.tokenizers import HFTokenizer, tokenizer_state
from ...weights import checkpoint, layouts, tensorfile
from .. import recipes
from ..dataset import scenes as data
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from ..engine.randomness import initialise
from ..engine.stage import Averaged, Stage
from ..engine.trainer import Trainer
from ..recipes import Recipe
from ..stages import autoencoder, features
from ..stages.base import Captioned, Preview
from ..stages.captioning import CaptioningModel, CaptioningStage
from ..stages.student import DistillStage, continued
from ..stages.teacher import TeacherStage, student_of

SEED = 0
POOL = 20_000  # training scenes
MAX_TOKENS = 24
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


def fresh_gemma(seed: int) -> Gemma:
    """The demo's text encoder before training, with unit embeddings and norms of gain 1 + 0.

    Gemma scales its embeddings by sqrt(width): of torch's own N(0, 1) they would drown what the layers add,
    and the encoder would stay a bag of words, without word order.
    """
    model = Gemma(recipes.DEMO_TEXT)
    initialise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.mul_(model.config.width**-0.5)
    return model


class Demo:
    """A run in one folder. `recipe` may shorten stages, `pool` the data; `given`: a trained DC-AE to start from.

    student: a SANA-Sprint of the teacher in this folder, to distil on from.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe = recipes.RECIPES["demo"],
        pool: int = POOL,
        given: Path | None = None,
        processes: ProcessGroup = SINGLE_PROCESS,
        student: Path | None = None,
    ):
        self.out, self.recipe, self.pool, self.given, self.processes = Path(out), recipe, pool, given, processes
        self.start = continued(student) if student else student_of
        self.prompts = prompts()

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The DC-AE with unit latents: the given one, or after both of its stages. Raises CheckpointError."""
        if self.given is not None:
            given = checkpoint.load(self.given, layouts.AUTOENCODER)
            return checkpoint.build(given, dtype=torch.float32, device=self.processes.device)
        if self.processes.world_size > 1 or self.recipe.stages["autoencoder"].micro_batch:
            raise ValueError(
                "the auto-encoder trains as one process, without micro-batches; then pass it: --autoencoder FILE"
            )
        model = Autoencoder(recipes.DEMO_AUTOENCODER)
        initialise(model, SEED)
        steps = self.recipe.stages["autoencoder"].steps
        folded = self._train(autoencoder.WholeStage(model, data.images, steps, self.pool)).eval()
        starts = range(0, min(1000, self.pool), 50)
        probe = [data.images(range(start, start + 50)).to(self.processes.device) for start in starts]
        autoencoder.fold(folded, *autoencoder.latent_statistics(folded, probe))
        stage = autoencoder.DecoderStage(folded, data.images, self.pool)
        stage.settings |= {"encoder": data.weights_fingerprint(folded.encoder)}
        folded.decoder = self._train(stage)
        return folded.eval().requires_grad_(False)

    @functools.cached_property
    def latents(self) -> data.SceneLatents:
        """Encoded once for the teacher and the student."""
        model = self.autoencoder
        with self.processes.main_process_first():
            return data.SceneLatents(model, self.out / "latents", self.pool)

    def gemma(self) -> Gemma:
        """The text encoder as the teacher's training finds it."""
        model = CaptioningModel(fresh_gemma(SEED))
        initialise(model.heads, SEED)
        return self._train(CaptioningStage(model, self.prompts, self.pool)).gemma

    def teacher(self) -> Captioned:
        config = dataclasses.replace(recipes.DEMO_TRANSFORMER, guidance_embed=False)
        transformer = SanaTransformer(config)
        initialise(transformer, SEED)
        gemma = self.gemma()
        model = Captioned(transformer, gemma, self.prompts)
        stage = TeacherStage(model, self.latents, recipes.DEMO_FLOW_SHIFT, self.preview)
        stage.settings |= {"text_encoder": data.weights_fingerprint(gemma)}
        return self._train(stage).eval().requires_grad_(False)

    def student(self) -> tuple[Captioned, SanaTransformer]:
        """The teacher and its student."""
        teacher = self.teacher()
        stage = DistillStage(teacher, self.latents, self.recipe.objective, self.preview, start=self.start)
        begun = stage.modules["student"].transformer
        stage.settings |= {"teacher": data.weights_fingerprint(teacher), "student": data.weights_fingerprint(begun)}
        return teacher, self._train(stage).transformer.eval()

    @property
    def preview(self) -> Preview:
        """Held-out prompts, one or two of each category."""
        shown = [prompt.text for name in captions.CATEGORIES for prompt in examples.prompts(name, 2)]
        model = self.autoencoder
        decode = lambda latents: autoencoder.displayed(model.decode(latents / SCALE))  # noqa: E731
        return Preview(shown, self.latents.latents.shape[1:], decode)

    def _train(self, stage: Stage[Averaged]) -> Averaged:
        return Trainer(stage, self.recipe.stages[stage.name], self.out, SEED, self.processes).train()

    def export_features(self, folder: Path, command: str) -> list[Path]:
        """Train and write the feature network of features.py."""
        model = FeatureNetwork(features.QUESTIONS)
        initialise(model, SEED)
        trained = self._train(features.FeatureStage(model, self.pool))
        path = folder / "features.safetensors"
        tensors = {name: tensor.detach().half().cpu() for name, tensor in trained.state_dict().items()}
        tensorfile.write(path, tensors, {"provenance": json.dumps(_provenance(command))})
        return [path]

    def export_autoencoder(self, folder: Path, command: str) -> list[Path]:
        """Write the DC-AE alone, for another run to start from."""
        path = folder / "autoencoder.safetensors"
        checkpoint.save(path, [self._part("autoencoder", self.autoencoder, {})], _provenance(command))
        return [path]

    def export(self, folder: Path, command: str) -> list[Path]:
        """Write the model as native files: the student with its encoder and DC-AE, and the teacher."""
        vae = self.autoencoder
        teacher, student = self.student()
        if self.processes.rank:
            return []
        described = {"instruction": None, "max_tokens": MAX_TOKENS, "lower": False}
        encoder = self._part(
            "text_encoder", teacher.gemma, {"text": described}, tokenizer_state(self.prompts.tokenizer)
        )
        sizes = {"size_px": recipes.DEMO_PX, "flow_shift": recipes.DEMO_FLOW_SHIFT}
        seen = preview.fit(vae, (data.images(range(start, start + 50)) for start in range(0, min(500, self.pool), 50)))
        colours = {preview.SETTING: dataclasses.asdict(seen.factors())}
        parts = [self._part("transformer", student, sizes), encoder, self._part("autoencoder", vae, colours)]
        paths = [folder / "sana_sprint_tiny.safetensors", folder / "sana_tiny_teacher.safetensors"]
        checkpoint.save(paths[0], parts, _provenance(command))
        checkpoint.save(paths[1], [self._part("transformer", teacher.transformer, sizes)], _provenance(command))
        return paths

    def _part(self, kind: str, model: torch.nn.Module, settings: dict, extras: dict | None = None):
        tensors = {name: tensor.detach().half().cpu() for name, tensor in model.state_dict().items()}
        return checkpoint.Weights(kind, model.config, tensors, self.out, settings, extras or {})


def _provenance(command: str) -> dict:
    return {"source": "trained from nothing on sprint_core.shapes.scenes", "command": command}
