"""Tokenizer and prompt format of a text encoder, from its file, its folder or the pipeline around it."""

from ..config import from_dict
from ..weights.checkpoint import Weights
from ..weights.tensorfile import CheckpointError
from .formats import TextPreset, text_preset
from .tokenizers import Tokenizer, load_tokenizer


def find_tokenizer(weights: Weights) -> Tokenizer:
    """The tokenizer in an encoder's file, in its folder, or in the pipeline around it. Raises CheckpointError."""
    folder = weights.path if weights.path.is_dir() else weights.path.parent
    sources = [weights.extras.get("spiece_model"), weights.extras.get("tokenizer_json"), folder]
    if weights.path.is_dir():
        sources.append(folder.parent)
    for source in sources:
        if source is None:
            continue
        try:
            tokenizer = load_tokenizer(source)
        except FileNotFoundError:
            continue
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{weights.path}: its tokenizer cannot be used: {error}") from None
        if tokenizer.size > weights.config.vocab:
            raise CheckpointError(
                f"{weights.path}: its tokenizer has {tokenizer.size} tokens, the encoder {weights.config.vocab}; "
                "take the tokenizer of gemma-2-2b-it"
            )
        return tokenizer
    raise CheckpointError(
        f"{weights.path}: no tokenizer in this file or in {folder}; put tokenizer.json or tokenizer.model of "
        "gemma-2-2b-it beside the weights"
    )


def prompt_format(weights: Weights) -> TextPreset:
    """The prompt format that this encoder's file names, else the authors'. Raises CheckpointError."""
    stored = weights.settings.get("text")
    try:
        return text_preset() if stored is None else from_dict(TextPreset, stored)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{weights.path}: its prompt settings cannot be used: {error}") from None
