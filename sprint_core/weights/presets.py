"""One aligned row for each published model, and how to find a file's configuration among them."""

from dataclasses import dataclass
from pathlib import Path

from ..models.transformer import TransformerConfig
from .tensorfile import CheckpointError

GUIDANCE = 4.5  # the paper's, and the default wherever none is given
FLOW_SHIFT, FLOW_SHIFT_4K = 3.0, 6.0  # of the multi-step models, as their scheduler_config.json has it
HUB = "Efficient-Large-Model"
BUNDLED_NAME = "SANA-Sprint-tiny"  # the model that comes with this repository; made by distill, see demo/README.md
BUNDLED_CONTROL_NAME = "SANA-Sprint-tiny ControlNet"
BUNDLED = Path(__file__).parents[1] / "demo" / "sana_sprint_tiny.safetensors"
BUNDLED_CONTROL = BUNDLED.with_name("sana_controlnet_tiny.safetensors")  # by distill --recipe demo-control


@dataclass(frozen=True)
class Preset:
    name: str
    repo: str  # in the diffusers layout, among HUB's
    transformer: TransformerConfig
    size_px: int

    @property
    def hub_id(self) -> str:
        return f"{HUB}/{self.repo}"


# Sizes: width, depth, heads of the cross-attention. Positions: latent size they number, scale.
S = (1152, 28, 16)
M = (2240, 20, 20)
L = (2240, 60, 20)
NONE = (0, 1.0)
P2K = (64, 1.0)
P4K = (128, 2.0)
# fmt: off
_ROWS = (
    # name                      repository                                   size  qk    guide    time pos.  px
    ("sprint-0.6B",             "Sana_Sprint_0.6B_1024px_diffusers",         S, True,  True,     1.0, NONE, 1024),
    ("sprint-1.6B",             "Sana_Sprint_1.6B_1024px_diffusers",         M, True,  True,     1.0, NONE, 1024),
    ("sprint-0.6B-teacher",     "Sana_Sprint_0.6B_1024px_teacher_diffusers", S, True,  False,    1.0, NONE, 1024),
    ("sprint-1.6B-teacher",     "SANA_Sprint_1.6B_1024px_teacher_diffusers", M, True,  False,    1.0, NONE, 1024),
    ("sana-0.6B",               "Sana_600M_1024px_diffusers",                S, False, False, 1000.0, NONE, 1024),
    ("sana-1.6B",               "Sana_1600M_1024px_diffusers",               M, False, False, 1000.0, NONE, 1024),
    ("sana-0.6B-512",           "Sana_600M_512px_diffusers",                 S, False, False, 1000.0, NONE,  512),
    ("sana-1.6B-512",           "Sana_1600M_512px_diffusers",                M, False, False, 1000.0, NONE,  512),
    ("sana-1.6B-512-multiling", "Sana_1600M_512px_MultiLing_diffusers",      M, False, False, 1000.0, NONE,  512),
    ("sana-1.6B-multiling",     "Sana_1600M_1024px_MultiLing_diffusers",     M, False, False, 1000.0, NONE, 1024),
    ("sana-1.6B-2K",            "Sana_1600M_2Kpx_BF16_diffusers",            M, False, False, 1000.0, P2K,  2048),
    ("sana-1.6B-4K",            "Sana_1600M_4Kpx_BF16_diffusers",            M, False, False, 1000.0, P4K,  4096),
    ("sana-1.5-1.6B",           "SANA1.5_1.6B_1024px_diffusers",             M, True,  False, 1000.0, NONE, 1024),
    ("sana-1.5-4.8B",           "SANA1.5_4.8B_1024px_diffusers",             L, True,  False, 1000.0, NONE, 1024),
)
# fmt: on


def _preset(name, repo, size, qk_norm, guidance_embed, time_scale, positions, size_px) -> Preset:
    config = TransformerConfig(
        *size,
        qk_norm=qk_norm,
        guidance_embed=guidance_embed,
        time_scale=time_scale,
        pos_embed_base=positions[0],
        pos_embed_scale=positions[1],
    )
    return Preset(name, repo, config, size_px)


PRESETS = {row[0]: _preset(*row) for row in _ROWS}


def name_of(config: TransformerConfig) -> str:
    """The first preset of a configuration, or 'custom'; the models of 512 px and MultiLing are built as another is."""
    return next((p.name for p in PRESETS.values() if p.transformer == config), "custom")


def find_model(name: str) -> Path:
    """A path, or a preset's folder in the Hugging Face cache of this machine. Raises CheckpointError."""
    if name not in PRESETS:
        return Path(name)
    from huggingface_hub import snapshot_download  # what transformers downloads with
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub_id = PRESETS[name].hub_id
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        raise CheckpointError(f"{name} is not on this machine; download it with: hf download {hub_id}") from None
