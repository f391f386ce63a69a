"""Properties of tensor names, over whatever hypothesis makes up: LoRA name maps and key maps."""

import re

import standin
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import SPRINT

from sprint_core.models.gemma import Gemma
from sprint_core.models.transformer import SanaTransformer
from sprint_core.weights import adapters, keymaps, layouts, lora
from sprint_core.weights.lora_settings import LoraSettings
from sprint_core.weights.tensorfile import CheckpointError

SHAPES = {name: tuple(t.shape) for name, t in SanaTransformer(SPRINT, device="meta").state_dict().items()}
TEXT = {name: tuple(t.shape) for name, t in Gemma(standin.TEXT, device="meta").state_dict().items()}
LAYERS = sorted(
    name.removesuffix(".weight") for name, shape in SHAPES.items() if name.endswith(".weight") and len(shape) > 1
)
DOTTED = st.sampled_from(("", *lora.PREFIXES))
SPELLINGS = st.sampled_from(
    (("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight"), ("lora_A", "lora_B"),
     ("lora_down.weight", "lora_up.weight"), ("lora.down.weight", "lora.up.weight"))
)  # fmt: skip
WORDS = st.text("abcAB._0189-[](){}*+?\\^$|é\ud800", max_size=20)


def matrices(layer: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, *columns = SHAPES[f"{layer}.weight"]
    return torch.ones(rank, *columns), torch.ones(rows, rank, *[1] * (len(columns) - 1))


@given(st.data(), SPELLINGS, st.integers(1, 4))
def test_every_layer_is_found_under_every_name(data, spelling, rank):
    """Dots behind any two prefixes, or underscores behind one; nothing else changes with the name."""
    layers = data.draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4, unique=True))
    tensors = {}
    for layer in layers:
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(lora.FLAT_PREFIXES)) + layer.replace(".", "_")
        else:
            name = data.draw(DOTTED) + data.draw(DOTTED) + layer
        tensors |= {f"{name}.{part}": matrix for part, matrix in zip(spelling, matrices(layer, rank), strict=True)}
    found = lora.read(tensors, LoraSettings({}), SHAPES, TEXT)
    assert set(found.transformer) == set(layers) and not found.skipped and not found.text
    for layer in layers:
        assert (adapters.change(found.transformer[layer]) == rank).all()


@given(
    st.dictionaries(WORDS, st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.zeros(shape)), max_size=5)
)
def test_any_names_are_an_error_or_named(tensors):
    good = {
        f"{LAYERS[0]}.{part}": matrix for part, matrix in zip(("lora_A", "lora_B"), matrices(LAYERS[0], 2), strict=True)
    }
    tensors = {name: tensor for name, tensor in tensors.items() if name not in good}
    found = lora.read(tensors | good, LoraSettings({}), SHAPES)
    assert set(found.transformer) == {LAYERS[0]} and set(found.foreign) == set(tensors)
    try:
        lora.read(tensors, LoraSettings({}), SHAPES)
    except CheckpointError as error:
        assert "none of its" in str(error)
    else:
        raise AssertionError("nothing could be applied")


PARTS = st.sampled_from((
    "lora_A.weight", "lora_B.weight", "lora_mid.weight", "alpha", "dora_scale", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
    "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1",
    "hada_t2", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "rescale", "diff", "diff_b", "w_norm",
    "b_norm", "set_weight",
))  # fmt: skip
SIZES = st.lists(st.sampled_from((0, 1, 2, 3, 8, 64, 320)), max_size=4)


@settings(max_examples=300)
@given(st.sampled_from(LAYERS), st.dictionaries(PARTS, SIZES, min_size=1, max_size=5), st.booleans())
def test_what_is_applied_has_the_size_of_the_weight(layer, sizes, fused):
    """Of parts of any sizes; what is not applied is named, and no exception comes out but CheckpointError."""
    name = "blocks.0.attn.qkv" if fused else layer
    tensors = {f"{name}.{part}": torch.ones(shape) for part, shape in sizes.items()}
    try:
        found = lora.read(tensors, LoraSettings({}), SHAPES)
    except CheckpointError as error:
        assert re.search("none of its|another width", str(error))
        return
    for native, parts in found.transformer.items():
        shape = SHAPES[f"{native}.weight"]
        if any(part.startswith(("lora_", "lokr_", "hada_")) for part in parts):
            assert adapters.change(parts).reshape(shape).shape == shape
        for part in adapters.WHOLE:
            assert part not in parts or tuple(parts[part].shape) == shape


@given(st.lists(st.sampled_from(sorted(SHAPES)), unique=True), st.sampled_from((layouts.transformer.DIFFUSERS,)))
def test_renaming_some_tensors_there_and_back(names, naming):
    """One to one: any subset comes back as it was."""
    tensors = {name: torch.zeros(1) for name in names}
    there = keymaps.from_native(tensors, naming)
    assert len(there) == len(tensors)
    assert set(keymaps.to_native(there, naming)) == set(tensors)


@given(st.integers(0, 40), st.integers(1, 5))
def test_fused_tensors_come_apart_and_together(block, width):
    """q, k and v of any block and width, through the authors' names and back, bit for bit."""
    natives = [f"transformer_blocks.{block}.attn1.to_{x}.weight" for x in "qkv"]
    tensors = {name: torch.randn(width, 3) for name in natives}
    fused = keymaps.from_native(tensors, layouts.transformer.NVLABS)
    assert list(fused) == [f"blocks.{block}.attn.qkv.weight"]
    back = keymaps.to_native(fused, layouts.transformer.NVLABS)
    assert set(back) == set(tensors) and all(torch.equal(back[name], tensors[name]) for name in tensors)
