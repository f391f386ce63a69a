"""ComfyUI's own training of LoRAs on a SANA, its files in both loaders, and LoRAs beside the weights (bypass)."""

import pytest
import safetensors.torch
import torch

OURS, STOCK, BESIDE = "SanaSprintLoraLoader", "LoraLoaderModelOnly", "LoraLoaderBypassModelOnly"
DEPTHWISE, TABLE = "transformer_blocks.0.ff.conv_depth", "transformer_blocks.0.scale_shift_table"


@pytest.fixture(scope="module")
def train(node, model, positive, encoded):
    """train(algorithm, bypass): two steps of TrainLoraNode; the tensors that it hands on."""

    def run(algorithm: str, bypass: bool) -> dict[str, torch.Tensor]:
        chosen = {"steps": 2, "learning_rate": 0.02, "rank": 4, "training_dtype": "fp32", "lora_dtype": "fp32"}
        chosen |= {"algorithm": algorithm, "bypass_mode": bypass, "existing_lora": "[None]"}
        kind = node.ids["TrainLoraNode"]
        inputs = {"model": model, "latents": encoded, "positive": positive}
        for name, spec in kind.INPUT_TYPES()["required"].items():
            if name not in inputs:
                inputs[name] = chosen.get(name, spec[1].get("default"))
        out = kind.execute(**{name: [value] for name, value in inputs.items()})
        return {name: tensor.detach().contiguous() for name, tensor in out.result[0].items()}

    return run


@pytest.fixture
def save(host):
    def write(tensors, name="trained.safetensors"):
        folder = host.base / "models" / "loras"
        folder.mkdir(exist_ok=True)
        safetensors.torch.save_file(tensors, folder / name)
        return {"lora_name": name, "strength_model": 1.0}

    return write


@pytest.mark.parametrize("bypass", [False, True], ids=["weights", "bypass"])
@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr", "OFT"])
def test_what_comfyui_trains_is_applied_whole(node, model, sample, train, save, algorithm, bypass, caplog):
    """The same image in our loader as in the stock one, which knows these names; no layer is left out."""
    if algorithm == "LoHa" and bypass:
        with pytest.raises(NotImplementedError):  # ComfyUI's own: of every model
            train(algorithm, bypass)
        return
    tensors = train(algorithm, bypass)
    if algorithm == "LoRA":
        assert tensors[f"diffusion_model.{DEPTHWISE}.lora_down.weight"].shape == (4, 9)
    chosen = save(tensors)
    caplog.clear()
    ours = sample(model=node(OURS, model=model, **chosen)[0])
    assert "left out" not in caplog.text
    assert torch.equal(ours, sample(model=node(STOCK, model=model, **chosen)))
    assert (ours - sample()).abs().max() > 0.1


def adapters(model, layer: str, flat: bool) -> dict[str, torch.Tensor]:
    rows, *columns = model.model.diffusion_model.get_parameter(f"{layer}.weight").shape
    generator = torch.Generator().manual_seed(len(layer))
    down = torch.randn(2, *columns, generator=generator) / 4
    tensors = {"lora_up.weight": torch.randn(rows, 2, generator=generator) / 4}
    tensors |= {"lora_down.weight": down.flatten(1) if flat else down, "alpha": torch.tensor(1.0)}
    return {f"diffusion_model.{layer}.{part}": tensor for part, tensor in tensors.items()}


LAYERS = ("transformer_blocks.1.attn2.to_q", "transformer_blocks.0.ff.conv_point", DEPTHWISE, TABLE, "patch_embed.proj")


@pytest.mark.parametrize("flat", [False, True], ids=["kernels", "flat"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_lora_beside_the_weights_equals_the_merged_one(node, model, sample, save, close, unchanged, layer, flat):
    chosen = save(adapters(model, layer, flat), "one.safetensors")
    with unchanged():
        merged = sample(model=node(STOCK, model=model, **chosen))
        close(sample(model=node(BESIDE, model=model, **chosen)), merged, 1e-4)
        assert (merged - sample()).abs().max() > 1e-3


@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr"])
def test_trained_files_beside_the_weights(node, model, sample, train, save, close, algorithm):
    chosen = save(train(algorithm, False))
    for strength in (1.0, -0.5):
        chosen["strength_model"] = strength
        merged = sample(model=node(STOCK, model=model, **chosen), steps=1)
        close(sample(model=node(BESIDE, model=model, **chosen), steps=1), merged, 1e-3)
