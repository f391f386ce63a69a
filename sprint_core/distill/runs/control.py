"""Training a ControlNet on a SANA-Sprint: the trunk frozen, copies of its first blocks learn to read a control image.

    picture -> edges -> latent (hint) ; sCM and LADD as for the student, of trunk and branch together

No multi-step teacher knows the hint. So the trajectory of sCM is the picture's own, dx_t/dt = cos t z - sin t x0,
whose mean over all pictures with such a hint and caption is the true velocity (consistency training, arXiv
2410.11081, section 3.2); and the critic's heads sit on the frozen trunk.
"""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...images import edges
from ...latent import SCALE
from ...models import controlnet
from ...models.autoencoder import Autoencoder
from ...models.transformer import SanaTransformer
from ...shapes import captions, examples, scenes
from ...text.loading import find_tokenizer, prompt_format
from ...text.prompts import PromptTokenizer
from ...weights import checkpoint, layouts, presets, tensorfile
from ...weights.checkpoint import CheckpointError
from ..dataset import scenes as data
from ..dataset.captioned import captioned
from ..dataset.latent_cache import EncodedPictures
from ..engine.processes import SINGLE_PROCESS, ProcessGroup
from ..engine.trainer import Trainer
from ..recipes import Recipe
from ..stages.autoencoder import displayed
from ..stages.base import Captioned, Embedded, Preview, TextConditioned
from ..stages.control import ControlStage
from .published import encode_pictures

SEED = 42
POOL = 8000  # scenes of the demo's
EDGES_VERSION = 1  # of how control images are made: encoded ones of another are made anew


@dataclass(frozen=True)
class ControlSources:
    """A SANA-Sprint with its other parts, and what the ControlNet is to be trained on."""

    student: Path
    autoencoder: Path
    text_encoder: Path
    pictures: Path | None = None  # None: scenes
    hed: Path | None = None  # of the edges; None: without weights
    branch: Path | None = None  # a ControlNet to train on from


class ControlRun:
    """A run in one folder. Raises ValueError, CheckpointError or OSError before the first step where it cannot be."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        sources: ControlSources,
        pool: int = POOL,
        processes: ProcessGroup = SINGLE_PROCESS,
    ):
        self.out, self.recipe, self.sources, self.pool, self.processes = Path(out), recipe, sources, pool, processes
        self.given = checkpoint.load(sources.student, layouts.TRANSFORMER)
        if not self.given.config.guidance_embed:
            raise CheckpointError(f"{sources.student}: a multi-step SANA; a ControlNet is trained on a SANA-Sprint")
        self.encoder = checkpoint.load(sources.text_encoder, layouts.TEXT_ENCODER)
        if self.encoder.config.width != self.given.config.caption_width:
            raise CheckpointError(
                f"{sources.text_encoder}: embeddings of {self.encoder.config.width} numbers; {sources.student} reads "
                f"{self.given.config.caption_width}: choose the text encoder that it was trained with"
            )
        self.hed = edges.load_hed(sources.hed) if sources.hed else None
        self.begun = self._begun() if sources.branch else None
        self.items = captioned(sources.pictures) if sources.pictures else None

    def _begun(self) -> controlnet.SanaControlNet:
        """The given ControlNet. Raises CheckpointError if it is not of this trunk."""
        weights = checkpoint.load(self.sources.branch, layouts.CONTROLNET)
        same = tensorfile.hash_of(controlnet.shared_tensors(self.given.tensors, weights.config.wiring))
        own = {k: v for k, v in weights.tensors.items() if k.startswith(controlnet.SHARED)}
        if tensorfile.hash_of(own) != same:
            raise CheckpointError(f"{self.sources.branch}: a ControlNet of another model than {self.sources.student}")
        return copy.deepcopy(checkpoint.build(weights, dtype=torch.float32, device=self.processes.device))

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        weights = checkpoint.load(self.sources.autoencoder, layouts.AUTOENCODER)
        return checkpoint.build(weights, dtype=torch.float32, device=self.processes.device)

    def branch(self) -> controlnet.SanaControlNet:
        """Trained to the end."""
        mapped = checkpoint.build(self.given, dtype=torch.float32, device=self.processes.device)
        transformer = copy.deepcopy(mapped)  # out of its file
        trunk, pictures, preview = (self._of_scenes if self.items is None else self._of_pictures)(transformer)
        schedule = self.recipe.stages["control"]
        stage = ControlStage(
            trunk, pictures, self.recipe.objective, preview, schedule.activation_checkpointing, self.begun
        )
        stage.settings |= {
            "trunk": data.weights_fingerprint(transformer),
            "text_encoder": tensorfile.hash_of(self.encoder.tensors),
        }
        if self.begun is not None:
            stage.settings |= {"branch": data.weights_fingerprint(self.begun)}
        return Trainer(stage, schedule, self.out, SEED, self.processes).train().branch.eval()

    def _of_scenes(self, transformer: SanaTransformer) -> tuple[TextConditioned, data.ControlledScenes, Preview]:
        gemma = checkpoint.build(self.encoder, dtype=torch.float32, device=self.processes.device)
        prompts = PromptTokenizer(find_tokenizer(self.encoder), prompt_format(self.encoder))
        with self.processes.main_process_first():
            pictures = data.ControlledScenes(self.autoencoder, self.out, self.pool)
        shown = [prompt for name in captions.CATEGORIES for prompt in examples.prompts(name, 2, free=True)]
        control = data.control_images(data.pixels_of(scenes.render(prompt.scene) for prompt in shown))
        with torch.no_grad():
            hints = self.autoencoder.encode(control.to(self.processes.device)) * SCALE
        model = self.autoencoder
        decode = lambda latents: displayed(model.decode(latents / SCALE))  # noqa: E731
        preview = Preview([prompt.text for prompt in shown], hints.shape[1:], decode, hints)
        return Captioned(transformer, gemma, prompts), pictures, preview

    def _of_pictures(self, transformer: SanaTransformer) -> tuple[TextConditioned, EncodedPictures, None]:
        device = self.processes.device
        hed = self.hed.to(device) if self.hed else None

        @torch.inference_mode()
        def control(images: Tensor) -> Tensor:
            return data.control_images(images.to(device), hed)

        made_by = f"edges {EDGES_VERSION} {data.weights_fingerprint(hed) if hed else ''}"
        vae, size_px = checkpoint.load(self.sources.autoencoder, layouts.AUTOENCODER), self.given.settings["size_px"]
        folder = self.out / "encoded"
        pictures = encode_pictures(self.items, folder, vae, self.encoder, size_px, self.processes, control, made_by)
        return Embedded(transformer, pictures.null), pictures, None

    def export(self, branch: controlnet.SanaControlNet, command: str) -> list[Path]:
        """Write the ControlNet: beside the bundled model what it has of its own in fp16, else whole in bf16."""
        bundled = self.sources.student.resolve() == presets.BUNDLED.resolve()
        path = self.out / ("sana_controlnet_tiny.safetensors" if bundled else "sana_controlnet.safetensors")
        dtype = torch.float16 if bundled else torch.bfloat16
        tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in branch.state_dict().items()}
        settings = {}
        if bundled:
            shared = controlnet.shared_tensors(self.given.tensors, branch.config.wiring)
            settings = {"trunk": presets.BUNDLED.name, "trunk_hash": tensorfile.hash_of(shared)}
            tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
        provenance = {"source": f"trained on {self.sources.student.name}", "command": command}
        part = checkpoint.Weights(layouts.CONTROLNET, branch.config, tensors, path, settings)
        checkpoint.save(path, [part], provenance)
        return [path]
