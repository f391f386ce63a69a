"""Every field of every configuration refuses what its type hint does not admit, and JSON brings them back unchanged."""

import dataclasses
import json
import math
import re
from typing import Annotated, Literal

import pytest

from sprint_core.config import Count, PositiveNumber, Range, check_fields, from_dict
from sprint_core.models.autoencoder_config import AutoencoderConfig
from sprint_core.models.controlnet import ControlNetConfig
from sprint_core.models.gemma import GemmaConfig
from sprint_core.models.tiny_autoencoder import TinyAutoencoderConfig
from sprint_core.models.transformer import TransformerConfig
from sprint_core.text.formats import TextPreset, text_preset

CONFIGS = (
    TransformerConfig(),
    TinyAutoencoderConfig(),
    ControlNetConfig(),
    AutoencoderConfig(),
    GemmaConfig(),
    text_preset(),
)
FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]
MAY_BE_ZERO = {"guidance_scale", "pos_embed_base", "encoder_layers", "decoder_layers"}


def wrong_values(name: str, value: object) -> list:
    """Values of other types than this valid value of the field, and of its type but out of its range."""
    if isinstance(value, bool):
        return [None, "true", 1, 0.0, (), [True]]
    if isinstance(value, int):
        return [None, "8", 8.0, True, (8,), [8], -1, 10**7, math.nan] + [0] * (name not in MAY_BE_ZERO)
    if isinstance(value, float):
        optional = [] if name == "softcap" else [None]
        return [*optional, "1.0", True, (1.0,), -1.0, math.nan, math.inf, 10**400] + [0.0] * (name not in MAY_BE_ZERO)
    if isinstance(value, str):
        return [5, True, 1.0, ("a",), ["a"], b"a"] + ([None, "another", ""] if name != "instruction" else [])
    entries = wrong_values(name, value[-1])
    return [None, "ab", 3, list(value), *((entry, *value[1:]) for entry in entries)]


@pytest.mark.parametrize(("config", "name"), FIELDS, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_a_field_refuses_what_its_hint_does_not_admit(config, name):
    for value in wrong_values(name, getattr(config, name)):
        sentence = f"{type(config).__name__}.{name} is {value!r}; it must be "
        with pytest.raises(ValueError, match="^" + re.escape(sentence)):
            dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_configuration_survives_json(config):
    assert from_dict(type(config), json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("data", [None, 3, "width", ["width"]])
def test_a_configuration_is_an_object(data):
    with pytest.raises(ValueError, match=re.escape(f"TransformerConfig is {data!r}, not an object")):
        from_dict(TransformerConfig, data)


def test_an_unknown_setting():
    with pytest.raises(ValueError, match="GemmaConfig has no setting novelty, size; it was written by a newer version"):
        from_dict(GemmaConfig, {"size": 1, "novelty": 2, "width": 64})


def test_optional_fields_may_be_none():
    assert GemmaConfig(softcap=None).softcap is None
    assert TextPreset(None).instruction is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TransformerConfig(width=72, cross_heads=2),
            "TransformerConfig.width is 72, no multiple of 32 channels",
        ),
        (
            lambda: ControlNetConfig(width=64, cross_heads=3),
            "ControlNetConfig.width is 64, no multiple of 3 cross_heads",
        ),
        (lambda: TransformerConfig(mlp_ratio=101), "TransformerConfig.mlp_ratio is 101; .* a number above 0 to 100"),
        (lambda: GemmaConfig(heads=3, kv_heads=2), "GemmaConfig.heads is 3, no multiple of 2 kv_heads"),
        (lambda: GemmaConfig(head_dim=7), "GemmaConfig.head_dim is 7; the rotary embedding needs an even one"),
        (lambda: GemmaConfig(depth=1001), "GemmaConfig.depth is 1001; it must be an integer from 1 to 1000"),
        (lambda: GemmaConfig(softcap="50"), "GemmaConfig.softcap is '50'; it must be a number above 0 or None"),
        (lambda: TextPreset("a", max_tokens=1), "TextPreset.max_tokens is 1; it must be an integer from 2 to 1000000"),
        (lambda: AutoencoderConfig(decoder_acts=("silu",) * 5), "decoder_acts describes 5 stages, encoder_channels 6"),
        (lambda: AutoencoderConfig(downsample="bilinear"), "is 'bilinear'; it must be 'conv' or 'pixel_unshuffle'"),
        (lambda: AutoencoderConfig(encoder_layers=(2, 0, 2, 3, 3, 3)), "only the first stage of a DC-AE may have no"),
    ],
)
def test_messages_and_rules_across_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_stage_is_no_dc_ae():
    one = {f.name: f.default[:1] for f in dataclasses.fields(AutoencoderConfig) if isinstance(f.default, tuple)}
    with pytest.raises(ValueError, match="describes 1 stages; a DC-AE has at least two"):
        AutoencoderConfig(**one)


@dataclasses.dataclass
class Sample:
    numbers: tuple[Annotated[float, Range(0, 1)], ...] = ()
    words: tuple[tuple[Literal["a", "b"], ...], ...] = ()
    either: Count | str | None = None
    positive: PositiveNumber = 1


def test_hints_nest():
    check_fields(Sample())
    check_fields(Sample((0, 0.5, 1), (("a",), (), ("b", "a")), 7, 1e-300))
    check_fields(Sample(either="text"))
    for wrong in ({"numbers": (2,)}, {"numbers": (0.5, None)}, {"words": (("c",),)}, {"words": ("a",)}, {"either": 0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=rf"Sample\.{name} is "):
            check_fields(Sample(**wrong))
