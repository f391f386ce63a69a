"""How many kernels each part launches on a GPU, and what they move, counted without one.

    python -m benchmarks.launches [--model 0.6B] [--size 1024] [--dtype bf16] [--kernels]

Not a test. Networks without weights run on tensors that only say that they lie on a GPU, and each of torch's operations
that is more than a view counts as one launch. That is a lower bound: some operations are several kernels. With
--kernels those of sprint_core/kernels take their places. The last line is one JSON document.
"""

import argparse
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.networks import LONG, MODELS, SHORT
from sprint_core.devices import DTYPES
from sprint_core.kernels import fused
from sprint_core.latent import DOWNSCALE, LATENT_CHANNELS
from sprint_core.models import layers
from sprint_core.models.autoencoder import Autoencoder
from sprint_core.models.controlnet import PUBLISHED_BLOCKS, ControlNetConfig, SanaControlNet
from sprint_core.models.gemma import Gemma, GemmaConfig, KVPrefix
from sprint_core.models.layers import Unset
from sprint_core.models.tiny_autoencoder import TinyAutoencoder
from sprint_core.models.transformer import SanaTransformer
from sprint_core.weights import presets

PREFIX = 220  # tokens of the authors' instruction
MOST = 12  # operations of a part that are named
VIEWS = {  # and questions
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "device", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "new_empty", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations by name, and the bytes that each reads and writes at least once."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if name not in VIEWS and any(tensor.is_cuda for tensor in tensors):
            self.names[name] += 1
            self.bytes[name] += sum(_bytes(tensor) for tensor in tensors)
        return result

    def fused(self, kernel: Any, grid: tuple[int, ...], out: Tensor, *args: Any, **constants: Any) -> None:
        """In place of fused.launch: counts a kernel, which nothing runs."""
        self.names[kernel.__name__] += 1
        tensors = {id(arg): arg for arg in args if isinstance(arg, Tensor)}  # one may stand in for another
        self.bytes[kernel.__name__] += sum(_bytes(tensor) for tensor in tensors.values())

    def row(self) -> dict[str, Any]:
        return {
            "launches": self.names.total(),
            "moved_mib": round(self.bytes.total() / 2**20),
            "operations": dict(self.names.most_common(MOST)),
        }


def _bytes(tensor: Tensor) -> int:
    """Without the repeats of what is expanded."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """In place of layers.sdpa, whose kernel torch chooses by the card: one launch."""
    return q.clone()


def parts(model: str, size_px: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is counted, by name. To be called, and the results to be called, under a FakeTensorMode."""
    how: dict[str, Any] = {"ops": Unset, "dtype": dtype, "device": torch.device("cuda")}
    side, config = size_px // DOWNSCALE, presets.PRESETS[MODELS[model]].transformer
    latent = torch.empty(1, LATENT_CHANNELS, side, side, dtype=dtype, device="cuda")
    one, image = torch.empty(1, device="cuda"), torch.empty(1, 3, size_px, size_px, dtype=dtype, device="cuda")
    caption = torch.empty(1, SHORT + 2, config.caption_width, dtype=dtype, device="cuda")
    common = {"x_s": latent, "s": one, "caption": caption, "guidance": one, "attention": attention}
    trunk = SanaTransformer(config, **how)
    branch = SanaControlNet(ControlNetConfig(**asdict(config) | {"depth": PUBLISHED_BLOCKS}), **how)
    dcae, tiny, gemma = Autoencoder(**how), TinyAutoencoder(**how), Gemma(GemmaConfig(), **how)

    def tokens(count: int) -> Tensor:
        return torch.zeros(1, count, dtype=torch.long, device="cuda")

    hidden, kv = gemma._run(tokens(PREFIX), None, -1, None)  # prefill reads its tokens, which are not there
    kept = KVPrefix((0,) * PREFIX, *zip(*kv, strict=True), hidden, -1)
    return {
        "step": lambda: trunk(**common),
        "controlnet": lambda: branch(hint=latent, **common),
        "decode": lambda: dcae.decode(latent),
        "encode": lambda: dcae.encode(image),
        "taesana_decode": lambda: tiny.decode(latent),
        "text": lambda: gemma(tokens(SHORT), prefix=kept),
        "long_text": lambda: gemma(tokens(LONG), prefix=kept),
    }


@contextlib.contextmanager
def launched_by(launch: Callable[..., None], kernels: bool = True) -> Iterator[None]:
    """Tensors that lie nowhere pass for those of a GPU, and `launch` is called in place of fused.launch."""
    inference = mock.patch.multiple(fused, enabled=kernels, launch=launch, in_inference=lambda: True)
    with inference, mock.patch.object(layers, "PLAIN", (*layers.PLAIN, FakeTensor)):
        yield


@torch.no_grad()
def count(model: str, size_px: int, dtype: torch.dtype, kernels: bool = False) -> dict[str, dict[str, Any]]:
    rows = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, call in parts(model, size_px, dtype).items():
            with Launches() as launches, launched_by(launches.fused, kernels):
                call()
            rows[name] = launches.row()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Launches and bytes of each part on a GPU, counted without one.")
    parser.add_argument("--model", choices=[name for name, preset in MODELS.items() if preset], default="1.6B")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--kernels", action="store_true", help="with fused kernels, which needs Triton")
    args = parser.parse_args()
    if args.kernels and fused.source() is None:
        parser.error("--kernels: install triton, whose kernels are counted")
    rows = count(args.model, args.size, DTYPES[args.dtype], args.kernels)
    for name, row in rows.items():
        operations = ", ".join(f"{count} {operation}" for operation, count in row["operations"].items())
        print(f"{name:16}{row['launches']:6} launches {row['moved_mib']:7} MiB  {operations}")
    asked = {"model": args.model, "size_px": args.size, "dtype": args.dtype, "kernels": args.kernels}
    print(json.dumps({**asked, "parts": rows}))


if __name__ == "__main__":
    main()
