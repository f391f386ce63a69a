"""SANA-Sprint for ComfyUI: the entry point that ComfyUI calls.

Nothing is imported until it does, so that tools may import this folder outside ComfyUI.

What ComfyUI-Manager reads here; the nodes' ids are in node_list.json:
@title: SANA-Sprint
@nickname: SANA-Sprint
@description: SANA-Sprint as ordinary MODEL, CLIP and VAE objects: 1024x1024 images in 1 to 4 steps.
"""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    from .nodes import SanaSprintExtension

    return SanaSprintExtension()
