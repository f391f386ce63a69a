"""python -m sprint_core.batch: the images of the pipeline, exactly one for each row, whatever ends a run."""

import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import standin
import torch
from PIL import Image
from processes import ROOT

from sprint_core.batch import __main__ as command_line
from sprint_core.batch import cluster
from sprint_core.batch.folder import Claims, Folder
from sprint_core.batch.generate import Generate, Settings
from sprint_core.pipeline import Pipeline

COUNT = 10
SMALL = ("--size", "64x64", "--batch", 2, "--shard-rows", 4, "--threads", 1, "--image-format", "png")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return standin.make(tmp_path_factory.mktemp("models") / "sprint")


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"a cat of {i} kilograms\n" for i in range(COUNT)))
    return file


def command(capsys, *words) -> dict:
    """Run it; the last line of its output, read as JSON."""
    capsys.readouterr()
    assert command_line.main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def refusal(caplog, *words) -> str:
    caplog.clear()
    assert command_line.main([str(word) for word in words]) == 1
    return caplog.records[-1].getMessage()


def shards(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.glob("train-*"))}


def samples(out: Path) -> list[tuple[np.ndarray, str, dict]]:
    """(image, caption, about) of all rows in tars, read with tarfile alone."""
    import tarfile

    rows = []
    for file in sorted(out.glob("*.tar")):
        with tarfile.open(file) as tar:
            data = [tar.extractfile(member).read() for member in tar]
        rows += [
            (np.asarray(Image.open(io.BytesIO(image))), text.decode(), json.loads(about))
            for image, text, about in zip(data[::3], data[1::3], data[2::3], strict=True)
        ]
    return rows


# --- what is made -------------------------------------------------------------------------------------


def test_images_are_the_pipelines_own(model, tmp_path, capsys):
    """Rows of two sizes, one with a negative prompt, one with an image, in batches of one kind each."""
    Image.fromarray((np.random.default_rng(0).random((50, 70, 3)) * 255).astype(np.uint8)).save(tmp_path / "in.png")
    table = [
        {"prompt": "a cat", "id": "cat"},
        {"prompt": "a dog, wide", "width": 96, "steps": 1, "guidance": 3, "seed": 5},
        {"prompt": "a cow, and a horse"},
        {"prompt": "a hen", "negative": "a fox"},
        {"prompt": "a pig", "image": "in.png"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in table))
    result = command(capsys, file, "--model", model, "--out", tmp_path / "out", *SMALL, "--shard-rows", 5, "--seed", 3)
    assert result["rows"] == result["images"] == 5 and result["shards"] == 1 and not result["failures"]
    pipeline = Pipeline.load(model)
    source = Image.open(tmp_path / "in.png").resize((64, 64), Image.Resampling.LANCZOS, box=(10, 0, 60, 50))
    image = torch.from_numpy(np.asarray(source, np.float32) / 255)[None]
    small = {"size": (64, 64)}
    wanted = {
        "cat": pipeline.generate(["a cat", "a cow, and a horse"], seeds=[3, 5], **small)[0],
        "000000002": pipeline.generate(["a cat", "a cow, and a horse"], seeds=[3, 5], **small)[1],
        "000000001": pipeline.generate(["a dog, wide"], seeds=[5], size=(96, 64), steps=1, guidance=3.0)[0],
        "000000003": pipeline.generate(["a hen"], seeds=[6], negative="a fox", **small)[0],
        "000000004": pipeline.generate(["a pig"], seeds=[7], image=image, strength=0.6, **small)[0],
    }
    made = samples(tmp_path / "out")
    assert [about["id"] for *_, about in made] == ["cat", "000000002", "000000001", "000000003", "000000004"]
    for pixels, caption, about in made:
        assert np.array_equal(pixels, wanted[about["id"]].mul(255).round().byte().numpy()), about
        assert caption == about["prompt"]
    assert made[2][2] == {
        "id": "000000001", "prompt": "a dog, wide", "seed": 5, "steps": 1, "guidance": 3.0, "width": 96, "height": 64,
        "model": result["job"]["model"], "version": "0.2.0",
    }  # fmt: skip
    assert made[3][2]["negative"] == "a fox" and made[4][2]["image_from"] == "in.png"
    assert result == result | json.loads((tmp_path / "out" / "manifest.json").read_text())


def test_a_teachers_images_are_its_own(tmp_path, capsys, caplog):
    """Of a multi-step model guidance is its cfg, and it has 20 steps; what it does not read costs a row."""
    model = standin.make(tmp_path / "teacher", standin.TEACHER)
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,negative,steps,image\na cat,,,\na cow,a dog,2,\na hen,,2,a.png\na pig,,1001,\n")
    words = (file, "--model", model, *SMALL, "--guidance", 3, "--out", tmp_path / "out")
    result = command(capsys, *words)
    assert result["failures"] == {"image": 1, "steps": 1}
    pipeline = Pipeline.load(model, multistep=True)
    texts = {text: pipeline.encode_text([text]) for text in ("a cat", "a cow", "a dog")}
    cat = pipeline.generate_multistep(texts["a cat"], seeds=[0], size=(64, 64), steps=20, cfg=3.0)
    cow = pipeline.generate_multistep(
        texts["a cow"], seeds=[1], size=(64, 64), steps=2, cfg=3.0, negative=texts["a dog"]
    )
    for (pixels, _, about), wanted in zip(samples(tmp_path / "out"), (cat, cow), strict=True):
        assert np.array_equal(pixels, wanted[0].mul(255).round().byte().numpy())
        assert about["guidance"] == 3.0 and about["steps"] == (20 if about["prompt"] == "a cat" else 2)
    message = refusal(caplog, *words, "--schedule", "paper")
    assert "--schedule paper: of SANA-Sprint; a multi-step model has its own" in message


@pytest.mark.parametrize("image_format", ["jpg", "webp", "png"])
def test_control_images_and_formats_of_files(tmp_path, capsys, image_format):
    """With the bundled model and its ControlNet; JPEG and WebP are those of the PNG's pixels."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "c.png")
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,control\na red circle,\na red circle,c.png\n")
    options = ("--size", "64x64", "--steps", 1, "--seed", 2, "--quality", 90, "--format", "folder")
    command(capsys, file, "--out", tmp_path / "out", *options, "--image-format", image_format)
    folder = tmp_path / "out" / "train-00000-of-00001"
    pipeline = Pipeline.load(command_line.generate.presets.BUNDLED)
    plain = pipeline.generate(["a red circle"], seeds=[2], size=(64, 64), steps=1)[0].mul(255).round().byte().numpy()
    buffer = io.BytesIO()
    quality = {} if image_format == "png" else {"quality": 90}
    Image.fromarray(plain).save(buffer, {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[image_format], **quality)
    assert (folder / f"000000000.{image_format}").read_bytes() == buffer.getvalue()
    steered = np.asarray(Image.open(folder / f"000000001.{image_format}"))
    assert np.abs(steered.astype(int) - plain.astype(int)).max() > 10


def test_a_row_that_cannot_be_made_is_recorded_and_the_rest_goes_on(model, tmp_path, capsys):
    table = [
        {"prompt": "a cat", "width": 70},
        {"prompt": "a cat", "height": 32},
        {"prompt": "a cat"},
        {"prompt": "cats " * 300},
        {"prompt": "a cat", "steps": 41},
        {"prompt": "a cat", "guidance": 0},
        {"prompt": "a cat", "image": "nowhere.png"},
        {"prompt": "a dog"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in table))
    result = command(capsys, file, "--model", model, "--out", tmp_path / "out", *SMALL)
    counts = {"size": 2, "guidance": 1, "image": 1, "prompt too long": 1, "steps": 1}
    assert (result["images"], result["failed"], result["failures"]) == (2, 6, counts)
    lines = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    reasons = {line["row"]: line["reason"] for line in lines}
    assert sorted(reasons) == [0, 1, 3, 4, 5, 6]
    assert "70x64: both must be multiples of 32; 64x64 is near" in reasons[0] and "64 to 8192" in reasons[1]
    assert "longer than the 300 tokens" in reasons[3] and "1 to 40 steps, not 41" in reasons[4]
    assert "guidance is 0" in reasons[5] and "nowhere.png: no such file" in reasons[6]
    assert [about["prompt"] for *_, about in samples(tmp_path / "out")] == ["a cat", "a dog"]


def test_a_shard_without_images_is_done_too(model, tmp_path, capsys):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,width\n" + "a cat,70\n" * 4 + "a cat,64\n")
    result = command(capsys, file, "--model", model, "--out", tmp_path / "out", *SMALL)
    assert (result["images"], result["failed"], result["shards"]) == (1, 4, 1)
    assert list(shards(tmp_path / "out")) == ["train-00001-of-00002.tar"]
    again = command(capsys, file, "--model", model, "--out", tmp_path / "out", *SMALL)
    assert again["run"]["images"] == 0 and again["images"] == 1


def test_weights_of_nan_fail_row_by_row(model, tmp_path, prompts, capsys):
    """Each is recorded with what the pipeline says, which names the weights."""
    from sprint_core.weights import checkpoint, layouts

    transformer = checkpoint.load(model, layouts.TRANSFORMER)
    transformer.tensors = {name: tensor * float("nan") for name, tensor in transformer.tensors.items()}
    checkpoint.save(tmp_path / "nan.safetensors", [transformer], {})
    words = ("--model", tmp_path / "nan.safetensors", "--vae", model, "--text-encoder", model)
    result = command(capsys, prompts, *words, "--out", tmp_path / "out", *SMALL)
    assert result["images"] == 0 and result["failures"] == {"NaN": COUNT}
    line = json.loads((tmp_path / "out" / "failures.jsonl").read_text().splitlines()[0])
    assert "of the transformer holds NaN" in line["reason"]


# --- exactly once, bit for bit ------------------------------------------------------------------------


def test_all_ways_to_run_give_the_same_bytes(model, tmp_path, prompts, capsys):
    """One worker, two, one after another, two parts in turn, and stopped and resumed."""
    base = (prompts, "--model", model, *SMALL)
    one = command(capsys, *base, "--out", tmp_path / "one")
    two = command(capsys, *base, "--out", tmp_path / "two", "--workers", 2)
    command(capsys, *base, "--out", tmp_path / "slow", "--one-after-another")
    first = command(capsys, *base, "--out", tmp_path / "parts", "--shard", "1/2")
    assert "unfinished" in first and not (tmp_path / "parts" / "manifest.json").exists()
    assert list(shards(tmp_path / "parts")) == ["train-00001-of-00003.tar"]
    parts = command(capsys, *base, "--out", tmp_path / "parts", "--shard", "0/2")
    wanted = shards(tmp_path / "one")
    assert len(wanted) == 3
    for way in ("two", "slow", "parts"):
        assert shards(tmp_path / way) == wanted, way
    assert one["pixels_sha256"] == two["pixels_sha256"] == parts["pixels_sha256"]
    (tmp_path / "two" / "train-00001-of-00003.tar").unlink()
    again = command(capsys, *base, "--out", tmp_path / "two")
    assert again["run"]["images"] == 4 and shards(tmp_path / "two") == wanted


def start(*words: object, **options) -> subprocess.Popen:
    line = [sys.executable, "-m", "sprint_core.batch", *map(str, words)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_a_random_moment_and_resumed(model, tmp_path, capsys, workers):
    """SIGKILL of the command after its first shard: nothing is lost, nothing comes twice, no worker stays behind."""
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("".join(f"a cat of {i} kilograms\n" for i in range(40)))
    base = (file, "--model", model, *SMALL, "--steps", 4)
    process = start(*base, "--out", out, "--workers", workers)
    while not list(out.glob("train-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(random.Random(workers).uniform(0, 0.2))
    process.kill()
    process.communicate()
    before = shards(out)
    assert 0 < len(before) < 10
    result = command(capsys, *base, "--out", out)
    wanted = command(capsys, *base, "--out", tmp_path / "whole")
    assert shards(out) == shards(tmp_path / "whole") and result["pixels_sha256"] == wanted["pixels_sha256"]
    assert [about["id"] for *_, about in samples(out)] == [f"{i:09d}" for i in range(40)]
    assert result["run"]["images"] <= 40 - 4 * len(before)
    assert not [file for file in (out / ".batch").iterdir() if file.name.startswith("train-")]


def test_two_commands_on_one_folder_share_its_shards(model, tmp_path, prompts):
    """Neither makes what the other has; both end with all of it."""
    words = (prompts, "--model", model, *SMALL, "--steps", 4, "--out", tmp_path / "out")
    both = [start(*words), start(*words)]
    results = [json.loads(process.communicate()[0].splitlines()[-1]) for process in both]
    assert [result["images"] for result in results] == [COUNT, COUNT]
    assert sum(result["run"]["images"] for result in results) == COUNT
    assert [about["id"] for *_, about in samples(tmp_path / "out")] == [f"{i:09d}" for i in range(COUNT)]


def test_a_shard_that_another_process_makes_is_left_to_it(tmp_path):
    folder = Folder(tmp_path, 4, "tar")
    code = f"""
import sys
from pathlib import Path
from sprint_core.batch.folder import Claims, Folder
claims = Claims(Folder(Path({str(tmp_path)!r}), 4, "tar"))
print(claims.take(2), flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "True\n"
    claims = Claims(folder)
    assert claims.take(1) and not claims.take(2)
    other.kill()
    other.communicate()
    assert claims.take(2)  # the system gave it back


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit of a file's size")
def test_a_full_disk_costs_the_shard_in_flight(model, tmp_path, prompts, capsys):
    words = (prompts, "--model", model, *SMALL, "--out", tmp_path / "out")
    command(capsys, *words)
    wanted = shards(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    limit = len(wanted["train-00000-of-00003.tar"]) - 20000

    import resource

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(*words, preexec_fn=small_files)
    errors = process.communicate()[1].splitlines()
    assert process.returncode == 1 and "train-00000-of-00003.tar: not written (File too large); make room" in errors[-1]
    assert not shards(tmp_path / "out")
    command(capsys, *words)
    assert shards(tmp_path / "out") == wanted


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_says_how_to_go_on(model, tmp_path):
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a cat\n" * 200)
    process = start(file, "--model", model, *SMALL, "--out", out)
    while not list(out.glob("train-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.splitlines()[-1] == "stopped; the same command goes on"
    assert "Traceback" not in errors


# --- what cannot work is said before the first image ----------------------------------------------------


def test_another_jobs_folder_is_refused(model, tmp_path, prompts, capsys, caplog):
    words = (prompts, "--model", model, *SMALL, "--out", tmp_path / "out")
    command(capsys, *words)
    made = shards(tmp_path / "out")
    other = standin.make(tmp_path / "other", seed=1)
    for change, name in (
        (("--steps", 1), "steps is None, not 1"),
        (("--seed", 1), "seed is 0, not 1"),
        (("--model", other), "model is "),
        (("--batch", 1), "batch is 2, not 1"),
        (("--format", "folder"), "format is tar, not folder"),
        (("--threads", 2), "threads is 1, not 2"),
    ):
        message = refusal(caplog, *words, *change)
        assert f"of another job, whose {name}" in message and message.endswith("or the same options and prompts")
    prompts.write_text(prompts.read_text().replace("cat", "dog"))
    assert "of another job, whose prompts is " in refusal(caplog, *words)
    assert shards(tmp_path / "out") == made
    command(capsys, *words, "--out", tmp_path / "bf16", "--dtype", "bf16")
    assert "whose dtype is bf16, not None" in refusal(caplog, *words, "--out", tmp_path / "bf16")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("mine")
    assert "mine: not empty, and not of this command" in refusal(caplog, *words, "--out", tmp_path / "mine")


def test_threads_stay_those_of_the_first_command(model, tmp_path, prompts, capsys):
    """Since images depend on them, and another machine has another number of cores."""
    words = (prompts, "--model", model, "--size", "64x64", "--out", tmp_path / "out")
    assert command(capsys, *words, "--threads", 3)["job"]["threads"] == 3
    assert command(capsys, *words)["job"]["threads"] == 3
    usual = command(capsys, prompts, "--model", model, "--size", "64x64", "--out", tmp_path / "usual")
    assert usual["job"]["threads"] == os.cpu_count()
    assert torch.get_num_threads() == 1  # as before: conftest.py


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch", "0"), "--batch is 0; it must lie in 1 to 4096"),
        (("--quality", "101"), "--quality is 101"),
        (("--workers", "0"), "--workers is 0; it must be at least 1"),
        (("--shard", "2/2"), "--shard 2/2: write K/N, with K from 0 to N - 1"),
        (("--shard", "one"), "--shard one: write K/N"),
        (("--device", "cpu,nowhere"), "--device nowhere:"),
        (("--device", "cpu,cpu", "--workers", "1"), "--workers 1: fewer than the 2 devices"),
        (("--size", "70x64"), "--size 70x64: both must be multiples of 32"),
        (("--schedule", "fast"), "a custom schedule is a list of angles"),
        (("--steps", "41"), "1 to 40 steps, not 41"),
        (("--seed", "-1"), "--seed is -1"),
        (("--negative-scale", "0.5"), "scale is 0.5; it must lie in 1 to 50"),
        (("--control-strength", "11"), "strength is 11"),
        (("--model", "nowhere"), "nowhere: no such file"),
        (("--control-model", "nowhere"), "nowhere: no such file"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(tmp_path, prompts, caplog, words, message):
    with caplog.at_level(logging.INFO):
        assert message in refusal(caplog, prompts, "--out", tmp_path / "out", *words)
    assert "parameters" not in caplog.text and not (tmp_path / "out").exists()


def test_a_broken_row_is_named_before_the_first_image(tmp_path, caplog):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat"}\n' * 50 + '{"prompt": "a dog"')
    message = refusal(caplog, file, "--out", tmp_path / "out")
    assert message.startswith("error: ") and "prompts.jsonl, line 51: not JSON" in message
    assert not (tmp_path / "out").exists()


def test_without_ray_the_engine_says_how_to_install_it(tmp_path, prompts, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = refusal(caplog, prompts, "--out", tmp_path / "out", "--engine", "ray")
    assert message == "error: --engine ray: Ray is missing; install it with: pip install --group ray"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("cpus", "count", "threads"), [(2, 2, 1), (3, 2, 1), (4, 2, 8), (16, 5, 3), (64, 8, 8)])
def test_actors_of_ray_leave_a_cpu_free(cpus, count, threads):
    """Ray's own tasks take a whole one, or wait for ever; where there is enough, an actor has as many as threads."""
    of_one = cluster.cpus_of_an_actor(cpus, count, threads)
    assert 0 < count * of_one <= cpus - 1
    assert of_one == threads or count * threads > cpus - 1


def test_weights_are_the_same_in_inference_mode():
    """In which those that are made do not say whether they changed, so that a CPU would multiply by others."""
    with torch.inference_mode():
        made = Generate(Settings(dtype="bf16"))
        networks = made.pipeline.transformer, made.pipeline.autoencoder, made._control_net()
    assert not any(parameter.is_inference() for network in networks for parameter in network.parameters())
