"""Rows to images: what every engine has in each of its processes. `Generate(settings, device)(rows)` does it all.

prepare: rows -> embeddings, start and control images      what cannot be made is left out, with the reason
paint:   these -> images                                    steps, decoding
pack:    one image -> the files of its row                  JPEG, WebP or PNG; caption; what it was made with
"""

import contextlib
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .. import trigflow
from ..devices import DTYPES
from ..images import edges, sizes
from ..images import files as image_files
from ..latent import DOWNSCALE
from ..models.nag import NAG
from ..pipeline import MAX_GUIDANCE, MULTISTEP, Caption, Control, Pipeline
from ..weights import checkpoint, layouts, presets, tensorfile
from .plan import batches
from .rows import Row

IMAGE_FORMATS = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
STEPS = 2
MOST_STEPS = 1000  # of a multi-step model
VERSION = re.compile(r'^version = "(.+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Settings:
    """What all images of a job are made with; rows say the rest. The fields are the options of the command line."""

    model: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    control_model: str | None = None
    average: bool = False
    dtype: str | None = None
    schedule: str = "auto"
    strength: float = 0.6
    negative_scale: float = NAG().scale
    control_strength: float = 1.0
    edges: str = "soft"
    image_format: str = "jpg"
    quality: int = 95
    batch: int = 8
    folder: str = "."  # that paths in rows start from

    def check_steps(self, steps: int, is_multistep: bool) -> None:
        """Raises ValueError where there is no schedule of so many steps."""
        if not is_multistep:
            trigflow.sigmas(self.schedule, steps)
        elif self.schedule != "auto":
            raise ValueError(f"--schedule {self.schedule}: of SANA-Sprint; a multi-step model has its own")
        elif not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"a multi-step model has 1 to {MOST_STEPS} steps, not {steps}")

    @property
    def path(self) -> Path:
        """Of the model. Raises CheckpointError."""
        return presets.BUNDLED if self.model is None else presets.find_model(self.model)

    def is_multistep(self) -> bool:
        """Whether the model is a multi-step one, such as a teacher. Raises CheckpointError."""
        source = checkpoint.Source(self.path, self.average)
        return not checkpoint.load(source, layouts.TRANSFORMER).config.guidance_embed

    def weights_hash(self) -> str:
        """Of all weights that images are made with, whatever file they lie in. Raises CheckpointError."""
        source = checkpoint.Source(self.path, self.average)
        parts = {
            layouts.TRANSFORMER: None,
            layouts.AUTOENCODER: self.vae,
            layouts.TEXT_ENCODER: self.text_encoder,
        }
        digest = hashlib.sha256()
        for layout, other in parts.items():
            digest.update(tensorfile.hash_of(checkpoint.load(other or source, layout).tensors).encode())
        if self.control_model:
            digest.update(tensorfile.hash_of(checkpoint.load(self.control_model, layouts.CONTROLNET).tensors).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Failure:
    """A row of which no image was made. kind: one of few, such as "size", to be counted; reason: a sentence."""

    row: int
    id: str
    kind: str
    reason: str


class Unusable(ValueError):
    """Why a row cannot be made."""

    def __init__(self, kind: str, reason: object):
        super().__init__(str(reason))
        self.kind = kind


@dataclass
class Prepared:
    """What the steps start from: rows, and of each its embeddings and images. Rows without are in `failures`."""

    rows: list[Row]
    failures: list[Failure]
    caption: Caption | None = None
    negative: Caption | None = None
    image: Tensor | None = None  # [b, h, w, 3] in [0, 1]
    control: Tensor | None = None


@dataclass
class Painted:
    """Images of rows, [b, h, w, 3] in 8 bits, and the rows without one."""

    rows: list[Row]
    images: np.ndarray
    failures: list[Failure] = field(default_factory=list)


class Generate:
    """A model on a device, and rows -> images with it. Its results depend on the settings and the rows alone."""

    def __init__(self, settings: Settings, device: str = "cpu", weights_hash: str = ""):
        self.settings, self.weights_hash = settings, weights_hash or settings.weights_hash()
        self.version = pack_version()
        self.nag = NAG(scale=settings.negative_scale)
        self.pipeline = Pipeline.load(
            settings.path,
            autoencoder=settings.vae,
            text_encoder=settings.text_encoder,
            dtype=DTYPES[settings.dtype] if settings.dtype else None,
            device=device,
            average=settings.average,
            multistep=True,
        )
        self.is_multistep = self.pipeline.flow_shift is not None
        self.pipeline.text_encoder.cache.embeddings.slots = (
            2  # a batch does not come again, but its negative prompt does
        )
        self._encoding = threading.Lock()
        self._control = None

    def __call__(self, rows: Sequence[Row]) -> tuple[list[dict[str, bytes]], list[Failure]]:
        """The files of each image by their endings, as `pack` makes them, in the order of batches; and what failed."""
        samples, failures = [], []
        for batch in batches(rows, self.settings.batch):
            painted = self.paint(self.prepare(batch))
            samples += [self.pack(row, image) for row, image in zip(painted.rows, painted.images, strict=True)]
            failures += painted.failures
        return samples, failures

    @torch.inference_mode()
    def prepare(self, batch: Sequence[Row]) -> Prepared:
        """Check rows of one bucket, read their images and encode their texts."""
        rows, images, controls, failures = [], [], [], []
        for row in map(self._complete, batch):
            try:
                self._check(row)
                images.append(self._read(row, "image", "white"))
                controls.append(self._read(row, "control", "black"))
                rows.append(row)
            except Unusable as error:
                del images[len(rows) :]
                failures.append(Failure(row.number, row.id, error.kind, str(error)))
        prepared = Prepared(rows, failures)
        if not rows:
            return prepared
        with self._encoding:
            prepared.caption = self.pipeline.embed([row.prompt for row in rows])
            if rows[0].negative is not None:
                prepared.negative = self.pipeline.embed([row.negative or "" for row in rows])
        prepared.image, prepared.control = _stacked(images), _stacked(controls)
        return prepared

    def paint(self, prepared: Prepared) -> Painted:
        """Make the images. Where all of them together fail, each is made alone. Raises ValueError out of memory."""
        rows, failures = prepared.rows, prepared.failures
        if not rows:
            return Painted([], np.zeros((0, 0, 0, 3), np.uint8), failures)
        try:
            images = self._generate(prepared)
            return Painted(rows, images.mul(255.0).round().to("cpu", torch.uint8).numpy(), failures)
        except torch.cuda.OutOfMemoryError as error:
            raise ValueError(f"--batch {self.settings.batch}: {str(error).splitlines()[0]} Take fewer") from None
        except ValueError as error:
            if len(rows) == 1:
                failure = Failure(rows[0].number, rows[0].id, "NaN", str(error))
                return Painted([], np.zeros((0, 0, 0, 3), np.uint8), [*failures, failure])
        alone = [self.paint(self.prepare([row])) for row in rows]
        kept = [one for one in alone if one.rows]
        images = np.concatenate([one.images for one in kept]) if kept else np.zeros((0, 0, 0, 3), np.uint8)
        failed = [failure for one in alone for failure in one.failures]
        return Painted([row for one in kept for row in one.rows], images, [*failures, *failed])

    def pack(self, row: Row, image: np.ndarray) -> dict[str, bytes]:
        """The files of a row, by their endings: image [h, w, 3] in 8 bits, caption, and all that it was made with."""
        file, kind = io.BytesIO(), self.settings.image_format
        quality = {} if kind == "png" else {"quality": self.settings.quality}
        Image.fromarray(image).save(file, IMAGE_FORMATS[kind], **quality)
        about = json.dumps(self.about(row), ensure_ascii=False).encode()
        return {kind: file.getvalue(), "txt": row.prompt.encode(), "json": about}

    def about(self, row: Row) -> dict:
        """What an image was made with."""
        optional = {"negative": row.negative, "image_from": row.image, "control_from": row.control}
        return {
            "id": row.id,
            "prompt": row.prompt,
            "seed": row.seed,
            "steps": row.steps,
            "guidance": row.guidance,
            "width": row.width,
            "height": row.height,
            **{name: value for name, value in optional.items() if value is not None},
            "model": self.weights_hash,
            "version": self.version,
        }

    def _complete(self, row: Row) -> Row:
        """With the model's own values where the row has none."""
        return replace(
            row,
            steps=(MULTISTEP if self.is_multistep else STEPS) if row.steps is None else row.steps,
            guidance=presets.GUIDANCE if row.guidance is None else row.guidance,
            width=row.width or self.pipeline.size_px,
            height=row.height or self.pipeline.size_px,
        )

    def _check(self, row: Row) -> None:
        """Raises Unusable."""
        assert row.width and row.height and row.steps is not None and row.guidance is not None  # see `_complete`
        with _of_kind("size"):
            if (near := sizes.round_size(row.width, row.height)) != (row.width, row.height):
                raise ValueError(
                    f"size {row.width}x{row.height}: both must be multiples of {DOWNSCALE}; {near[0]}x{near[1]} is near"
                )
        with _of_kind("steps"):
            self.settings.check_steps(row.steps, self.is_multistep)
        if not 0 < row.guidance <= MAX_GUIDANCE:
            raise Unusable("guidance", f"guidance is {row.guidance:g}; it must lie in (0, {MAX_GUIDANCE:g}]")
        for kind, text in {"prompt too long": row.prompt, "negative too long": row.negative or ""}.items():
            if unread := self.pipeline.text_encoder.prompts.unread_notice(text):
                raise Unusable(kind, unread)

    def _read(self, row: Row, column: str, background: str) -> Tensor | None:
        """The image that a column names, [1, h, w, 3] in [0, 1], its middle in the row's proportions."""
        name = getattr(row, column)
        if name is None:
            return None
        assert row.width and row.height
        with _of_kind(column):
            if self.is_multistep:
                raise ValueError("a multi-step model starts from noise, and without a control image")
            image = image_files.read(Path(self.settings.folder, name), column, background)
            pixels = image_files.pixels(ImageOps.fit(image, (row.width, row.height), Image.Resampling.LANCZOS))
            if column == "control" and self.settings.edges != "none":
                pixels = edges.detect(pixels, scribble=self.settings.edges == "scribble")
            return pixels

    @torch.inference_mode()
    def _generate(self, prepared: Prepared) -> Tensor:
        """[b, h, w, 3] in [0, 1]. Raises ValueError on NaN."""
        first = prepared.rows[0]
        assert prepared.caption and first.width and first.height and first.steps is not None
        size, guidance = (first.width, first.height), presets.GUIDANCE if first.guidance is None else first.guidance
        seeds, controls = [row.seed for row in prepared.rows], []
        if self.is_multistep:
            return self.pipeline.generate_multistep(
                prepared.caption, seeds=seeds, size=size, steps=first.steps, cfg=guidance, negative=prepared.negative
            )
        if prepared.control is not None:
            controls.append(Control(self._control_net(), prepared.control, self.settings.control_strength))
        return self.pipeline.generate(
            prepared.caption,
            seeds=seeds,
            size=size,
            steps=first.steps,
            schedule=self.settings.schedule,
            guidance=guidance,
            image=prepared.image,
            strength=1.0 if prepared.image is None else self.settings.strength,
            controls=controls,
            negative=prepared.negative,
            nag=self.nag,
        )

    @torch.inference_mode(False)  # in which weights would be others than those of any other command
    def _control_net(self):
        """Built when the first row asks for it."""
        if self._control is None:
            weights = checkpoint.load(self.settings.control_model or presets.BUNDLED_CONTROL, layouts.CONTROLNET)
            first = next(self.pipeline.transformer.parameters())
            self._control = checkpoint.build(weights, dtype=first.dtype, device=first.device)
        return self._control


def pack_version() -> str:
    """Of this pack, as its pyproject.toml says."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    version = VERSION.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return version[1] if version else "unknown"


def by_kind(failures: Iterable[Mapping]) -> dict[str, int]:
    """How many failures there are of each kind, the commonest first."""
    counts: dict[str, int] = {}
    for failure in failures:
        counts[failure["kind"]] = counts.get(failure["kind"], 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


@contextlib.contextmanager
def _of_kind(kind: str):
    try:
        yield
    except ValueError as error:
        raise Unusable(kind, error) from None


def _stacked(images: Sequence[Tensor | None]) -> Tensor | None:
    """[b, h, w, 3], or None where the rows have none."""
    return torch.cat([image for image in images if image is not None]) if images[0] is not None else None
