"""Gemma-2 with SANA's prompt format as ComfyUI's CLIP.

A stock CLIP object around a `cond_stage_model` and a tokenizer of our own, so that stock text nodes,
CLIP LoRA, saving and offloading apply. The tokens of one prompt travel as ComfyUI's pairs (id,
weight) plus one entry of ours that says which of them the transformer reads.
"""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ...sprint_core import messages
from ...sprint_core.models.gemma import Gemma
from ...sprint_core.text.encoder import PromptEmbeddingCache, encode_ids
from ...sprint_core.text.formats import TextPreset, text_preset
from ...sprint_core.text.loading import find_tokenizer, prompt_format
from ...sprint_core.text.prompts import PromptTokenizer, Tokens
from ...sprint_core.text.tokenizers import BOS, PAD, Tokenizer, decode, tokenizer_state
from ...sprint_core.weights import checkpoint, layouts, part
from ...sprint_core.weights.finite import first_and_count, is_finite, not_finite
from . import quantised, residence, screen, sources, writing
from .options import DEFAULT, LoaderOptions

log = messages.logger(__name__)

NAME = "gemma2_2b"  # ComfyUI's name for this encoder: in its files, and in its LoRA keys
SELECTION = "sana_selection"  # entry of a token dictionary: positions that the transformer reads
FORMATS = {"authors": "nvlabs", "diffusers": "diffusers"}
DEEPEST_BRACKETS = 100
HEAVIEST = 1e6  # weight of a word; far beyond what still paints, and far from what no type can hold
NO_NUMBER = "a weight in the prompt is not a finite number; write weights as (word:1.2)"
BYTES_PER_TOKEN = 4 * 2**20  # activations of one layer, generously


class SanaTokenizer:
    """ComfyUI's tokenizer protocol around the core's PromptTokenizer."""

    def __init__(self, tokenizer: Tokenizer, preset: TextPreset, weights: checkpoint.Weights):
        self.tokenizer = tokenizer
        self.preset = preset
        self.path = weights.path
        self.description = checkpoint.describe_tensor(weights)  # saved with the weights

    def tokenize_with_weights(
        self, string: str, return_word_ids: bool = False, sana_preset: TextPreset | None = None, **kwargs
    ) -> dict:
        """Pairs (id, weight) of instruction and prompt; `(a:1.2)` weighs the prompt's tokens.

        The log and the running node name what of a prompt is not known or not read.
        sana_preset: the TextPreset of SANA-Sprint Text Encode, instead of the loader's. skip_template, which nodes that
        generate text pass: the tokens are those to answer.
        """
        if "skip_template" in kwargs:
            ids, stop = writing.tokens_to_answer(self.tokenizer, self.path, string, **kwargs)
            return {NAME: [[(i, 1.0, n)[: 2 + return_word_ids] for n, i in enumerate(ids)]], writing.STOP: stop}
        prompts = PromptTokenizer(self.tokenizer, sana_preset or self.preset)
        string, weights = split_weights(string)
        tokens, spans = prompts.tokens_and_spans(string)
        notice = prompts.notice(string)
        if notice:
            log.warning("%s", notice)
            screen.hold(notice)
        else:
            screen.release()
        pairs = [(i, _weight_of(span, weights)) for i, span in zip(tokens.ids, spans, strict=True)]
        if return_word_ids:
            pairs = [(*pair, n) for n, pair in enumerate(pairs)]
        return {NAME: [pairs], SELECTION: (tokens.keep, prompts.instruction_ids)}

    def untokenize(self, token_weight_pair: list[tuple]) -> list[tuple[tuple, str]]:
        return [(pair, self.tokenizer.piece(pair[0])) for pair in token_weight_pair]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return decode(self.tokenizer, token_ids, marks=not skip_special_tokens)

    def state_dict(self) -> dict[str, Tensor]:
        """Saved beside the weights, under names that our loader finds again in any of ComfyUI's files."""
        entries = tokenizer_state(self.tokenizer) | {checkpoint.TENSOR_KEY: self.description}
        return {f"{NAME}.transformer.{name}": tensor for name, tensor in entries.items()}


def split_weights(string: str) -> tuple[str, list[float]]:
    """A prompt without ComfyUI's weight marks, and the weight of each of its characters. Raises ValueError."""
    marked = comfy.sd1_clip.escape_important(string)
    depth = max(itertools.accumulate((char == "(") - (char == ")") for char in marked), default=0)
    if depth > DEEPEST_BRACKETS:  # ComfyUI calls itself once for each
        raise ValueError(f"{depth} brackets in one another in the prompt, {DEEPEST_BRACKETS} are the most: remove some")
    parsed = comfy.sd1_clip.token_weights(marked, 1.0)
    parts = [(comfy.sd1_clip.unescape_important(part), weight) for part, weight in parsed]
    return "".join(part for part, _ in parts), [weight for part, weight in parts for _ in part]


def check_prompt(text: str) -> None:
    """Refuse brackets too deep and weights that are no numbers, as they are known before a run. Raises ValueError."""
    _require_weights(split_weights(text)[1])


def _require_weights(weights: list[float]) -> None:
    """Refuse weights that are no numbers, or so large that the model makes infinity of them. Raises ValueError."""
    if not all(map(math.isfinite, weights)):
        raise ValueError(NO_NUMBER)
    if (largest := max(map(abs, weights), default=0.0)) > HEAVIEST:
        raise ValueError(f"a weight in the prompt is {largest:g}, {HEAVIEST:g} is the most; write it as (word:1.2)")


def _weight_of(span: tuple[int, int] | None, weights: list[float]) -> float:
    """Weight of a token by the prompt characters [begin, end) it came from; None: instruction or BOS."""
    if span is None:
        return 1.0
    return next((w for w in weights[span[0] : span[1]] if w != 1.0), 1.0)


def preset_of(clip: comfy.sd.CLIP, instruction: str, custom: str, prompt_format: str) -> TextPreset:
    """The preset that SANA-Sprint Text Encode asks for, on top of the loaded encoder's own. Raises ValueError."""
    if not isinstance(clip.tokenizer, SanaTokenizer):
        raise ValueError("this CLIP was not loaded by this pack; use CLIP Text Encode for it")
    preset = clip.tokenizer.preset
    if prompt_format != "authors" and preset.instruction is not None:
        published = text_preset(FORMATS[prompt_format])
        preset = dataclasses.replace(preset, instruction=published.instruction, lower=published.lower)
    if instruction == "model default":
        return preset
    return dataclasses.replace(preset, instruction=custom if instruction == "custom" and custom else None)


class _Encoder(nn.Module):
    """Holds the network under the name that it has in ComfyUI's files: transformer."""

    transformer: Gemma

    def __init__(self, transformer: Gemma):
        super().__init__()
        self.transformer = transformer


class SanaTextModel(nn.Module):
    """What ComfyUI calls a cond_stage_model: token pairs in, conditioning out."""

    def __init__(
        self,
        weights: checkpoint.Weights,
        compute_dtype: torch.dtype,
        quant: dict | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict | None = None,
    ):
        super().__init__()
        mixed = quant and comfy.ops.mixed_precision_ops(quant, compute_dtype, full_precision_mm=True)
        ops = quantised.operations(mixed or comfy.ops.manual_cast)
        self.dtypes = {dtype}
        self.compute_dtype = compute_dtype
        self.path = weights.path
        setattr(self, NAME, _Encoder(Gemma(weights.config, ops=ops, dtype=dtype, device=device)))
        self.cache = PromptEmbeddingCache()
        self.hooked_weights = {}  # of the patcher that loaded it, not empty while LoRA hooks change weights in place
        self.reset_clip_options()

    @property
    def encoder(self) -> _Encoder:
        return getattr(self, NAME)

    def set_clip_options(self, options: dict) -> None:
        layer = options.get("layer", self.layer)
        self.layer = -1 if layer is None else layer
        self.device = options.get("execution_device", self.device)

    def reset_clip_options(self) -> None:
        self.layer, self.device = -1, None

    def load_sd(self, sd: dict[str, Tensor]):
        return self.encoder.transformer.load_state_dict(sd, strict=False, assign=getattr(self, "can_assign_sd", False))

    def memory_estimation_function(self, token_weight_pairs: dict, device: torch.device | None = None) -> int:
        return BYTES_PER_TOKEN * sum(len(pairs) for pairs in token_weight_pairs.get(NAME, ()))

    @functools.partial(screen.one_sentence, keep=True)  # what the tokenizer has shown
    def encode_token_weights(self, token_weight_pairs: dict) -> tuple[Tensor, None]:
        """Conditioning [1, n, width] in fp32 of one prompt, without padding; nothing pooled."""
        pairs = token_weight_pairs[NAME][0]
        ids = [pair[0] for pair in pairs]
        keep, instruction = token_weight_pairs.get(SELECTION, (range(len(ids)), []))
        batch = [Tokens(ids, list(keep))]
        weights = torch.tensor([pairs[i][1] for i in keep])
        _require_weights(weights.tolist())
        weighted = bool((weights != 1.0).any())
        if weighted:  # towards what an empty prompt says at the same positions, as in ComfyUI
            empty = (instruction or [BOS])[: len(ids)]
            batch.append(Tokens(empty + [PAD] * (len(ids) - len(empty)), list(keep)))
        rows = [row.float() for row in self._encode(batch, instruction[:-1])]
        cond = rows[0]
        if not all(map(is_finite, rows)):
            raise ValueError(self._why_not_finite())
        if weighted:
            cond = torch.lerp(rows[1], cond, weights.to(cond)[:, None])
        return cond[None].to(mm.intermediate_device()), None

    def generate(
        self,
        tokens: dict,
        do_sample: bool = True,
        max_length: int = 256,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        presence_penalty: float = 0.0,
    ) -> list[int]:
        """The tokens of an answer, with the one that ends it; the arguments are ComfyUI's. Raises ValueError."""
        choice = (temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty)
        return writing.answer(
            self.encoder.transformer,
            [pair[0] for pair in tokens[NAME][0]],
            tokens.get(writing.STOP),
            device=self._where(),
            dtype=self.compute_dtype,
            max_length=max_length,
            choice=choice if do_sample else None,
            seed=seed or 0,
            why_not_finite=self._why_not_finite,
        )

    def _where(self) -> torch.device:
        return self.device if self.device is not None else mm.text_encoder_device()

    def _why_not_finite(self) -> str:
        if names := not_finite(self.encoder.transformer.state_dict()):
            file = f"{self.path}: its tensor {first_and_count(names)} holds NaN or infinity"
            return f"{file}; download or convert it again, or take out LoRAs of the text encoder"
        return f"{self.path}: this text encoder makes NaN or infinity in {self.compute_dtype}; load it in fp32"

    def _encode(self, batch: list[Tokens], prefix_ids: list[int]) -> list[Tensor]:
        # What the cache holds belongs to the weights as this patcher left them.
        key = getattr(self, "current_weight_patches_uuid", None)
        cache = None if self.hooked_weights else self.cache
        return encode_ids(
            self.encoder.transformer,
            batch,
            device=self._where(),
            dtype=self.compute_dtype,
            layer=self.layer,
            prefix_ids=prefix_ids,
            cache=cache,
            key=key,
        )


class SanaCLIP(comfy.sd.CLIP):
    """A stock CLIP whose clones encode with the network of their own patcher.

    LoRA hooks ask for a clone without dynamic VRAM, which has a network of its own; ComfyUI's would patch that one and
    encode with the other.
    """

    def clone(self, *args, **kwargs) -> "SanaCLIP":
        cloned = super().clone(*args, **kwargs)
        cloned.__class__ = type(self)
        cloned.cond_stage_model = cloned.patcher.model
        return cloned


def compute_dtype(device: torch.device, requested: torch.dtype | None) -> torch.dtype:
    """bf16 where the device computes it, else fp32; never fp16, which Gemma's activations overflow."""
    if requested is not None:
        return requested
    return torch.bfloat16 if mm.should_use_bf16(device) else torch.float32


def load_clip(
    source: checkpoint.Source | str | Path, options: LoaderOptions = DEFAULT, disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """CLIP of a file or folder, by its `dtype`, `form` and `device`. Raises CheckpointError."""
    source = sources.opened(source)
    weights = checkpoint.load(source, layouts.TEXT_ENCODER)
    tokenizer = find_tokenizer(weights)
    preset = prompt_format(weights)
    quant = quantised.prepare(weights, options.form)
    checkpoint.check_names(weights, ignore=checkpoint.QUANT_SUFFIXES if quant else ())
    log.info("%s", checkpoint.summary(weights))

    device = options.device or mm.text_encoder_device()
    dtype, stored = compute_dtype(device, options.dtype), options.dtype or part.majority_dtype(weights.tensors)
    placed = {"load_device": options.device, "offload_device": options.device} if options.device else {}

    def make_model(**kwargs):
        return SanaTextModel(weights, dtype, quant, **kwargs)

    def make_tokenizer(embedding_directory=None, tokenizer_data=None):
        return SanaTokenizer(tokenizer, preset, weights)

    clip = SanaCLIP(
        comfy.supported_models_base.ClipTarget(make_tokenizer, make_model),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(weights.tensors),
        state_dict=[weights.tensors],
        model_options={"dtype": stored, **placed},
        disable_dynamic=disable_dynamic or residence.is_small(weights.tensors, device, None if quant else stored),
    )
    _keep_cache_current(clip.patcher)
    clip.patcher.cached_patcher_init = (load_clip_patcher, (source.path, options))
    return clip


def _keep_cache_current(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Cached states go when the weights are unloaded, or the network is changed without a patch; hooks go past them."""
    events = comfy.patcher_extension.CallbacksMP
    patcher.add_callback_with_key(events.ON_LOAD, NAME, _note_hooks)
    patcher.add_callback_with_key(events.ON_DETACH, NAME, _clear_cache_if_unpatched)
    for event in (events.ON_INJECT_MODEL, events.ON_EJECT_MODEL):
        patcher.add_callback_with_key(event, NAME, _clear_cache)


def _note_hooks(patcher, *_) -> None:
    """For the network that is loaded. A clone without dynamic VRAM shares its dictionary of changed weights with the
    patcher that it was made from, whose own network no hook changes.
    """
    patcher.model.hooked_weights = {} if patcher.is_dynamic() else patcher.hook_backup


def _clear_cache(patcher) -> None:
    patcher.model.cache.clear()


def _clear_cache_if_unpatched(patcher, unpatched: bool) -> None:
    if unpatched:  # ComfyUI also detaches, without unpatching, before each use
        _clear_cache(patcher)


@screen.one_sentence
def load_clip_patcher(
    path: Path, options: LoaderOptions = DEFAULT, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """What ComfyUI calls for a plain copy of the CLIP's patcher."""
    return load_clip(path, options, disable_dynamic).patcher
