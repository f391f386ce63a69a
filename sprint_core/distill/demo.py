"""The bundled model, from nothing: every stage of it, and its export as native files.

    autoencoder -> fold -> decoder -> latents -> teacher -> distill -> export

Each stage resumes where it stopped; one that has ended costs nothing.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .. import checkpoint, scenes, text
from ..autoencoder import Autoencoder
from ..gemma import Gemma
from ..transformer import SanaTransformer
from . import autoencoder, data, recipes
from .recipes import Schedule
from .student import DistillStage, Recipe
from .teacher import Captioned, TeacherStage
from .trainer import Trainer

SEED = 0
POOL = 20_000  # training scenes
MAX_TOKENS = 24
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")

# stage -> how it learns; two CPU cores need about three hours for all of it
SCHEDULES = {
    "autoencoder": Schedule(steps=6000, batch=8, lr=5e-4),
    "decoder": Schedule(steps=3000, batch=6, lr=3e-4, decay=0.9),
    "teacher": Schedule(steps=12000, batch=32, lr=1e-3, decay=0.4),
    "distill": Schedule(steps=1600, batch=32, lr=3e-4, decay=0.3, betas=(0.9, 0.99), clip=0.5, ema=0.995),
}
DISTILLATION = Recipe(tangent_warmup_steps=300)
STAGES = tuple(SCHEDULES)


def tokenizer() -> text.HFTokenizer:
    """One token per word of the scenes' vocabulary, with Gemma's special tokens."""
    vocab = {piece: i for i, piece in enumerate((*SPECIAL, *scenes.VOCABULARY))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    letters = {"type": "Replace", "pattern": {"Regex": "[^a-z]+"}, "content": " "}
    description = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": piece, **flags} for i, piece in enumerate(SPECIAL)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, letters]},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    return text.HFTokenizer(json.dumps(description).encode())


class Demo:
    """A run in one folder. `schedules` may shorten stages, `pool` the data; `given`: a trained DC-AE to start from."""

    def __init__(
        self, out: Path, schedules: Mapping[str, Schedule] = SCHEDULES, pool: int = POOL, given: Path | None = None
    ):
        self.out, self.schedules, self.pool, self.given = Path(out), schedules, pool, given
        self.words = tokenizer()
        self.preset = text.TextPreset(instruction=None, max_tokens=MAX_TOKENS)

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The DC-AE with unit latents: the given one, or after both of its stages. Raises CheckpointError."""
        if self.given is not None:
            return checkpoint.build(checkpoint.load(self.given, "autoencoder"), dtype=torch.float32)
        model = Autoencoder(recipes.DEMO_AUTOENCODER)
        autoencoder.initialise(model, SEED)
        schedule = self.schedules["autoencoder"]
        stage = autoencoder.WholeStage(model, data.images, schedule.steps, self.pool)
        folded = Trainer(stage, schedule, self.out, SEED).train().eval()
        probe = [data.images(range(start, start + 50)) for start in range(0, min(1000, self.pool), 50)]
        autoencoder.fold(folded, *autoencoder.latent_statistics(folded, probe))
        schedule = self.schedules["decoder"]
        stage = autoencoder.DecoderStage(folded, data.images, self.pool)
        folded.decoder = Trainer(stage, schedule, self.out, SEED).train()
        return folded.eval().requires_grad_(False)

    @functools.cached_property
    def latents(self) -> data.SceneLatents:
        """Encoded once for the teacher and the student."""
        return data.SceneLatents(self.autoencoder, self.out / "latents", self.pool)

    def teacher(self) -> Captioned:
        config = dataclasses.replace(recipes.DEMO_TRANSFORMER, guidance_embed=False)
        gemma, prompts = Gemma(recipes.DEMO_TEXT), text.PromptTokenizer(self.words, self.preset)
        model = Captioned(SanaTransformer(config), gemma, prompts)
        autoencoder.initialise(model, SEED)
        stage = TeacherStage(model, self.latents.batch)
        return Trainer(stage, self.schedules["teacher"], self.out, SEED).train().eval().requires_grad_(False)

    def student(self) -> tuple[Captioned, SanaTransformer]:
        """The teacher and its student."""
        teacher = self.teacher()
        stage = DistillStage(teacher, self.latents.batch, DISTILLATION)
        trained = Trainer(stage, self.schedules["distill"], self.out, SEED).train()
        return teacher, trained.transformer.eval()

    def export_autoencoder(self, folder: Path, command: str) -> list[Path]:
        """Write the DC-AE alone, for another run to start from."""
        path = folder / "autoencoder.safetensors"
        checkpoint.save(path, [self._part("autoencoder", self.autoencoder, {})], _provenance(command))
        return [path]

    def export(self, folder: Path, command: str) -> list[Path]:
        """Write the model as native files: the student with its encoder and DC-AE, and the teacher."""
        vae = self.autoencoder
        teacher, student = self.student()
        described = {"instruction": None, "max_tokens": MAX_TOKENS, "lower": False}
        encoder = self._part("text_encoder", teacher.gemma, {"text": described}, text.tokenizer_state(self.words))
        sizes = {"size_px": recipes.DEMO_PX, "flow_shift": 1.0}
        parts = [self._part("transformer", student, sizes), encoder, self._part("autoencoder", vae, {})]
        paths = [folder / "sana_sprint_tiny.safetensors", folder / "sana_tiny_teacher.safetensors"]
        checkpoint.save(paths[0], parts, _provenance(command))
        checkpoint.save(paths[1], [self._part("transformer", teacher.transformer, sizes)], _provenance(command))
        return paths

    def _part(self, kind: str, model: torch.nn.Module, settings: dict, extras: dict | None = None):
        tensors = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
        return checkpoint.Weights(kind, model.config, tensors, self.out, settings, extras or {})


def _provenance(command: str) -> dict:
    return {"source": "trained from nothing on sprint_core.scenes", "command": command}
