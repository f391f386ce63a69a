"""SANA-Sprint for ComfyUI: the entry point that ComfyUI calls.

Nothing is imported until it does, so that tools may import this folder outside ComfyUI.
"""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    from .nodes import SanaSprintExtension

    return SanaSprintExtension()
