"""What nodes patched into a MODEL that a SANA cannot follow: said after the run, instead of no effect in silence.

ComfyUI keeps patches by the place in a network that they change. A SANA has transformer blocks ("dit",
"double_block"), and no other place: no U-Net layers, no softmax self-attention, no RoPE. Functions around
classifier-free guidance run, and it is seen whether they changed anything.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

SETTINGS = {  # transformer options that one other network or sampler reads, and the nodes that set them
    "rope_options": "ScaleROPE",
    "ar_config": "ARVideoI2V",
    "chroma_radiance_options": "ChromaRadianceOptions",
    "audio_embeds": "WanInfiniteTalkToVideo",
}
WRAPPERS = {"hidream_o1_patch_seam_smoothing": "HiDreamO1PatchSeamSmoothing"}  # of networks with patches of 32 pixels
OURS = {"NAGuidance": "take SANA-Sprint Negative (NAG)"}  # what does the same for a SANA-Sprint
NEED_CFG = ("APG", "SkipLayerGuidanceDiTSimple")  # read the unconditional prediction unasked, which cfg 1 leaves out
CFG_FUNCTIONS = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function")
SMALL = 1e-5  # of the largest value: rounding


class Owner(NamedTuple):
    """Where a patch was made: its module, and its node class or function."""

    module: str
    name: str


def owner_of(patch: Any) -> Owner:
    """The node that made a patch, which is a function inside that node's, or an object."""
    if isinstance(patch, tuple):
        patch = next(filter(callable, patch), patch)
    patch = getattr(patch, "func", patch)
    made = patch if hasattr(patch, "__qualname__") else type(patch)
    return Owner(made.__module__, made.__qualname__.split(".")[0])


def unread(options: dict, depth: int) -> set[Owner]:
    """Who set transformer options that a SANA of `depth` blocks does not read."""
    owners = {owner_of(patch) for kind in options.get("patches", {}).values() for patch in kind}
    owners |= {Owner("", name) for key, name in SETTINGS.items() if key in options}
    followed, elsewhere = set(), set()
    for kind, places in options.get("patches_replace", {}).items():
        for place, patch in places.items():
            in_block = kind == "dit" and place[0] == "double_block"
            if in_block and place[1] < depth:
                followed.add(owner_of(patch))
            elif in_block:
                owners.add(owner_of(patch))
            else:
                elsewhere.add(owner_of(patch))
    return owners | (elsewhere - followed)  # nodes for many networks name places of each


@contextlib.contextmanager
def followed(guider: Any, latent: Tensor, notes: list[str]) -> Iterator[None]:
    """Inside, the guider has the options that a SANA can follow; afterwards, `notes` says what had no effect."""
    model, options = guider.model_patcher.model, guider.model_options
    model.unread = unread(options["transformer_options"], model.depth)
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    no_cfg = model.sprint or math.isclose(getattr(guider, "cfg", 1.0), 1.0)
    left_out = _leave_out(guider.model_options, model, NEED_CFG if no_cfg else ())
    watched = _watch(guider.model_options)
    try:
        yield
    finally:
        guider.model_options = options
    names = {owner.name for owner in model.unread} | left_out - set(NEED_CFG)
    if names:
        instead = "".join(f"; {OURS[name]}" for name in sorted(names & OURS.keys()) if model.sprint)
        notes.append(f"{_listed(names)}: of no effect, since SANA has nothing that this patch changes{instead}")
    idle = {w.owner.name for w in watched if not w.changed} - names | left_out & set(NEED_CFG)
    if idle:
        why = ": SANA-Sprint's guidance is built in, and cfg is 1" if model.sprint else ": cfg is 1" if no_cfg else ""
        notes.append(f"{_listed(idle)}: changed nothing in this run{why}")
    handler = options.get("context_handler")
    if handler is not None and (handler.dim >= latent.ndim or latent.shape[handler.dim] <= handler.context_length):
        notes.append(f"context windows: of no effect, since the latent {list(latent.shape)} fits into one window")


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _leave_out(options: dict, model: Any, failing: Sequence[str]) -> set[str]:
    """Removes from these options what would fail or be garbage; returns the names of those that set it."""
    names = set()
    wrappers = options["transformer_options"].get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
    for key in WRAPPERS.keys() & wrappers.keys():
        del wrappers[key]
        names.add(WRAPPERS[key])

    def keeps(function: Callable) -> bool:
        owner = owner_of(function)
        dropped = owner in model.unread or owner.name in failing
        if dropped:
            names.add(owner.name)
        return not dropped

    for key in (*CFG_FUNCTIONS, "sampler_calc_cond_batch_function"):
        if isinstance(options.get(key), list):
            options[key] = [function for function in options[key] if keeps(function)]
        elif key in options and not keeps(options[key]):
            del options[key]
    if model.sprint and not any(options.get(key) for key in CFG_FUNCTIONS):
        options.pop("disable_cfg1_optimization", None)  # nothing would look at a second prediction
    return names


# --- functions around classifier-free guidance --------------------------------------------------------


@dataclasses.dataclass
class _Watched:
    """One such function. plain: the predictions that it would leave as they are, from its arguments."""

    function: Callable[[dict], Any]
    plain: Callable[[dict], list[Tensor]]
    owner: Owner
    changed: bool = False

    def __call__(self, args: dict) -> Any:
        args = _with_uncond(args)
        before = [] if self.changed else [x.clone() for x in self.plain(args)]
        out = self.function(args)
        results = out if isinstance(out, (list, tuple)) else [out]
        self.changed |= any(_differ(a, b) for a, b in zip(results, before, strict=False))
        return out


def _with_uncond(args: dict) -> dict:
    """At cfg 1 the unconditional prediction is left out, and is 0: the conditional one in its place is no guidance."""
    if "input_cond" in args and args["input_uncond"] is None:
        return args | {"uncond": args["cond"], "uncond_denoised": args["cond_denoised"]}
    if "denoised" in args and args["uncond"] is None:
        return args | {"uncond_denoised": args["cond_denoised"]}
    return args


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not bool((a - b).abs().max() <= SMALL * b.abs().max())


def _watch(options: dict) -> list[_Watched]:
    """Puts a _Watched in the place of each such function in these options, and returns them."""
    plains = (
        lambda args: args["conds_out"],
        lambda args: [args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]],
        lambda args: [args["denoised"]],
    )
    watched = []
    for key, plain in zip(CFG_FUNCTIONS, plains, strict=True):
        functions = options.get(key, [])
        single = not isinstance(functions, list)
        stand_ins = [_Watched(f, plain, owner_of(f)) for f in ([functions] if single else functions)]
        if stand_ins:
            options[key] = stand_ins[0] if single else stand_ins
        watched += stand_ins
    return watched
