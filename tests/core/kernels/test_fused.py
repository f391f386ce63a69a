"""Fused kernels: their values in Triton's interpreter, their code for GPUs, and when they stand aside."""

import sys
from collections import Counter
from typing import Any
from unittest import mock

import kernel_cases
import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import sprint_core.kernels
from benchmarks import launches
from sprint_core.kernels import fused
from sprint_core.models import layers

triton = pytest.importorskip("triton", reason="only Linux's torch comes with Triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

LIMITS = {"fp32": 1e-6, "bf16": 5e-3}  # the interpreter rounds to bf16 towards zero


@pytest.fixture(scope="module")
def interpreted() -> tuple[dict[str, float], Counter[str]]:
    """What kernel_cases.py finds. Triton asks when it is imported whether it is to interpret: here a second time."""
    first = of_triton()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in first:
            del sys.modules[name]
        forget_kernels()
        try:
            results = kernel_cases.run(patch)
        finally:
            for name in of_triton():  # all of it: a module that only the second had would serve the first
                del sys.modules[name]
            sys.modules.update(first)
            forget_kernels()
    return results


def of_triton() -> dict[str, Any]:
    return {
        name: module
        for name, module in sys.modules.items()
        if name.split(".")[0] == "triton" and not name.startswith("triton._C")
    }


def forget_kernels() -> None:
    """As they are those of one Triton."""
    sys.modules.pop("sprint_core.kernels.source", None)
    vars(sprint_core.kernels).pop("source", None)
    fused.source.cache_clear()
    fused.interprets.cache_clear()


@pytest.mark.parametrize("dtype", LIMITS)
def test_each_kernel_computes_its_equation(interpreted, dtype):
    errors = {case: error for case, error in interpreted[0].items() if dtype in case}
    assert len(errors) > 40
    assert {case: error for case, error in errors.items() if not error < LIMITS[dtype]} == {}  # nor NaN


@pytest.mark.parametrize("network", ["transformer", "controlnet", "decoder", "encoder", "text_encoder"])
def test_networks_are_the_same_with_them(interpreted, network):
    """And without those that read a weight, where a host casts weights on their way."""
    assert interpreted[0][network] < 1e-5
    assert interpreted[0][f"{network} whose weights are cast"] < 1e-5


def test_every_kernel_was_asked(interpreted):
    kernels = {name for name, kernel in vars(fused.source()).items() if isinstance(kernel, triton.JITFunction)}
    assert set(interpreted[1]) == kernels - {"tanh"}


TARGETS = {
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.bool: "*i1"}


@pytest.fixture(scope="module")
def launched() -> list[tuple]:
    """What the parts of the 1.6B launch for an image of 1024 px: each kernel with its constants once."""
    kernels = {}

    def record(kernel: Any, grid: tuple[int, ...], out: Tensor, *args: Any, warps: int = 4, **constants: Any) -> None:
        signature, aligned = dict.fromkeys(constants, "constexpr"), {}
        for i, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=False)):  # before the constants
            kind = "fp32" if isinstance(arg, float) else "i32"
            signature[name] = POINTERS[arg.dtype] if isinstance(arg, Tensor) else kind
            if isinstance(arg, Tensor) or (isinstance(arg, int) and not arg % 16):  # as Triton finds out by itself
                aligned[i,] = [["tt.divisibility", 16]]
        kernels[str((kernel.__name__, signature, constants))] = (kernel, signature, constants, aligned, warps)

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        for call in launches.parts("1.6B", 1024, torch.bfloat16).values():
            with launches.launched_by(record):
                call()
    return list(kernels.values())


@pytest.mark.parametrize("target", TARGETS)
def test_they_compile_for_gpus(launched, target, tmp_path, monkeypatch):
    """With Triton's own compilers, which need no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or what an earlier run compiled would pass
    assert len({kernel.__name__ for kernel, *_ in launched}) == 9
    for kernel, signature, constants, aligned, warps in launched:
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": warps})
        assert compiled.asm["cubin" if target.startswith("sm") else "hsaco"], kernel.__name__


def layer(**attributes: Any) -> nn.Module:
    made = nn.RMSNorm(4)
    vars(made).update(attributes)
    return made


def hooked(register: str) -> nn.Module:
    made = nn.RMSNorm(4)
    getattr(made, register)(lambda *_: None)
    return made


@pytest.mark.parametrize(
    "other",
    [
        layer(comfy_cast_weights=True),
        layer(weight_function=[max]),
        layer(bias_function=[max]),
        layer(forward=max),
        hooked("register_forward_hook"),
        hooked("register_forward_pre_hook"),
        hooked("register_full_backward_hook"),
        hooked("register_full_backward_pre_hook"),
        peft.tuners.lora.layer.Embedding(nn.Embedding(6, 4), "a", LoraConfig(), r=2),
        nn.RMSNorm(4, device="meta"),
        nn.utils.parametrize.register_parametrization(nn.RMSNorm(4), "weight", nn.ReLU()),
    ],
)
def test_weights_that_are_changed_on_their_way_are_not_read(other):
    cpu = torch.device("cpu")
    assert layers.uses_its_weight(layer(comfy_cast_weights=False, weight_function=[]), cpu)
    assert not layers.uses_its_weight(other, cpu)


def test_they_are_for_inference_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(fused, "interprets", lambda: True)
    x = torch.zeros(4)
    with torch.inference_mode():
        assert not fused.serves(x)  # tests run without the switch
        monkeypatch.setattr(fused, "enabled", True)
        assert fused.serves(x) and not fused.serves(x.double())
        with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
            assert not fused.serves(x)
        monkeypatch.setattr(fused, "interprets", lambda: False)
        assert not fused.serves(x)
        monkeypatch.setattr(fused, "interprets", lambda: True)
        monkeypatch.setattr(fused, "source", lambda: None)
        assert not fused.serves(x)
        monkeypatch.undo()
        monkeypatch.setattr(fused, "interprets", lambda: True)
        monkeypatch.setattr(fused, "enabled", True)
        assert fused.serves(x)
    with torch.no_grad():  # as a stage of the distillation asks its teacher
        assert not fused.serves(x)


def test_without_triton_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    forget_kernels()
    try:
        assert fused.source() is None and fused.source() is None
    finally:
        forget_kernels()
    (line,) = caplog.messages
    assert fused.SWITCH in line and "Triton" in line


def test_a_kernel_that_cannot_run_says_what_to_do():
    class Broken:
        __name__ = "broken"

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise ValueError("no C compiler\nand more")

    full = mock.MagicMock()
    full.__getitem__.return_value.side_effect = torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError):
        fused.launch(full, (1,), torch.zeros(1))
    with pytest.raises(RuntimeError, match=rf"broken .*no C compiler.*start without {fused.SWITCH}$"):
        fused.launch(Broken(), (1,), torch.zeros(1))
