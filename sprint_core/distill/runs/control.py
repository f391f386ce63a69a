"""Training a ControlNet on a SANA-Sprint: the trunk frozen, copies of its first blocks learn to read a control image.

    image -> edges -> latent (hint) ; sCM and LADD as for the student, of trunk and branch together

No multi-step teacher knows the hint. So the trajectory of sCM is the image's own, dx_t/dt = cos t z - sin t x0,
whose mean over all images with such a hint and caption is the true velocity (consistency training, arXiv
2410.11081, section 3.2); and the critic's heads sit on the frozen trunk.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...images import edges
from ...latent import SCALE
from ...models import controlnet
from ...models.transformer import SanaTransformer
from ...shapes import captions, examples
from ...shapes import scenes as shapes
from ...text.loading import find_tokenizer, prompt_format
from ...text.prompts import PromptTokenizer
from ...weights import checkpoint, layouts, part, presets, tensorfile
from ...weights.checkpoint import CheckpointError
from ..dataset import scenes
from ..dataset.batch import Dataset, weights_fingerprint
from ..dataset.captioned import captioned
from ..dataset.latent_cache import LatentCache
from ..dataset.scene_latents import SceneLatents, encode_controlled_scenes
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from ..recipes import Recipe
from ..stages.base import Captioned, Embed, Embedded, Preview
from ..stages.control import ControlStage
from .encoders import DataOptions, load_encoders
from .run import Run, cpu_tensors
from .shapes import scaled_decoder

SEED = 42
POOL = 8000  # scenes
EDGES_VERSION = 1  # of how control images are made: encoded ones of another are made anew


@dataclass(frozen=True)
class ControlSources:
    """A SANA-Sprint with its other parts, and what the ControlNet is to be trained on."""

    student: Path
    autoencoder: Path
    text_encoder: Path
    images: Path | None = None  # None: scenes
    sprites: Path | None = None  # of scenes of emoji (emoji/art.py)
    hed: Path | None = None  # finds the edges of images; None: without weights
    branch: Path | None = None  # a ControlNet to train on from
    data: DataOptions = field(default_factory=DataOptions)


class ControlRun(Run):
    """A run of a control recipe. Raises ValueError, CheckpointError or OSError where it cannot be."""

    embed: Embed | None = None  # encodes captions that the dataset holds as texts

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        sources: ControlSources,
        pool: int = POOL,
        processes: ProcessGroup = SINGLE_PROCESS,
    ):
        super().__init__(out, recipe, processes, SEED)
        self.sources, self.pool = sources, pool
        self.trunk = checkpoint.load(sources.student, layouts.TRANSFORMER)
        if not self.trunk.config.guidance_embed:
            raise CheckpointError(f"{sources.student}: a multi-step SANA; a ControlNet is trained on a SANA-Sprint")
        self.text_encoder = checkpoint.load(sources.text_encoder, layouts.TEXT_ENCODER)
        if self.text_encoder.config.width != self.trunk.config.caption_width:
            raise CheckpointError(
                f"{sources.text_encoder}: embeddings of width {self.text_encoder.config.width}; {sources.student} "
                f"reads {self.trunk.config.caption_width}: choose the text encoder that it was trained with"
            )
        self.branch = self._load_branch(sources.branch) if sources.branch else None
        if sources.images is not None:
            captioned(sources.images)

    def _load_branch(self, path: Path) -> checkpoint.Weights[controlnet.ControlNetConfig, controlnet.SanaControlNet]:
        """A ControlNet to train on from. Raises CheckpointError if it is not of this trunk."""
        weights = checkpoint.load(path, layouts.CONTROLNET)
        shared = controlnet.shared_tensors(self.trunk.tensors, weights.config.wiring)
        own = {k: v for k, v in weights.tensors.items() if k.startswith(controlnet.SHARED)}
        if tensorfile.hash_of(own) != tensorfile.hash_of(shared):
            raise CheckpointError(f"{path}: a ControlNet of another model than {self.sources.student}")
        return weights

    def encode_dataset(self) -> Dataset:
        """Latents of scenes or of the user's images, and of their control images."""
        if self.sources.images is None:
            autoencoder = self.load_autoencoder(self.sources.autoencoder)
            with self.processes.main_process_first():
                return encode_controlled_scenes(autoencoder, self.out, self.pool)
        hed = edges.load_hed(self.sources.hed).to(self.device) if self.sources.hed else None

        @torch.inference_mode()
        def control(images: Tensor, scribbles: Tensor) -> Tensor:
            return scenes.control_images(images.to(self.device), hed, scribbles)

        fingerprint = f"edges {EDGES_VERSION} {weights_fingerprint(hed) if hed else ''}"
        size_px = self.trunk.settings["size_px"]
        parts, data = (self.sources.autoencoder, self.sources.text_encoder), self.sources.data
        encoders = load_encoders(*parts, size_px, data, self.device)
        self.embed = encoders.embed
        items, folder = captioned(self.sources.images), self.out / "encoded"
        return encoders.encode(items, folder, control, fingerprint, self.processes)

    def train_branch(self, dataset: Dataset) -> controlnet.SanaControlNet:
        """The ControlNet, trained to the end."""
        transformer = self.build_copy(self.trunk)
        branch = None if self.branch is None else self.build_copy(self.branch)
        if isinstance(dataset, LatentCache):
            trunk = Embedded(transformer, dataset.null, self.embed)
        else:
            trunk = self._with_text_encoder(transformer)
        preview = self._preview() if isinstance(dataset, SceneLatents) else None
        schedule = self.recipe.stages["control"]
        stage = ControlStage(trunk, dataset, self.recipe.objective, preview, schedule.activation_checkpointing, branch)
        stage.settings |= {
            "trunk": weights_fingerprint(transformer),
            "text_encoder": tensorfile.hash_of(self.text_encoder.tensors),
        }
        if branch is not None:
            stage.settings |= {"branch": weights_fingerprint(branch)}
        return self.train(stage).branch

    def _with_text_encoder(self, transformer: SanaTransformer) -> Captioned:
        gemma = checkpoint.build(self.text_encoder, dtype=torch.float32, device=self.device)
        prompts = PromptTokenizer(find_tokenizer(self.text_encoder), prompt_format(self.text_encoder))
        return Captioned(transformer, gemma, prompts)

    def _preview(self) -> Preview:
        """Held-out scenes, one or two of each category, from their control images."""
        shown = [prompt for name in captions.CATEGORIES for prompt in examples.prompts(name, 2, free=True)]
        control = scenes.control_images(scenes.as_tensor(shapes.render(prompt.scene) for prompt in shown))
        autoencoder = self.load_autoencoder(self.sources.autoencoder)
        with torch.no_grad():
            hints = autoencoder.encode(control.to(self.device)) * SCALE
        texts = [prompt.text for prompt in shown]
        return Preview(texts, tuple(hints.shape[1:]), scaled_decoder(autoencoder), hints)

    def export(self, branch: controlnet.SanaControlNet, command: str) -> list[Path]:
        """Write the ControlNet, beside the bundled model what it has of its own alone; in fp16 if its trunk is."""
        bundled = self.sources.student.resolve() == presets.BUNDLED.resolve()
        path = self.out / ("sana_controlnet_tiny.safetensors" if bundled else "sana_controlnet.safetensors")
        # What it shares with an fp16 trunk would be other weights in bf16.
        is_fp16 = part.majority_dtype(self.trunk.tensors) == torch.float16
        tensors = cpu_tensors(branch, torch.float16 if is_fp16 else torch.bfloat16)
        settings = {}
        if bundled:
            shared = controlnet.shared_tensors(self.trunk.tensors, branch.config.wiring)
            settings = {"trunk": presets.BUNDLED.name, "trunk_hash": tensorfile.hash_of(shared)}
            tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
        provenance = {"source": f"trained on {self.sources.student.name}", "command": command}
        weights = checkpoint.Weights(layouts.CONTROLNET, branch.config, tensors, path, settings)
        checkpoint.save(path, [weights], provenance)
        return [path]
