"""Weights in 8 bits: by their formulas, whole weights or a few rows at a time, and without a second copy in memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from residence import resident_bytes

from sprint_core.weights import quantise, tensorfile

ROOT = Path(__file__).resolve().parents[3]
LINEAR, CONVOLUTION = "transformer_blocks.0.attn1.to_q.weight", "transformer_blocks.0.ff.conv_point.weight"


@pytest.mark.parametrize("block_elements", [1, 100, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 33), (12, 33, 1, 1)])
def test_the_bytes_follow_from_the_formulas(monkeypatch, shape, dtype, block_elements):
    """w / scale to the nearest; scale = largest / 448 of the whole weight, or largest / 127 of each row."""
    monkeypatch.setattr(quantise, "BLOCK_ELEMENTS", block_elements)
    name = LINEAR if len(shape) == 2 else CONVOLUTION
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[3] *= 50
    rows = weight.float().reshape(12, 33)

    fp8 = quantise.quantised({name: weight}, "transformer", "fp8_e4m3fn")
    scale = rows.abs().max() / 448
    assert torch.equal(fp8[name.replace("weight", "weight_scale")], scale)
    assert torch.equal(fp8[name].float(), (rows / scale).to(torch.float8_e4m3fn).float().reshape(shape))

    int8 = quantise.quantised({name: weight}, "transformer", "int8")
    scales = rows.abs().amax(1, keepdim=True) / 127
    assert torch.equal(int8[name.replace("weight", "weight_scale")], scales)
    assert torch.equal(int8[name], (rows / scales).round().to(torch.int8).reshape(shape))


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_what_was_quantised_leaves_memory(tmp_path):
    weight = torch.randn(1024, 1024)
    tensorfile.write(tmp_path / "x.safetensors", {LINEAR: weight}, {})
    tensors = tensorfile.read(tmp_path / "x.safetensors").tensors
    out = quantise.quantised(tensors, "transformer", "int8")
    assert resident_bytes(tensors[LINEAR]) < 0.1 * weight.nbytes
    assert torch.equal(tensors[LINEAR], weight) and out[LINEAR].nbytes == weight.numel()


PEAK = """
import sys
from pathlib import Path
from sprint_core.weights import quantise, tensorfile

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024

tensors = tensorfile.read(sys.argv[1]).tensors
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
out = quantise.quantised(tensors, "transformer", "int8")
print(sum(t.nbytes for t in out.values()) / 2**20, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_the_peak_is_the_8_bit_size_and_one_tensor(tmp_path):
    """Of 160 MiB in bf16, 32 MiB each."""
    tensors = {LINEAR.replace("0", str(i)): torch.full((4096, 4096), 0.1, dtype=torch.bfloat16) for i in range(5)}
    tensorfile.write(tmp_path / "x.safetensors", tensors, {})
    command = [sys.executable, "-c", PEAK, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    made_mib, peak_mib = map(float, done.stdout.split())
    assert 80 <= made_mib < 81
    assert made_mib < peak_mib < made_mib + 32 + 96  # and some blocks of rows in fp32; all tensors are 160
