"""One aligned row for each published model: where it lives, what it is, how it samples."""

from dataclasses import dataclass

from .transformer import TransformerConfig

GUIDANCE = 4.5  # the paper's, and the default wherever none is given
FLOW_SHIFT, FLOW_SHIFT_4K = 3.0, 6.0  # of the multi-step models, as their scheduler_config.json has it
HUB = "Efficient-Large-Model"


@dataclass(frozen=True)
class Preset:
    name: str
    repo: str  # on the Hugging Face hub, the diffusers layout
    transformer: TransformerConfig
    size_px: int = 1024

    @property
    def sprint(self) -> bool:
        return self.transformer.guidance_embed


def _t(width: int, depth: int, heads: int, qk: bool, guidance: bool, time_scale: float, base=0, scale=1.0):
    return TransformerConfig(
        width=width,
        depth=depth,
        cross_heads=heads,
        qk_norm=qk,
        guidance_embed=guidance,
        time_scale=time_scale,
        pos_embed_base=base,
        pos_embed_scale=scale,
    )


# fmt: off
#                                                                                    width depth heads qk     guide  time   pe base, scale
PRESETS = {p.name: p for p in (
    Preset("sprint-0.6B",         f"{HUB}/Sana_Sprint_0.6B_1024px_diffusers",         _t(1152, 28, 16, True,  True,     1.0)),
    Preset("sprint-1.6B",         f"{HUB}/Sana_Sprint_1.6B_1024px_diffusers",         _t(2240, 20, 20, True,  True,     1.0)),
    Preset("sprint-0.6B-teacher", f"{HUB}/Sana_Sprint_0.6B_1024px_teacher_diffusers", _t(1152, 28, 16, True,  False,    1.0)),
    Preset("sprint-1.6B-teacher", f"{HUB}/SANA_Sprint_1.6B_1024px_teacher_diffusers", _t(2240, 20, 20, True,  False,    1.0)),
    Preset("sana-0.6B",           f"{HUB}/Sana_600M_1024px_diffusers",                _t(1152, 28, 16, False, False, 1000.0)),
    Preset("sana-1.6B",           f"{HUB}/Sana_1600M_1024px_diffusers",               _t(2240, 20, 20, False, False, 1000.0)),
    Preset("sana-1.6B-2K",        f"{HUB}/Sana_1600M_2Kpx_BF16_diffusers",            _t(2240, 20, 20, False, False, 1000.0, 64, 1.0), 2048),
    Preset("sana-1.6B-4K",        f"{HUB}/Sana_1600M_4Kpx_BF16_diffusers",            _t(2240, 20, 20, False, False, 1000.0, 128, 2.0), 4096),
    Preset("sana-1.5-1.6B",       f"{HUB}/SANA1.5_1.6B_1024px_diffusers",             _t(2240, 20, 20, True,  False, 1000.0)),
    Preset("sana-1.5-4.8B",       f"{HUB}/SANA1.5_4.8B_1024px_diffusers",             _t(2240, 60, 20, True,  False, 1000.0)),
)}
# fmt: on


def cross_heads(width: int, depth: int) -> int | None:
    """Heads of the cross-attention, which no tensor shape shows, of the published (width, depth)."""
    rows = (p.transformer for p in PRESETS.values())
    return next((t.cross_heads for t in rows if (t.width, t.depth) == (width, depth)), None)


def name_of(config: TransformerConfig) -> str:
    """The preset a configuration belongs to, or 'custom'."""
    return next((p.name for p in PRESETS.values() if p.transformer == config), "custom")
