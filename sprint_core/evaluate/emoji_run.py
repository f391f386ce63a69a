"""Evaluating a model of the emoji world: everything painted and judged, and the JSON document."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import messages
from ..emoji import captions, templates
from ..emoji.art import Art
from ..emoji.captions import Prompt
from ..pipeline import Pipeline
from ..shapes import captions as shape_captions
from . import contrastive, emoji, frechet, records, scoring
from .contrastive import ContrastiveNetwork
from .emoji import Score
from .scoring import TEACHER_STEPS, Painter

log = messages.logger(__name__)

SIDE_SHARE = 5  # a fifth as many short prompts, and of shapes
TRUE, CEILING = "true", "ceiling"  # columns
TEACHER = f"teacher{TEACHER_STEPS}"


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and with what. painters: by step count, and the teacher, if it is at hand.

    extractor: of the Frechet distance; None: the contrastive network of features_file, which also gives the second
    opinion. art: the true one; None: as coarse as
    the thumbnails beside the model. among: numbers of the concepts that the model knows.
    """

    pipeline: Pipeline
    painters: Mapping[str, Painter]
    count: int
    seed: int
    extractor: frechet.Extractor | None = None
    art: Art | None = None
    features_file: Path = contrastive.FILE
    records_file: Path = records.FILE
    among: Sequence[int] = captions.ALL

    def run(self, record: bool = False) -> tuple[dict, dict[str, Score], Sequence[Prompt]]:
        """The JSON document, the scores of every column, and the prompts. record: write records_file.

        Raises OSError and ValueError on bad thumbnails or records.
        """
        drawings, kept = self.art or templates.load().art(), records.load(self.records_file)
        prompts = captions.prompts(self.count, self.seed, emoji.SPLIT, self.among)
        images = emoji.true_images(prompts, drawings, self.seed)
        passed = emoji.round_trip(self.pipeline, images)
        scores = {TRUE: emoji.judged(images, prompts), CEILING: emoji.judged(passed, prompts)}
        scores |= {label: emoji.score(paint, prompts, self.seed, label) for label, paint in self.painters.items()}
        network = self._network()
        moments = self._moments(scores, network)
        teacher = emoji.over(scores[TEACHER].share, scores[CEILING].share) if TEACHER in scores else None
        if record:
            records.save(records.make(teacher, self._features, moments[TRUE] if moments else None), self.records_file)
        result = self._shares(scores) | {
            "teacher20": kept.teacher20 if kept and teacher is None else teacher,
            "frechet": self._distances(moments, kept, scores),
            "retrieval": self._retrieval(scores, prompts, network),
            "rows": emoji.rows(scores, prompts),
            "prompts": self.count,
            "world": "emoji",
            "concepts": len(self.among),
            "art": "sprites" if self.art else "thumbnails",
        }
        return result, scores, prompts

    def _shares(self, scores: Mapping[str, Score]) -> dict:
        """By step count, each over the ceiling; of short prompts and of shapes as they are."""
        steps, ceiling = [label for label in self.painters if label != TEACHER], scores[CEILING].share
        short = self._side(
            emoji.score, emoji.short_prompts(-(-self.count // SIDE_SHARE), self.seed, self.among), "short", steps
        )
        of_shapes = max(len(shape_captions.CATEGORIES), self.count // SIDE_SHARE)
        plain = self._side(scoring.score, scoring.balanced_prompts(of_shapes, self.seed), "shapes", steps)
        return {
            "judge": {label: emoji.over(scores[label].share, ceiling) for label in steps},
            "ceiling": round(ceiling, 4),
            "short": min(short.values()),
            "short_by_steps": short,
            "shapes": plain,
        }

    def _side(self, score, prompts: Sequence, name: str, steps: Iterable[str]) -> dict[str, float]:
        shares = {n: score(self.painters[n], prompts, self.seed, f"{name}, {n}").share for n in steps}
        return {n: round(share, 4) for n, share in shares.items()}

    @property
    def _features(self) -> str | None:
        """Tells the feature network of the file; None where another is used."""
        is_bundled = self.extractor is None and self.features_file.is_file()
        return hashlib.sha256(self.features_file.read_bytes()).hexdigest() if is_bundled else None

    def _network(self) -> ContrastiveNetwork | None:
        """None, and a warning, where there is none."""
        try:
            return contrastive.load(self.features_file)
        except ValueError as error:
            log.warning("no second opinion on what is shown: %s", error)
            return None

    def _moments(
        self, scores: Mapping[str, Score], network: ContrastiveNetwork | None
    ) -> dict[str, frechet.Moments] | None:
        """Of each column's features; None, and a warning, where there is no network or are too few images."""
        extractor = self.extractor or (network and network.image.features)
        if extractor is None:
            return None
        try:
            features = {label: _extract(extractor, one.images) for label, one in scores.items()}
            return {label: frechet.moments(those) for label, those in features.items()}
        except ValueError as error:
            log.warning("no Frechet distance: %s", error)
            return None

    def _retrieval(
        self, scores: Mapping[str, Score], prompts: Sequence[Prompt], network: ContrastiveNetwork | None
    ) -> dict[str, dict[str, float]] | None:
        """Of each column: how often the contrastive network finds an image's prompt among all of them."""
        if network is None:
            return None
        tokenizer = self.pipeline.text_encoder.prompts
        tokens = contrastive.padded([tokenizer.tokens(prompt.text).ids for prompt in prompts])
        return {label: contrastive.recall(network, one.images, tokens) for label, one in scores.items()}

    def _distances(
        self, moments: Mapping[str, frechet.Moments] | None, kept: records.Records | None, labels: Iterable[str]
    ) -> dict[str, float | None]:
        """Frechet distances to the true images; None, and a warning, where their features are not at hand."""
        labels, true = [label for label in labels if label != TRUE], None
        if moments and self.art:
            true = moments[TRUE]
        elif kept and kept.features and kept.features == self._features:
            true = kept.moments
        if moments is None or true is None:
            if moments:
                log.warning("no Frechet distance: it needs the true art, --sprites FILE, or records made with it")
            return dict.fromkeys(labels)
        return {label: round(frechet.distance(moments[label], true), 4) for label in labels}


def _extract(network: frechet.Extractor, images: Tensor) -> Tensor:
    """Of images [n, h, w, 3] uint8."""
    return frechet.extract(lambda batch: network(batch.float() / 255.0), images)
