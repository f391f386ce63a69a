"""Graphs with the SANA nodes of ComfyUI_ExtraModels, which no test installs: their names, widgets and sockets only."""

from sprint_core.weights.presets import BUNDLED_NAME

NAMES = {"1": "SanaCheckpointLoader", "2": "GemmaLoader", "3": "ExtraVAELoader", "4": "SanaTextEncode"}
NAMES |= {"5": "GemmaTextEncode", "6": "EmptySanaLatentImage"}
SIDES = {"width": 192, "height": 256, "batch_size": 1}
PROMPT = "a red circle to the left of a blue square"
# Widgets in their order, with files of ours for theirs.
WIDGETS = {
    "1": {"ckpt_name": BUNDLED_NAME, "model": "SanaSprint_1600M_P1_D20", "dtype": "BF16"},
    "2": {"model_name": BUNDLED_NAME, "device": "cuda", "dtype": "BF16"},
    "3": {"vae_name": BUNDLED_NAME, "vae_type": "dcae-f32c32-sana-1.0-diffusers", "dtype": "FP32"},
    "4": {"text": PROMPT},
    "5": {"text": "blurry"},
    "6": SIDES,
    "7": {"seed": 3, "control": "fixed", "steps": 2, "cfg": 1.0, "sampler": "lcm", "scheduler": "simple", "denoise": 1},
    "9": {"filename_prefix": "theirs"},
}
NAMES |= {"7": "KSampler", "8": "VAEDecode", "9": "SaveImage"}
SOCKETS = {  # node: its inputs that are linked, each to a node's first output, and the type of the link
    "4": {"GEMMA": ("2", "GEMMA")},
    "5": {"GEMMA": ("2", "GEMMA")},
    "7": {
        "model": ("1", "MODEL"),
        "positive": ("4", "CONDITIONING"),
        "negative": ("5", "CONDITIONING"),
        "latent_image": ("6", "LATENT"),
    },
    "8": {"samples": ("7", "LATENT"), "vae": ("3", "VAE")},
    "9": {"images": ("8", "IMAGE")},
}
OUTPUTS = {"1": "MODEL", "2": "GEMMA", "3": "VAE", "4": "CONDITIONING", "5": "CONDITIONING", "6": "LATENT"}
OUTPUTS |= {"7": "LATENT", "8": "IMAGE"}


def api_prompt() -> dict:
    """As a script queues it."""
    renamed = {"sampler": "sampler_name"}
    return {
        node: {
            "class_type": name,
            "inputs": {renamed.get(key, key): value for key, value in WIDGETS.get(node, {}).items() if key != "control"}
            | {socket: [source, 0] for socket, (source, _) in SOCKETS.get(node, {}).items()},
            "_meta": {"title": name},
        }
        for node, name in NAMES.items()
    }


def workflow() -> dict:
    """As the editor saves it."""
    ends = [
        (int(source), int(node), slot, kind)
        for node, sockets in SOCKETS.items()
        for slot, (source, kind) in enumerate(sockets.values())
    ]
    links = [[number, source, 0, node, slot, kind] for number, (source, node, slot, kind) in enumerate(ends, 1)]
    nodes = [saved(number, name, links) for number, name in ((int(node), name) for node, name in NAMES.items())]
    return {"last_node_id": 9, "last_link_id": len(links), "nodes": nodes, "links": links, "version": 0.4}


def saved(number: int, name: str, links: list[list]) -> dict:
    """A node as the editor saves it; a link is [id, source, its output, target, its input, type]."""
    ends = {(target, slot): link for link, _, _, target, slot, _ in links}
    sockets = SOCKETS.get(str(number), {}).items()
    inputs = [{"name": key, "type": kind, "link": ends[number, i]} for i, (key, (_, kind)) in enumerate(sockets)]
    outputs = [OUTPUTS[str(number)]] if str(number) in OUTPUTS else []
    mine = [link[0] for link in links if link[1] == number]
    return {
        **{"id": number, "type": name, "pos": [300 * (number % 5), 250 * (number // 5)], "size": [270, 120]},
        **{"flags": {}, "order": number, "mode": 0, "properties": {"Node name for S&R": name}, "inputs": inputs},
        "outputs": [{"name": kind, "type": kind, "links": mine} for kind in outputs],
        "widgets_values": list(WIDGETS.get(str(number), {}).values()),
    }
