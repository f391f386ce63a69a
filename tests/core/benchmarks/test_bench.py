"""The benchmark: its two sides compute the same, its parts are what they say, and what it refuses.

How fast anything is, is no test.
"""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
import time

import openvino
import psutil
import pytest
import standin
import torch
from PIL import Image, ImageColor

from benchmarks import __main__ as bench
from benchmarks import alone, busy, converted, int8, measure, networks, shares, sweep, theirs, training
from sprint_core.models.gemma import GemmaConfig
from sprint_core.weights import presets

CPU = torch.device("cpu")
SMALL = presets.TransformerConfig(width=64, depth=8, cross_heads=2, caption_width=32)
TEXT = GemmaConfig(vocab=4000, width=32, depth=2, heads=2, kv_heads=1, head_dim=32, ffn=64, query_scale=32)


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    """What the machine can do is found with small matrices: nothing here depends on the figure."""
    monkeypatch.setattr(measure, "PEAK_SIZE", 64)


@pytest.fixture
def small(monkeypatch):
    """The 0.6B in small, so that both sides are made in no time. Its operations are not counted, which takes longer
    than to compute them; those of the bundled model are."""
    monkeypatch.setattr(measure, "UNCOUNTED", tuple(bench.PARTS))
    row = presets.PRESETS["sprint-0.6B"]
    monkeypatch.setitem(presets.PRESETS, "sprint-0.6B", presets.Preset(row.name, row.repo, SMALL, 64))
    monkeypatch.setattr(networks, "SANA", standin.AUTOENCODER)
    monkeypatch.setattr(networks, "GemmaConfig", lambda: TEXT)
    return functools.partial(networks.Ours, "0.6B", None, CPU)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_usual_part_of_the_bundled_model_is_measured(capsys):
    assert bench.main(["--runs", "2", "--device", "cpu", "--size", "64"]) == 0
    result = last_line(capsys)
    expected = {"text", "long_text", "same_text", *bench.USUAL.split(",")}
    assert set(result["parts"]) == expected and (result["size_px"], result["dtype"]) == (64, "float32")
    for row in result["parts"].values():
        assert 0 < row["ours"]["min_sec"] <= row["ours"]["median_sec"] <= row["ours"]["max_sec"]
        assert set(row) == {"ours", "steps"}
    assert result["parts"]["step"]["steps"] == 1.0
    assert result["parts"]["control"]["ours"]["tflop"] > result["parts"]["step"]["ours"]["tflop"] > 0
    step, negative = (result["parts"][part]["ours"]["tflop"] for part in ("step", "negative"))
    assert 1 < negative / step < 1.6  # of 2 x 2 cells, where the prompts' keys and values weigh most
    assert result["parts"]["same_text"]["ours"]["tflop"] == 0  # it is not computed again


def test_both_sides_compute_the_same(small, capsys):
    """Every part against diffusers' pipeline on the same weights; a call of ours with a wrong meaning would differ."""
    parts = "text,step,negative,control,hint,encode,decode,total,batch"
    words = ["--model", "0.6B", "--against", "diffusers", "--parts", parts, "--runs", "1", "--device", "cpu"]
    assert bench.main(words) == 0
    result = last_line(capsys)
    assert result["against"].startswith("diffusers ") and len(result["parts"]) == 11
    assert "theirs" not in result["parts"].pop("negative")  # diffusers has none for SANA
    for name, row in result["parts"].items():
        assert row["difference"] < 1e-3, name
        assert row["ratio"] == pytest.approx(row["theirs"]["median_sec"] / row["ours"]["median_sec"], rel=1e-3)


def test_openvino_runs_in_a_process_of_its_own():
    """What it leaves behind would end this one at the next signal that a test sends."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-o", "python_functions=openvino_*", __file__]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0 and "1 passed" in ended.stdout, ended.stdout[-3000:]


@pytest.mark.filterwarnings("ignore")  # of tracing
def openvino_computes_the_same(small, capsys, tmp_path, monkeypatch):
    """The test above runs it. Converted networks in diffusers' pipeline; the second time they come from their files."""
    monkeypatch.setattr(converted, "FOLDER", tmp_path)
    words = ["--model", "0.6B", "--against", "openvino", "--parts", "text,step,control,encode,decode,total"]
    for _ in range(2):
        assert bench.main([*words, "--runs", "1", "--device", "cpu"]) == 0
        result = last_line(capsys)
        assert result["against"].startswith("openvino 20") and len(result["parts"]) == 8
        assert "theirs" not in result["parts"].pop("control")
        for name, row in result["parts"].items():
            assert row["difference"] < 1e-3, name
        files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.xml")}
        monkeypatch.setattr(openvino, "convert_model", None)
    assert {path.name.rpartition("-")[0] for path in files} == {"text_encoder", "transformer", "encode", "decode"}


def test_others_spin_meanwhile():
    others = psutil.Process().children()  # such as those that other tests' processes share
    with busy.spinning(2):
        children = [child for child in psutil.Process().children() if child not in others]
        assert len(children) == 2 and all(child.is_running() for child in children)
        before = [child.cpu_times().user for child in children]
        time.sleep(0.5)
        assert any(child.cpu_times().user > start for child, start in zip(children, before, strict=True))
    assert not any(child.is_running() for child in children)


@pytest.mark.parametrize(
    ("parts", "networks_of_parts"),
    [
        (["step"], ["SanaTransformer"]),
        (["control"], ["SanaTransformer", "SanaControlNet"]),
        (["hint"], ["SanaTransformer", "Encoder", "SanaControlNet"]),
        (["encode", "decode"], ["Encoder", "Decoder"]),
        (["total"], ["SanaTransformer", "Decoder"]),
        (["batch"], ["SanaTransformer", "Decoder"]),
        (["text", "same_text"], []),
    ],
)
def test_networks_worth_compiling(small, parts, networks_of_parts):
    assert [type(network).__name__ for network in small(None).compilable(parts)] == networks_of_parts


def test_what_a_part_runs_is_compiled_on_both_sides(small, capsys, monkeypatch):
    """By a backend that needs no compiler; before anything is measured, and not again."""
    networks_made, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_in_place(*networks_to_compile):
        networks_made.extend(type(network).__name__ for network in networks_to_compile)
        measure_real(*networks_to_compile, backend=backend)

    measure_real = measure.compile_in_place
    monkeypatch.setattr(measure, "compile_in_place", compile_in_place)
    monkeypatch.setattr(measure, "require_compiler", lambda device: None)
    monkeypatch.setattr(measure.PeakMemory, "start", lambda self: graphs.append("measured"))
    monkeypatch.setattr(measure.PeakMemory, "used", lambda self: None)
    row = presets.PRESETS["sprint-0.6B"]
    shallow = dataclasses.replace(row, transformer=dataclasses.replace(SMALL, depth=1))
    monkeypatch.setitem(presets.PRESETS, "sprint-0.6B", shallow)
    torch._dynamo.reset()
    words = ["--model", "0.6B", "--against", "diffusers", "--parts", "step", "--runs", "1", "--compile"]
    assert bench.main([*words, "--device", "cpu"]) == 0
    assert networks_made == ["SanaTransformer", "SanaTransformer2DModel"]
    before = graphs.index("measured")
    assert before >= 2 and set(graphs[before:]) == {"measured"}
    row = last_line(capsys)
    assert row["compiled"] and row["parts"]["step"]["difference"] < 1e-3
    torch._dynamo.reset()


@pytest.fixture
def tiny_training(monkeypatch):
    """Two images of 64x64 and a transformer of width 64."""
    small = dataclasses.replace(training.recipes.EMOJI_TRANSFORMER, width=64, depth=2, cross_heads=2, caption_width=32)
    monkeypatch.setattr(training.recipes, "EMOJI_TRANSFORMER", small)
    monkeypatch.setattr(training, "CANVAS_PX", 64)
    monkeypatch.setattr(training, "SCHEDULE", dataclasses.replace(training.SCHEDULE, batch=2))
    monkeypatch.setattr(training, "IMAGES", 4)


def test_both_sides_train_by_the_same_losses(tiny_training, capsys):
    """Student and critic of ours against the same formulas on diffusers' transformer: losses, tangents, logits."""
    sides = [training.Training(side, CPU, torch.float32).turn(1) for side in ("ours", "theirs")]
    torch.testing.assert_close(*sides, rtol=1e-3, atol=1e-5)
    assert len(sides[0]) == 8  # of sCM, its tangents and LADD, and of the critic
    words = ["--parts", "train", "--against", "diffusers", "--runs", "1", "--device", "cpu", "--dtype", "fp32"]
    assert bench.main(words) == 0
    row = last_line(capsys)["parts"]["train"]
    assert row["difference"] < 1e-3
    assert row["ours"]["images_per_sec"] == pytest.approx(4 / row["ours"]["median_sec"], rel=1e-3)


def test_outputs_are_not_trivially_equal(small):
    """They depend on the seed and, where a prompt takes part, on the prompt."""
    ours = small(None)
    with torch.inference_mode():
        for part in ("text", "step", "encode", "decode", "total"):
            first, second = (getattr(ours, part)(seed) for seed in (1, 2))
            assert first.isfinite().all() and (first - second).abs().max() > 1e-3 * first.abs().max(), part
        assert torch.equal(ours.same_text(1), ours.same_text(2))
        assert ours.batch(1).shape == (4, 64, 64, 3)
        torch.testing.assert_close(ours.batch(1)[:1], ours.total(1), rtol=1e-4, atol=1e-4)


def test_parts_compute_what_they_say(small):
    """A controlled step with an untrained ControlNet is the plain one; the full-size row has seven blocks."""
    ours = small(torch.bfloat16)
    with torch.inference_mode():
        assert len(ours.net.transformer_blocks) == 7
        assert torch.equal(ours.step(1), ours.control(1)) and torch.equal(ours.control(1), ours.hint(1))
        assert ours.step(1).shape == (1, 32, 2, 2) and ours.decode(1).shape == (1, 3, 64, 64)
        assert ours.text(1).shape == (networks.SHORT + 2, 32) and ours.long_text(1).shape == (300, 32)


def test_a_profile_says_where_the_time_goes(small, capsys):
    words = ["--model", "0.6B", "--runs", "1", "--device", "cpu", "--profile"]
    assert bench.main(["--parts", "text,step,decode", *words]) == 0
    rows = last_line(capsys)["parts"]
    assert "matrix products" in rows["text"]["ours"]["shares"]  # it is not one that was kept
    for part in ("step", "decode"):
        shares = rows[part]["ours"]["shares"]
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3) and "convolutions" in shares
        assert list(shares.values()) == sorted(shares.values(), reverse=True)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_layer_norm", "norms"),
        ("aten::_to_copy", "copies"),
        ("aten::silu_", "activations and sums"),
        ("aten::addcmul", "activations and sums"),
        ("aten::arange", "other"),
    ],
)
def test_kinds_of_operations(operation, kind):
    assert shares.kind(operation) == kind


def test_errors_are_those_of_rounding(small, capsys):
    words = ["--model", "0.6B", "--parts", "text,step,encode,decode", "--runs", "2", "--seeds", "2", "--dtype", "bf16"]
    assert bench.main([*words, "--device", "cpu", "--against", "diffusers"]) == 0
    for name, row in last_line(capsys)["parts"].items():
        for side in ("ours", "theirs"):
            assert name == "same_text" or 1e-4 < row[side]["error"] < 0.2, name


def test_loading_and_memory_come_from_processes_of_their_own(small, capsys):
    words = ["--model", "0.6B", "--parts", "load", "--runs", "1", "--dtype", "fp32"]
    assert bench.main([*words, "--device", "cpu"]) == 0
    parts = last_line(capsys)["parts"]
    assert set(parts) == {"load", "alone"}
    assert parts["load"]["ours"]["median_sec"] > 0 and parts["alone"]["ours"]["peak_mib"] > 100


def test_what_such_a_process_does_on_both_sides(small, capsys, tmp_path):
    """Here in this process, which spares the start of more."""
    alone.write(small(None), tmp_path)
    for side in ("ours", "theirs"):
        alone.main(side, str(tmp_path), "64", "fp32")
        result = last_line(capsys)
        assert result["load_sec"] > 0 and result["picture_sec"] > 0 and result["peak_mib"] > 100


def test_the_sweep_draws_what_it_measured(small, tmp_path, capsys, monkeypatch):
    """Both sides up to PAIRED_PX, beyond it ours alone, and its decoder by tiles beyond UNTILED_PX."""
    monkeypatch.setattr(sweep, "BATCH_PX", 64)
    monkeypatch.setattr(sweep, "PAIRED_PX", 64)
    monkeypatch.setattr(sweep, "UNTILED_PX", 64)
    path = tmp_path / "plot.png"
    words = ["--model", "0.6B", "--plot", str(path), "--plot-sizes", "64,128", "--runs", "1", "--device", "cpu"]
    assert bench.main([*words, "--against", "diffusers"]) == 0
    result = last_line(capsys)["plot"]
    for part in ("step", "decode"):
        assert result[part]["ours"].keys() == {"64", "128"} and result[part]["theirs"].keys() == {"64"}
    assert result["batch"]["ours"].keys() == {"1", "2", "4"}
    per_megapixel = result["decode"]["ours"]["128"] / (128**2 / 1e6)
    assert result["tiled_decode_sec_per_megapixel"] == pytest.approx(per_megapixel, rel=1e-3)
    colours = {pixel for _, pixel in Image.open(path).convert("RGB").getcolors(10**6)}
    for colour in sweep.LINES.values():
        assert ImageColor.getrgb(colour) in colours


def test_exponents():
    assert sweep.exponent({"256": 9.0, "512": 1.0, "1024": 4.0, "2048": 16.0}) == pytest.approx(1.0)
    assert sweep.exponent({"512": 1.0, "1024": 16.0}) == pytest.approx(2.0)
    assert sweep.exponent({"512": 1.0}) is None


def test_medians_and_ratios():
    record = {"ours": measure.Taken([1.0, 2.0, 9.0], flops=2_000_000_000_000), "theirs": measure.Taken([3.0, 5.0, 4.0])}
    row = bench.rows({"step": record}, peak_flops=4e12)["step"]
    assert row["ours"] == {"median_sec": 2.0, "min_sec": 1.0, "max_sec": 9.0, "tflop": 2.0, "of_peak": 0.25}
    assert (row["ratio"], row["steps"]) == (2.0, 1.0)
    lines = bench.table({"step": row}).splitlines()
    assert lines[0].split()[:3] == ["seconds", "theirs", "speed-up"]
    assert lines[1].split()[:4] == ["step", "2", "4", "2"]
    assert "speed-up = theirs / ours, in seconds" in lines and not any(line.startswith("error") for line in lines)


def test_the_stand_in_tokenizer_pads_as_the_real_one():
    words = networks.Words(1000)
    ids = words.encode("a cat, a dog")
    assert ids[0] == 2 and len(ids) == 6 and ids[1] == ids[4] != ids[2]
    both = words(["a cat, a dog", "a"], max_length=8, padding="max_length")
    assert both.input_ids.tolist()[0] == [*ids, 0, 0] and both.attention_mask.sum(1).tolist() == [6, 2]


def test_every_seed_has_a_prompt_of_its_own_for_every_tokenizer(small):
    seeds = range(-1, 6)
    for ours in (small(None), networks.Ours("demo", None, CPU, None)):
        tokens = [ours.text_encoder.tokens(networks.prompt_of(networks.SHORT, seed)) for seed in seeds]
        assert len({tuple(t.ids) for t in tokens}) == len(seeds)
        assert {len(t.ids) for t in tokens} == {len(ours.text_encoder.prompts.prefix_ids) + networks.SHORT + 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "step,nap"], "--parts nap: there are text, long_text"),
        (["--runs", "0"], "--runs is 0"),
        (["--size", "100"], "--size 100: a multiple of 32"),
        (["--device", "tpu"], "--device tpu"),
        (["--plot", "a.png", "--plot-sizes", "512,x"], "--size x: a multiple of 32"),
        (["--seeds", "3", "--runs", "2", "--dtype", "bf16"], "--seeds is 3"),
        (["--seeds", "2", "--device", "cpu", "--dtype", "fp32"], "add --dtype bf16"),
        (["--against", "diffusers"], "choose --model 0.6B"),
        (["--against", "openvino"], "choose --model 0.6B"),
        (["--model", "0.6B", "--against", "openvino", "--compile"], "goes without --plot, --compile and the parts"),
        (["--busy", "-1"], "--busy -1: a number of processes from 0 to 64"),
        (["--compile", "--parts", "text"], "--compile: of these parts nothing is compiled"),
        (["--compile", "--profile"], "one at a time"),
        (["--plot", "new/a.png", "--profile"], "one at a time"),
        (["--plot", "new/a.gif"], "--plot new/a.gif: name it .png"),
        (["--parts", "load", "--device", "cpu"], "choose --model 0.6B"),
    ],
)
def test_refused(words, message, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(words) == 1
    assert message in caplog.text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("cpuinfo", "name"), [("flags: x\nmodel name\t: A B\n", "A B"), ("flags: x\n", "fallback")])
def test_the_cpu_has_a_name(monkeypatch, cpuinfo, name):
    monkeypatch.setattr("builtins.open", lambda path: io.StringIO(cpuinfo))
    monkeypatch.setattr(bench.platform, "processor", lambda: "fallback")
    assert bench._cpu_name() == name


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch, caplog):
    """Before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.main(["--plot", str(tmp_path / "new" / "a.png"), "--device", "cpu"]) == 1
    assert "pip install matplotlib" in caplog.text and not list(tmp_path.iterdir())


def test_without_diffusers_it_says_so(small, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert bench.main(["--model", "0.6B", "--against", "diffusers", "--device", "cpu"]) == 1
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert bench.main(["--model", "0.6B", "--against", "openvino", "--device", "cpu"]) == 1
    assert "install it first, with pip install --group openvino" in caplog.text
    assert bench.main(["--parts", "train", "--against", "diffusers", "--device", "cpu"]) == 1
    assert caplog.text.count("pip install diffusers") == 2 and theirs.CAPTION_TOKENS == 300


def test_int8_beside_bf16(capsys):
    """Its error is that of 8 bits, and both ways are timed."""
    assert int8.main(["--tokens", "8", "--runs", "1"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["layers"]
    assert set(rows) == {"attention", "into Mix-FFN", "out of it"}
    for row in rows.values():
        assert 0.003 < row["int8"]["error"] < 0.02 and row["bf16"]["error"] < 0.004
        assert all(way["ms"] > 0 for way in row.values())
