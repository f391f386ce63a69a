"""Their side by OpenVINO on the CPU: diffusers' and transformers' networks converted, their pipelines as they are.

    pip install --group openvino
    python -m benchmarks --model 0.6B --against openvino --dtype bf16

A network is converted when a part first needs it, which takes minutes at full size, and kept in `FOLDER` as long as it
is of the same weights, size and versions.
"""

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.networks import Ours, Words
from benchmarks.theirs import CAPTION_TOKENS, Theirs, instruction
from benchmarks.theirs import version as diffusers_version
from sprint_core.latent import DOWNSCALE, LATENT_CHANNELS

FOLDER = Path(__file__).resolve().parents[1] / ".host" / "openvino"
CPU = torch.device("cpu")
HINTS = {torch.bfloat16: "bf16", torch.float32: "f32"}


def version() -> str:
    """Of OpenVINO. Raises ValueError where it is missing."""
    try:
        import openvino
    except ImportError:
        raise ValueError("--against openvino: install it first, with pip install --group openvino") from None
    return openvino.__version__.partition("-")[0]


class Converted(nn.Module):
    """A compiled network in place of one of diffusers' or transformers', whose other attributes it has.

    network: the original; call: from the original to what OpenVINO traces; example: its inputs. Converted in fp32;
    `dtype` is what it computes in.
    """

    device = CPU

    def __init__(self, network: nn.Module, call: nn.Module, example: Sequence[Tensor], dtype: torch.dtype, name: str):
        super().__init__()
        import openvino

        self.config, self.dtype = network.config, dtype
        path = FOLDER / f"{name}-{_fingerprint(network, example)}.xml"
        core = openvino.Core()
        if not path.is_file():
            tqdm.write(f"OpenVINO converts {name}")
            converted = openvino.convert_model(call, example_input=tuple(example))
            for port, tensor in zip(converted.inputs, example, strict=True):
                port.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
            converted.validate_nodes_and_infer_types()
            path.parent.mkdir(parents=True, exist_ok=True)
            openvino.save_model(converted, path, compress_to_fp16=dtype != torch.float32)
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.request = core.compile_model(path, "CPU", options).create_infer_request()

    def run(self, *inputs: Tensor) -> Tensor:
        """The first output, in the network's precision."""
        arrays = [x.float().numpy() if x.is_floating_point() else x.numpy() for x in inputs]
        return torch.from_numpy(self.request.infer(arrays)[0].copy()).to(self.dtype)


def _fingerprint(network: nn.Module, example: Sequence[Tensor]) -> str:
    """Of the first values of all weights, of shapes and of versions."""
    digest = hashlib.sha256(repr([version(), diffusers_version(), torch.__version__]).encode())
    digest.update(repr([(tuple(x.shape), x.dtype) for x in example]).encode())
    for name, tensor in network.state_dict().items():
        digest.update(repr((name, tuple(tensor.shape), tensor.flatten()[:8].tolist())).encode())
    return digest.hexdigest()[:16]


class _Call(nn.Module):
    """A call of a network with positional inputs, in fp32, for tracing."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.network, self.call = copy.deepcopy(network).float(), call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.network, *inputs)


class _Transformer(Converted):
    def forward(
        self, hidden_states: Tensor, *, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, **others: Any
    ) -> tuple[Tensor]:
        mask = encoder_attention_mask.float()  # whole numbers from their pipeline
        return (self.run(hidden_states, encoder_hidden_states, mask, others["guidance"], others["timestep"]),)


class _Autoencoder(nn.Module):
    """Both halves, by the methods of AutoencoderDC."""

    device = CPU

    def __init__(self, config: Any, dtype: torch.dtype, make: Callable[[str], Converted]):
        super().__init__()
        self.config, self.dtype, self._make = config, dtype, functools.cache(make)

    def encode(self, image: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self._make("encode").run(image),)

    def decode(self, latent: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self._make("decode").run(latent),)


class _TextEncoder(Converted):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.run(input_ids, attention_mask),)


class ByOpenVINO(Theirs):
    """`Theirs` by OpenVINO. Raises ValueError where it is missing, and for a device other than the CPU."""

    def __init__(self, ours: Ours):
        version()
        super().__init__(ours)
        if ours.device.type != "cpu":
            raise ValueError("--against openvino measures on the CPU: add --device cpu")
        self.dtype = ours.dtype

    @property
    def _missing(self) -> None:
        raise AttributeError("not converted")

    control = hint = batch = _missing

    @functools.cached_property
    def transformer(self) -> nn.Module:
        network, side = super().transformer, self.ours.size_px // DOWNSCALE
        width = network.config.caption_channels
        example = (
            torch.zeros(1, LATENT_CHANNELS, side, side),
            torch.zeros(1, CAPTION_TOKENS, width),
            torch.ones(1, CAPTION_TOKENS),
            torch.ones(1),
            torch.ones(1),
        )

        def call(network: nn.Module, x: Tensor, caption: Tensor, mask: Tensor, guidance: Tensor, s: Tensor) -> Tensor:
            how = {"encoder_hidden_states": caption, "encoder_attention_mask": mask, "guidance": guidance}
            return network(x, timestep=s, return_dict=False, **how)[0]

        return _Transformer(network, _Call(network, call), example, self.dtype, "transformer")

    @functools.cached_property
    def autoencoder(self) -> nn.Module:
        network, px = super().autoencoder, self.ours.size_px
        shapes = {"encode": (1, 3, px, px), "decode": (1, LATENT_CHANNELS, px // DOWNSCALE, px // DOWNSCALE)}

        def make(half: str) -> Converted:
            call = _Call(network, lambda network, x: getattr(network, half)(x, return_dict=False)[0])
            return Converted(network, call, [torch.zeros(shapes[half])], self.dtype, half)

        return _Autoencoder(network.config, self.dtype, make)

    @functools.cached_property
    def text_encoder(self) -> nn.Module:
        network = super().text_encoder
        instructed = Words(network.config.vocab_size).encode("\n".join(instruction()))
        ids = torch.ones(1, len(instructed) + CAPTION_TOKENS - 2, dtype=torch.long)  # as their pipeline pads
        call = _Call(network, lambda network, ids, mask: network(ids, attention_mask=mask, use_cache=False)[0])
        return _TextEncoder(network, call, [ids, ids], self.dtype, "text_encoder")
