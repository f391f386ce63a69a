"""What is measured: the networks of a model, each made when a part first needs it, and one call of every part."""

import functools
import random
import re
import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from sprint_core.emoji import captions
from sprint_core.emoji.concepts import common
from sprint_core.latent import DOWNSCALE, LATENT_CHANNELS, SCALE
from sprint_core.models import controlnet
from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.autoencoder_config import SANA
from sprint_core.models.gemma import Gemma, GemmaConfig
from sprint_core.models.layers import sdpa
from sprint_core.models.mapped import Mapped
from sprint_core.models.nag import NAG, join
from sprint_core.models.prepacked import Prepacked, prepack
from sprint_core.models.transformer import SanaTransformer
from sprint_core.pipeline import Pipeline
from sprint_core.text.encoder import TextEncoder
from sprint_core.text.formats import text_preset
from sprint_core.text.loading import find_tokenizer, prompt_format
from sprint_core.text.tokenizers import BOS, PAD, Span
from sprint_core.weights import checkpoint, layouts, presets

MODELS = {"demo": "", "0.6B": "sprint-0.6B", "1.6B": "sprint-1.6B"}
NOISIEST_S = 1.0  # where the only step of a one-step image lies
SHORT, LONG = 20, 298  # tokens of a prompt; with BOS and the instruction's last token SANA reads at most 300
BATCH = 4


class Words:
    """Stands in for Gemma's tokenizer, which is no part of random weights: a token for every word or sign.

    Ours by `encode`, and by a call what diffusers needs of transformers' tokenizers.
    """

    data = b"{}"
    state_key = "tokenizer_json"
    padding_side = "right"

    def __init__(self, size: int):
        self.size = size

    def encode(self, prompt: str) -> list[int]:
        return self.encode_spans(prompt)[0]

    def encode_spans(self, prompt: str) -> tuple[list[int], list[Span]]:
        words = list(re.finditer(r"\w+|[^\w\s]", prompt))
        ids = [8 + zlib.crc32(word[0].encode()) % (self.size - 8) for word in words]
        return [BOS, *ids], [(0, 0), *(word.span() for word in words)]

    def unknown(self, text: str) -> dict[str, list[str]]:
        return {}

    def __call__(self, prompts: Sequence[str], *, max_length: int, **_) -> SimpleNamespace:
        rows = [torch.tensor(self.encode(prompt)[:max_length]) for prompt in prompts]
        ids = torch.full((len(rows), max_length), PAD)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


@functools.cache
def _words() -> tuple[str, ...]:
    return captions.vocabulary(common())


def prompt_of(tokens: int, seed: int) -> str:
    """A prompt of that many words, which the bundled tokenizer knows, too; another one for every seed."""
    # As text, since Random(-1) is Random(1).
    return " ".join(random.Random(str(seed)).choices(_words(), k=tokens))


class Parts:
    """The parts that either side makes of its own `_text`, `_controlled`, `encode` and `images`."""

    def compilable(self, parts: Sequence[str]) -> list[nn.Module]:
        """The networks behind these parts that are worth compiling; prompts differ in length."""
        images, networks = {"total", "batch"} & set(parts), []
        if images or {"step", "negative", "control", "hint"} & set(parts):
            networks.append(self.transformer)
        if {"encode", "hint"} & set(parts):
            networks.append(self.autoencoder.encoder)
        if images or "decode" in parts:
            networks.append(self.autoencoder.decoder)
        if {"control", "hint"} & set(parts):
            networks.append(self.net)
        return networks

    def text(self, seed: int) -> Tensor:
        return self._text(SHORT, seed)

    def long_text(self, seed: int) -> Tensor:
        return self._text(LONG, seed)

    def same_text(self, seed: int) -> Tensor:
        return self._text(SHORT, 0)

    def hint(self, seed: int) -> Tensor:
        return self._controlled(seed, self.encode(seed) * SCALE)

    def total(self, seed: int) -> Tensor:
        return self.images(seed, 1)

    def batch(self, seed: int) -> Tensor:
        return self.images(seed, BATCH)


class Ours(Parts):
    """Our side. Every method is one call of a part, which a seed gives its inputs.

    Full-size networks have random weights. demo: the bundled model.
    """

    def __init__(self, model: str, size_px: int | None, device: torch.device, dtype: torch.dtype | None):
        self.model, self.preset = model, presets.PRESETS.get(MODELS[model])
        if self.preset:
            native_px = self.preset.size_px
        else:
            native_px = checkpoint.load(presets.BUNDLED, layouts.TRANSFORMER).settings["size_px"]
        self.size_px = size_px or native_px
        self.device = device
        self.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)

    # --- networks -----------------------------------------------------------------------------------

    @functools.cached_property
    def transformer(self) -> SanaTransformer:
        return self._made("transformer", lambda **how: SanaTransformer(self.preset.transformer, **how))

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        return self._made("autoencoder", lambda **how: Autoencoder(SANA, **how))

    @functools.cached_property
    def net(self) -> controlnet.SanaControlNet:
        """Of seven blocks, untrained: it costs what it costs and changes nothing."""
        if self.preset is None:
            return self._bundled(presets.BUNDLED_CONTROL, "controlnet")
        branch = controlnet.copy_trunk(self.transformer, controlnet.PUBLISHED_BLOCKS)
        prepack(branch)
        return branch.eval().requires_grad_(False)

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        if self.preset is None:
            weights = checkpoint.load(presets.BUNDLED, layouts.TEXT_ENCODER)
            gemma = checkpoint.build(weights, dtype=self.dtype, device=self.device)
            return TextEncoder(gemma, find_tokenizer(weights), prompt_format(weights))
        gemma = self._made("text_encoder", lambda **how: Gemma(GemmaConfig(), **how))
        gemma.model.embed_tokens.weight.mul_(gemma.config.width**-0.5)  # else the other weights would not matter
        return TextEncoder(
            gemma, Words(gemma.config.vocab), text_preset("diffusers")
        )  # the format that both sides know

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.transformer, self.autoencoder, self.text_encoder, self.size_px)

    def _made(self, kind: str, build: Callable[..., nn.Module]) -> nn.Module:
        if self.preset is None:
            return self._bundled(presets.BUNDLED, kind)
        torch.manual_seed(0)
        tensors = build(dtype=self.dtype, device=self.device).state_dict()
        ops = Mapped if layouts.PARTS[kind].stays_mapped else Prepacked  # as checkpoint.build makes them
        made = build(ops=ops, dtype=self.dtype, device="meta")
        made.load_state_dict(tensors, assign=True)
        prepack(made)
        return made.eval().requires_grad_(False)

    def _bundled(self, path, kind: str) -> nn.Module:
        return checkpoint.build(checkpoint.load(path, layouts.PARTS[kind]), dtype=self.dtype, device=self.device)

    # --- inputs -------------------------------------------------------------------------------------

    def cast(self, x: Tensor) -> Tensor:
        """As the networks take it."""
        return x.to(self.device, self.dtype)

    def normal(self, seed: int, *shape: int) -> Tensor:
        return self.cast(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))

    def latent(self, seed: int) -> Tensor:
        side = self.size_px // DOWNSCALE
        return self.normal(seed, 1, LATENT_CHANNELS, side, side)

    def inputs(self, seed: int) -> dict[str, Tensor]:
        one = torch.ones(1, device=self.device)
        caption = self.normal(seed, 1, SHORT + 2, self.transformer.config.caption_width)
        guidance = presets.GUIDANCE * one
        return {"x_s": self.latent(seed), "s": NOISIEST_S * one, "caption": caption, "guidance": guidance}

    def image(self, seed: int) -> Tensor:
        """[1, 3, h, w] in [-1, 1]: smooth, with some noise."""
        noise = torch.randn((1, 3, self.size_px, self.size_px), generator=torch.Generator().manual_seed(seed))
        return self.cast(torch.linspace(-0.9, 0.9, self.size_px) + 0.05 * noise)

    @functools.cached_property
    def kept_hint(self) -> Tensor:
        return self.autoencoder.encode(self.image(0)) * SCALE

    # --- parts --------------------------------------------------------------------------------------

    def _text(self, tokens: int, seed: int) -> Tensor:
        return self.text_encoder.encode([prompt_of(tokens, seed)])[0]

    def step(self, seed: int) -> Tensor:
        return self.transformer(**self.inputs(seed))

    def negative(self, seed: int) -> Tensor:
        inputs = self.inputs(seed)
        caption, avoided = inputs["caption"], self.inputs(-seed)["caption"]
        both, _ = join(caption, None, avoided, None)
        return self.transformer(**inputs | {"caption": both}, attention=NAG().around(sdpa, caption.shape[1]))

    def control(self, seed: int) -> Tensor:
        return self._controlled(seed, self.kept_hint)

    def _controlled(self, seed: int, hint: Tensor) -> Tensor:
        inputs = self.inputs(seed)
        return self.transformer(**inputs, control=self.net(hint=hint, **inputs))

    def encode(self, seed: int) -> Tensor:
        return self.autoencoder.encode(self.image(seed))

    def decode(self, seed: int) -> Tensor:
        return self.autoencoder.decode(self.latent(seed) / SCALE)

    def images(self, seed: int, count: int) -> Tensor:
        size = (self.size_px, self.size_px)
        prompts = [prompt_of(SHORT, seed)] * count
        return self.pipeline.generate(prompts, seeds=[seed + i for i in range(count)], size=size, steps=1)
