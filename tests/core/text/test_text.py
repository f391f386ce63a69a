"""Prompt formats, tokenizers and selection against sentencepiece, tokenizers and diffusers' pipeline."""

import inspect
import io
import json
import shutil
import sys
from dataclasses import replace

import pytest
import sentencepiece
import standin
import tokenizers
import torch
from diffusers import SanaSprintPipeline
from residence import resident_bytes
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sprint_core.distill.dataset import emoji_text as bundled
from sprint_core.models.gemma import Gemma, GemmaConfig
from sprint_core.text.encoder import LRUCache, PromptEmbeddingCache, TextEncoder, encode_ids, pad_embeddings
from sprint_core.text.formats import TextPreset, load_instruction, text_preset
from sprint_core.text.prompts import PromptTokenizer, select_tokens
from sprint_core.text.tokenizers import BOS, HFTokenizer, SentencePieceTokenizer, load_tokenizer, tokenizer_state
from sprint_core.weights import checkpoint, layouts
from sprint_core.weights.layouts.text_encoder import config_from_hf

SHORT = "A Cat with a blue hat"
LONG = "a small cat sleeping on a sunny windowsill, " * 60
PROMPTS = [SHORT, LONG, "", "  Spaces  around  ", "naïve 猫\n\n🐈", "a"]
TEXTS = [*PROMPTS, "User Prompt: ", "User Prompt: A cat", "tabs\tand <bos> marks <unk>", " <start_of_turn>x"]
DIFFUSERS_INSTRUCTION = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
HEAD = 16  # head_dim of the tiny Gemma


def train_sentencepiece() -> bytes:
    """A small model with Gemma's settings: BPE, byte fallback, identity normaliser, spaces kept as they are."""
    corpus = [*load_instruction().split("\n"), *TEXTS[:2], "a blue cat in a red hat"] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<mask>", "<start_of_turn>", "\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
    )
    return model.getvalue()


def as_tokenizer_json(model: bytes) -> str:
    """The same vocabulary as Hugging Face converts Gemma's: merges ranked by the score of their result."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(sp.get_piece_size())
    vocab = {sp.id_to_piece(i): i for i in ids}
    merges = []
    for i in sorted((i for i in ids if not sp.is_byte(i)), key=sp.get_score, reverse=True):
        piece = sp.id_to_piece(i)
        merges += [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
    tokenizer = tokenizers.Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>")
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with both files of the same tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    model = train_sentencepiece()
    (path / "tokenizer.model").write_bytes(model)
    (path / "tokenizer.json").write_text(as_tokenizer_json(model), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    """diffusers' pipeline with a tiny Gemma; only its text side is used."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD}
    sizes |= {"vocab_size": 700, "intermediate_size": 64, "num_hidden_layers": 2, "query_pre_attn_scalar": HEAD}
    torch.manual_seed(0)
    oracle = Gemma2Model(Gemma2Config(**sizes, initializer_range=0.3, attn_implementation="eager")).eval()
    return SanaSprintPipeline(tokenizer, oracle, vae=None, transformer=None, scheduler=None)


@pytest.fixture(scope="module")
def gemma(pipeline):
    oracle = pipeline.text_encoder
    gemma = Gemma(config_from_hf(oracle.config.to_dict()))
    gemma.load_state_dict({f"model.{name}": p for name, p in oracle.state_dict().items()})
    return gemma


# --- formats --------------------------------------------------------------------------------------


def test_instructions():
    assert load_instruction("diffusers") == "\n".join(DIFFUSERS_INSTRUCTION)
    assert load_instruction("nvlabs") == load_instruction("diffusers").replace("'Enhanced prompt'", '"Enhanced prompt"')
    assert load_instruction("nvlabs").endswith("\nUser Prompt: ")
    with pytest.raises(ValueError, match="none of nvlabs, diffusers"):
        load_instruction("other")


def test_presets():
    assert text_preset("nvlabs").full_text(" A Cat ") == load_instruction("nvlabs") + "A Cat"
    assert text_preset("diffusers").full_text(" A Cat ") == load_instruction("diffusers") + "a cat"
    assert TextPreset(None).full_text(" A Cat ") == "A Cat"
    assert TextPreset("x\udcff: ").full_text("\ud83d cat") == "x?: ? cat"
    assert text_preset("nvlabs").max_tokens == 300


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*TEXTS, load_instruction(), load_instruction() + SHORT], ids=lambda text: text[-12:])
def test_both_files_give_equal_ids(folder, pipeline, text):
    spiece = SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())
    fast = HFTokenizer((folder / "tokenizer.json").read_bytes())
    assert spiece.encode(text) == fast.encode(text) == pipeline.tokenizer.encode(text)
    assert spiece.encode(text)[0] == 2


def test_load_tokenizer_takes_what_is_there(folder, tmp_path):
    assert isinstance(load_tokenizer(folder), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(folder / "tokenizer.json"), HFTokenizer)
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer")
    assert isinstance(load_tokenizer(str(tmp_path)), HFTokenizer)


@pytest.mark.parametrize("name, key", [("tokenizer.model", "spiece_model"), ("tokenizer.json", "tokenizer_json")])
def test_tokenizers_travel_with_the_weights(folder, name, key):
    tokenizer = load_tokenizer(folder / name)
    state = tokenizer_state(tokenizer)
    assert list(state) == [key] and state[key].dtype == torch.uint8
    assert load_tokenizer(state[key]).encode(SHORT) == tokenizer.encode(SHORT)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_pieces_of_ids(folder, name):
    tokenizer = load_tokenizer(folder / name)
    assert tokenizer.piece(BOS) == "<bos>" and tokenizer.piece(tokenizer.size - 1)
    with pytest.raises(IndexError):
        tokenizer.piece(tokenizer.size)


def test_other_tokenizers_are_refused():
    other = tokenizers.Tokenizer(BPE({"<bos>": 0, "<pad>": 1}, []))
    with pytest.raises(ValueError, match="not Gemma's tokenizer"):
        load_tokenizer(other.to_str().encode())


# --- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 20, 24, 25, 26, 60])
@pytest.mark.parametrize("instruction_tokens", [0, 7])
def test_selection_is_the_padded_one(n, instruction_tokens):
    most = 20
    length = instruction_tokens + most - 2 if instruction_tokens else most
    padded = [*range(100, 100 + n), *[None] * length][:length]
    want = [padded[i] for i in [0, *range(-most + 1, 0)] if padded[i] is not None]
    tokens = select_tokens(range(100, 100 + n), instruction_tokens, most)
    assert [tokens.ids[i] for i in tokens.keep] == want
    assert tokens.ids == [i for i in padded if i is not None]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda text: text[:12])
def test_prompts_share_the_prefix(folder, prompt):
    prompts = PromptTokenizer(load_tokenizer(folder), text_preset())
    tokens, p = prompts.tokens(prompt), len(prompts.prefix_ids)
    assert tuple(tokens.ids[:p]) == prompts.prefix_ids
    assert tokens.keep == [0, *range(p, len(tokens.ids))]
    assert len(tokens.keep) <= 300


def test_first_word_fuses_with_the_instructions_space(folder):
    prompts = PromptTokenizer(load_tokenizer(folder), text_preset())
    tokens, space = prompts.tokens("cat"), prompts.instruction_ids[-1]
    assert len(tokens.ids) == len(prompts.instruction_ids) and tokens.ids[-1] != space
    assert prompts.tokens("").ids == prompts.instruction_ids


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_both_formats_know_where_tokens_come_from(folder, text):
    """Each byte of a character that has no token of its own comes from the whole character."""
    (ids, spans), other = (
        load_tokenizer(folder / kind).encode_spans(text) for kind in ("tokenizer.model", "tokenizer.json")
    )
    assert (ids, spans) == other and ids == load_tokenizer(folder).encode(text)
    assert all(end > begin for begin, end in spans[1:])
    assert {i for begin, end in spans for i in range(begin, end)} == set(range(len(text)))


@pytest.mark.parametrize("instruction", [None, "User Prompt: "])
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_a_notice_names_what_is_not_read(folder, kind, instruction):
    """What is read and what the notice names make the prompt; what is read is spelt by the tokens."""
    tokenizer = load_tokenizer(folder / kind)
    prompts = PromptTokenizer(tokenizer, TextPreset(instruction, max_tokens=20))
    prompt = LONG[:150].strip()
    read = "".join(tokenizer.piece(i) for i in prompts.tokens(prompt).ids[1:]).replace("▁", " ")
    read = read.removeprefix(instruction or "")
    notice = prompts.notice(prompt)
    assert notice.endswith(f'not read: "{prompt.removeprefix(read).strip()}"') and prompt.startswith(read) and read
    assert "20 tokens" in notice
    assert prompts.notice(read.strip()) == ""


def test_a_notice_is_one_short_line(folder):
    prompts = PromptTokenizer(load_tokenizer(folder), TextPreset(None, max_tokens=4))
    notice = prompts.notice("one two three\n" + LONG)
    assert notice.endswith(' ..."') and "\n" not in notice and len(notice) < 220
    assert PromptTokenizer(load_tokenizer(folder), text_preset()).notice(SHORT) == ""


def test_a_notice_names_unknown_words_and_known_ones_like_them():
    """Of the bundled model; what is spelt by a published vocabulary, which falls back to bytes, is never unknown."""
    notice = bundled.prompts().notice
    assert (
        notice("a red ballloon, and a BALLLOON") == 'this model does not know "ballloon" (it knows balloon, balloons)'
    )
    size = bundled.tokenizer().size
    assert notice("qqqq") == f'this model does not know "qqqq" (it knows {size} words)'
    assert notice("a slice of pizza") == notice("a slice \ud83d of pizza") == ""
    many = notice(" ".join(["ballloon", *["a"] * 40]))
    assert many.startswith("this model does not know") and "; the prompt is longer than the 32 tokens" in many


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_a_vocabulary_with_bytes_knows_every_word(folder, kind):
    assert load_tokenizer(folder / kind).unknown("Zyxgrmpf \u2603") == {}


# --- embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [300, 20])
@pytest.mark.parametrize("instruction", [True, False])
def test_equals_diffusers(folder, pipeline, gemma, max_tokens, instruction):
    preset = replace(text_preset("diffusers"), max_tokens=max_tokens)
    preset = preset if instruction else replace(preset, instruction=None)
    encoder = TextEncoder(gemma, load_tokenizer(folder), preset)
    with torch.no_grad():
        want, mask = pipeline.encode_prompt(
            PROMPTS,
            device=torch.device("cpu"),
            max_sequence_length=max_tokens,
            complex_human_instruction=DIFFUSERS_INSTRUCTION if instruction else None,
        )
    embeds, ours = pad_embeddings(encoder.encode(PROMPTS), max_tokens)
    assert ours.tolist() == mask.bool().tolist()
    assert ours[1].all() and not ours[2].all()  # the long prompt is cut
    torch.testing.assert_close(embeds[ours], want[ours], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompts", [[SHORT], [LONG], [""], PROMPTS])
@pytest.mark.parametrize("layer", [-1, -2])
def test_prefix_equals_the_full_pass(folder, gemma, prompts, layer):
    encoder = TextEncoder(gemma, load_tokenizer(folder), text_preset())
    tokens = [encoder.tokens(p) for p in prompts]
    with torch.no_grad():
        want = encode_ids(gemma, tokens, device="cpu", layer=layer)
    for _ in range(2):  # the second time from the cache
        for got, row in zip(encoder.encode(prompts, layer=layer), want, strict=True):
            torch.testing.assert_close(got, row, rtol=1e-5, atol=1e-5)


def test_prefix_is_computed_once_and_only_if_it_fits(folder, gemma, monkeypatch):
    calls = []
    original = Gemma.prefill
    monkeypatch.setattr(Gemma, "prefill", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    encoder = TextEncoder(gemma, load_tokenizer(folder), text_preset())
    encoder.encode([SHORT])
    encoder.encode([LONG, ""])
    assert len(calls) == 1
    encoder.cache.clear()
    encoder.encode([SHORT])
    assert len(calls) == 2

    foreign = select_tokens([2, *range(10, 400)], len(encoder.prompts.instruction_ids), 300)
    options = {"device": "cpu", "prefix_ids": encoder.prompts.prefix_ids}
    with torch.no_grad():
        got = encode_ids(gemma, [foreign], cache=PromptEmbeddingCache(), **options)
        want = encode_ids(gemma, [foreign], device="cpu")
    assert len(calls) == 2 and torch.equal(got[0], want[0])


def test_a_repeated_batch_costs_nothing(folder, gemma, monkeypatch):
    """Neither does a text that a batch has twice; and a changed result changes no later one."""
    sizes, original = [], Gemma.forward
    monkeypatch.setattr(Gemma, "forward", lambda self, ids, **kw: sizes.append(len(ids)) or original(self, ids, **kw))
    encoder = TextEncoder(gemma, load_tokenizer(folder), text_preset())
    first, again = encoder.encode([SHORT, SHORT])
    want = first.clone()
    assert sizes == [1] and torch.equal(first, again)
    first.zero_()
    assert torch.equal(encoder.encode([SHORT])[0], want) and torch.equal(again, want) and sizes == [1]
    encoder.encode([SHORT, LONG])
    encoder.encode([SHORT], layer=-2)
    assert sizes == [1, 2, 1]
    encoder.cache.clear()
    encoder.encode([SHORT])
    assert sizes == [1, 2, 1, 1]


def test_cache_drops_the_least_recently_used():
    cache, computed = LRUCache(2), []

    def get(key):
        return cache.get(key, lambda: computed.append(key) or object())

    first = get("a")
    get("b")
    assert get("a") is first
    get("c")
    assert get("a") is first and computed == ["a", "b", "c"]
    get("b")
    assert computed == ["a", "b", "c", "b"]


def test_keys_separate_weights(folder, gemma):
    """Two models that share a cache under different keys must not see each other's prefixes."""
    encoder = TextEncoder(gemma, load_tokenizer(folder), text_preset())
    other = Gemma(gemma.config)
    other.load_state_dict({name: 1.1 * p for name, p in gemma.state_dict().items()})
    options = {"device": "cpu", "prefix_ids": encoder.prompts.prefix_ids, "cache": PromptEmbeddingCache()}
    tokens = [encoder.tokens(SHORT)]
    with torch.no_grad():
        encode_ids(gemma, tokens, key="gemma", **options)
        got = encode_ids(other, tokens, key="other", **options)[0]
        want = encode_ids(other, tokens, device="cpu")[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_padding():
    rows = [torch.ones(2, 3), torch.ones(1, 3)]
    embeds, mask = pad_embeddings(rows)
    assert embeds.shape == (2, 2, 3) and mask.tolist() == [[True, True], [True, False]]
    assert embeds.sum() == 9
    with pytest.raises(ValueError, match="2 tokens"):
        pad_embeddings(rows, 1)


def test_compute_dtype(folder, gemma):
    """As in a host that stores the embedding in bf16: `dtype` reaches both the prefix and the prompt's pass."""
    mixed = Gemma(gemma.config)
    mixed.load_state_dict(gemma.state_dict())
    mixed.model.embed_tokens.bfloat16()
    prompts = PromptTokenizer(load_tokenizer(folder), text_preset())
    options = {
        "device": "cpu",
        "dtype": torch.float32,
        "prefix_ids": prompts.prefix_ids,
        "cache": PromptEmbeddingCache(),
    }
    with torch.no_grad():
        got = encode_ids(mixed, [prompts.tokens(SHORT)], **options)[0]
    assert got.dtype == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say which pages were written to")
def test_layers_leave_memory_after_use(folder, tmp_path):
    """Those of a mapped file; the second prompt finds them as the first did."""
    gemma = Gemma(GemmaConfig(vocab=700, width=64, ffn=1 << 14, depth=2, heads=4, kv_heads=2, head_dim=16))
    path = tmp_path / "gemma.safetensors"
    checkpoint.save(path, [checkpoint.Weights(layouts.TEXT_ENCODER, gemma.config, gemma.state_dict(), path)], {})
    mapped = checkpoint.build(checkpoint.load(path, layouts.TEXT_ENCODER))
    tokenizer = load_tokenizer(folder)
    encoder = TextEncoder(mapped, tokenizer, text_preset())
    prompts = ["a cat", "a red hat"]
    found = [encoder.encode([prompt])[0] for prompt in prompts]
    assert resident_bytes(mapped.model.layers[0].mlp.up_proj.weight) < path.stat().st_size / 10
    wanted = [TextEncoder(gemma, tokenizer, text_preset()).encode([prompt])[0] for prompt in prompts]
    torch.testing.assert_close(found, wanted)


def test_tokenizer_json_with_a_byte_order_mark(tmp_path):
    """As Windows' editors save it: with or without it, the same ids and the same bytes in a checkpoint."""
    plain = HFTokenizer(json.dumps(standin.byte_tokenizer()).encode())
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + plain.data)
    marked = load_tokenizer(tmp_path)
    assert marked.encode("ein Käfer") == plain.encode("ein Käfer") and marked.data == plain.data
