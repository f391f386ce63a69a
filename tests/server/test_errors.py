"""Bad files and bad numbers: the running server answers with what is wrong, and the next prompt works."""

import json
import os
import time
import urllib.error

import pytest
import standin
import torch
from api_prompts import custom_size, graph, refused, with_model
from safetensors.torch import save_file

from launcher.prompt import ComfyError
from sprint_core.weights import presets, tensorfile


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_bad_file(kind: str, path, trap) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    matrix = torch.zeros(4, 4)
    names = {
        "sdxl": "model.diffusion_model.input_blocks.0.0.weight",
        "flux": "double_blocks.0.img_attn.qkv.weight",
        "lora": "lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "controlnet": "input_block.weight",
        "vae": "decoder.norm_out.weight",
    }
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        save_file({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "code":
        torch.save({"a": Malicious(trap)}, path)
    else:
        save_file({names[kind]: matrix}, path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "the file is empty"),
        ("truncated", "truncated"),
        ("code", "would run code"),
        ("sdxl", "a Stable Diffusion or SDXL model, not a SANA transformer"),
        ("flux", "a FLUX model, not a SANA transformer"),
        ("lora", "a LoRA, not a SANA transformer"),
        ("controlnet", "a SANA ControlNet, not a SANA transformer"),
        ("vae", "a DC-AE, not a SANA transformer"),
    ],
)
def test_bad_model_file(server, tmp_path, kind, says):
    name = f"bad_{kind}.{'pth' if kind == 'code' else 'safetensors'}"
    path = server.base / "models" / "diffusion_models" / name
    write_bad_file(kind, path, tmp_path / "trap")
    message = refused(server, with_model(server, name))
    path.unlink()
    assert says in message and name in message and "SanaSprintModelLoader" in message
    assert not (tmp_path / "trap").exists()


def test_missing_tensors_are_listed(server):
    folder = standin.make(server.base / "models" / "diffusers" / "incomplete")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = tensorfile.read(file).tensors
    kept = {k: v.clone() for k, v in tensors.items() if "attn2" not in k} | {"surprise": torch.zeros(1)}
    save_file(kept, file)
    message = refused(server, graph(loader={"model": "incomplete"}))
    assert "transformer_blocks.0.attn2.to_k.bias" in message and "surprise" in message
    assert message.count("attn2") == 10  # no more are listed
    assert "incomplete" in message and "download it again" in message


def test_text_encoder_without_tokenizer(server):
    folder = standin.make(server.base / "models" / "diffusers" / "speechless")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    message = refused(server, graph(loader={"model": "speechless"}))
    assert "no tokenizer" in message and "tokenizer.json" in message


@pytest.mark.parametrize(
    ("node", "change", "says"),
    [
        ("sampler", {"schedule": "paper", "steps": 5}, "1 to 4 steps"),
        ("sampler", {"steps": 0}, "steps"),
        ("sampler", {"denoise": 0.0}, "denoise"),
        ("sampler", {"denoise": 1.5}, "denoise"),
        ("sampler", {"guidance": -1.0}, "guidance"),
        ("sampler", {"schedule": "custom", "schedule.angles": "1.0, 1.2"}, "fall strictly"),
        ("sampler", {"schedule": "custom", "schedule.angles": "2.0"}, "outside"),
        ("sampler", {"schedule": "custom", "schedule.angles": "cat"}, "list of angles"),
        ("sampler", {"schedule": "custom", "schedule.angles": ""}, "at least one"),
        ("latent", {"size.width": 16}, "width"),
        (
            "latent",
            {"size": "1000 x 1000"},
            "size is '1000 x 1000', which it does not offer; choose one that the node lists",
        ),
        ("loader", {"model": "not there"}, "not there"),
    ],
)
def test_numbers_out_of_range(server, node, change, says):
    message = refused(server, graph(**{node: change}))
    assert says in message and "SanaSprint" in message


RED = {
    "angles": "SanaSprintSchedule",
    "text": "SanaSprintTextEncode",
    "method": "SanaSprintSoftEdges",
    "end_percent": "SanaSprintControlNetApply",
}


def with_node(server, kind: str) -> dict:
    """The good graph with one more node of this kind in it, under the name of red, its widgets at their defaults."""
    prompt = graph()
    spec = server.object_info()[kind]["input"]["required"]
    wires = {"clip": ["loader", 1], "positive": ["text", 0], "image": ["grey", 0], "vae": ["loader", 2]}
    values = {
        name: options[0]["default"] for name, (_, *options) in spec.items() if options and "default" in options[0]
    }
    prompt["red"] = {"class_type": kind, "inputs": values | {name: wires[name] for name in spec if name in wires}}
    prompt["grey"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
    control = {"control_net": presets.BUNDLED_CONTROL_NAME, "dtype": "auto", "time_scale": "auto", "wiring": "auto"}
    if "control_net" in spec:
        prompt["control"] = {"class_type": "SanaSprintControlNetLoader", "inputs": control}
        prompt["red"]["inputs"]["control_net"] = ["control", 0]
    if kind == RED["angles"]:
        prompt["sampler"]["class_type"] = "SamplerCustom"
        prompt["sampler"]["inputs"] |= {"add_noise": True, "noise_seed": 0, "cfg": 1.0, "negative": ["text", 0]}
        prompt["sampler"]["inputs"] |= {"sampler": ["lcm", 0], "sigmas": ["red", 0]}
        prompt["lcm"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "lcm"}}
        return prompt
    reader, name = ("save", "images") if kind == RED["method"] else ("sampler", "positive")
    prompt[reader]["inputs"][name] = ["red", 0]
    return prompt


@pytest.mark.parametrize(
    ("changes", "widget", "says"),
    [
        (
            {"schedule": "paper", "steps": 9},
            "steps",
            "the paper's schedule has 1 to 4 steps, not 9; 'app' has up to 40",
        ),
        (
            {"schedule": "custom", "schedule.angles": "0.5, 1.0"},
            "angles",
            "angles must fall strictly, but 1 follows 0.5",
        ),
        (
            {"schedule": "karras"},
            "schedule",
            "schedule is 'karras', which it does not offer; choose one of auto, paper, app, custom",
        ),
        ({"denoise": float("nan")}, "denoise", "strength (denoise) is nan; it must lie in (0, 1]"),
        ({"text": "a (cat:nan)"}, "text", "a weight in the prompt is not a finite number; write weights as (word:1.2)"),
        ({"text": "(" * 101 + "cat" + ")" * 101}, "text", "101 brackets in one another"),
        ({"start_percent": 0.8, "end_percent": 0.2}, "end_percent", "control from 0.8 to 0.2: start must not exceed"),
        ({"method": "HED"}, "method", "no ControlNetHED.pth in models/annotators; put it there, or choose auto"),
    ],
)
def test_what_no_run_can_mend_is_refused_before_it(server, changes, widget, says):
    """The editor marks the widget red, and nothing is queued."""
    name = "red" if widget in RED else "sampler"
    prompt = with_node(server, RED[widget]) if widget in RED else graph()
    prompt[name]["inputs"] |= changes
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.json("/prompt", {"prompt": prompt})
    errors = json.loads(refusal.value.read())["node_errors"]
    assert list(errors) == [name]
    red = {error["extra_info"]["input_name"]: error["details"] for error in errors[name]["errors"]}
    assert says in red[f"schedule.{widget}" if widget == "angles" else widget]


def test_a_refusal_before_the_run_is_one_line(server):
    """ComfyUI repeats it for each widget that the node's check reads."""
    line = r"refused the prompt:\n  node sampler \(SanaSprintSampler\): the paper's schedule has .* up to 40$"
    with pytest.raises(ComfyError, match=line):
        server.run(graph(sampler={"schedule": "paper", "steps": 9}))


def test_sizes_are_rounded_and_said(server):
    history = server.run(graph(latent=custom_size(100, 70), sampler={"seed": 3}))
    image = server.view(server.images(history)[0])
    assert (int.from_bytes(image[16:20]), int.from_bytes(image[20:24])) == (96, 64)
    assert "100 x 70 rounded to 96 x 64" in server.log_text()


def test_cancel_and_go_on(server):
    prompt = graph(sampler={"steps": 40, "seed": 5}, latent=custom_size(2048, 2048))
    prompt_id = server.queue(prompt)
    time.sleep(1.5)
    server.request("/interrupt", {"prompt_id": prompt_id})
    started = time.monotonic()
    with pytest.raises(ComfyError, match="interrupted"):
        server.wait(prompt_id)
    assert time.monotonic() - started < 20
    assert server.images(server.run(graph(sampler={"seed": 6})))


def test_teacher_samples_with_ksampler_and_cfg(server):
    standin.make(server.base / "models" / "diffusers" / "teacher", standin.TEACHER)
    prompt = graph(loader={"model": "teacher"})
    prompt["negative"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["loader", 1], "text": "blurry"}}
    prompt["sampler"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": ["loader", 0],
            "positive": ["text", 0],
            "negative": ["negative", 0],
            "latent_image": ["latent", 0],
            "seed": 0,
            "steps": 8,
            "cfg": 4.5,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        },
    }
    with_cfg = server.view(server.images(server.run(prompt))[0])
    prompt["sampler"]["inputs"]["cfg"] = 1.0
    assert with_cfg != server.view(server.images(server.run(prompt))[0])
    refusal = refused(server, graph(loader={"model": "teacher"}))
    assert "not a SANA-Sprint" in refusal and "KSampler" in refusal
