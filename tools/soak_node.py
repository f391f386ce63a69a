"""For the server that soak.py uses: GET /soak/trim gives back to the system what the C library keeps of freed memory.

What is resident then is what is held. How much is kept beside it depends on the sizes that came by, and would hide a
leak of a few percent.
"""

import ctypes
import gc
import sys

import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict = {}


@PromptServer.instance.routes.get("/soak/trim")
async def trim(request: web.Request) -> web.Response:
    """Trims where the C library can (glibc), and answers what Python holds: objects, and the bytes of its tensors."""
    gc.collect()
    objects = gc.get_objects()
    stores = [one.untyped_storage() for one in objects if type(one) in (torch.Tensor, torch.nn.Parameter)]
    sizes = {store.data_ptr(): store.nbytes() for store in stores}
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return web.json_response({"objects": len(objects), "tensor_bytes": sum(sizes.values())})
