"""A model of the emoji world that paints nothing."""

import dataclasses

import pytest
import standin
import tiny_networks

from sprint_core.distill.dataset import emoji_text
from sprint_core.models.gemma import Gemma
from sprint_core.text.tokenizers import tokenizer_state
from sprint_core.weights import checkpoint, layouts

VOCABULARY = emoji_text.tokenizer()


@pytest.fixture(scope="session")
def emoji_model(tmp_path_factory):
    """A file with all parts in a size for tests, which knows the words of emoji and paints nothing."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    config = dataclasses.replace(tiny_networks.GEMMA, vocab=VOCABULARY.size)
    gemma = standin.random_model(Gemma(config, device="meta"))
    text = {"text": {"instruction": None, "max_tokens": emoji_text.MAX_TOKENS, "lower": False}}
    encoder = checkpoint.Weights(layouts.TEXT_ENCODER, config, gemma, path, text)
    encoder.extras |= tokenizer_state(VOCABULARY)
    sizes = {"size_px": 256, "flow_shift": 3.0}
    transformer = checkpoint.Weights(
        layouts.TRANSFORMER, tiny_networks.SPRINT, tiny_networks.NATIVE["transformer"], path, sizes
    )
    decoder = checkpoint.Weights(
        layouts.AUTOENCODER, standin.AUTOENCODER, tiny_networks.NATIVE["autoencoder"], path, {}
    )
    checkpoint.save(path, [transformer, encoder, decoder], {})
    return path
