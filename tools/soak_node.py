"""For the server that soak.py uses: GET /soak/trim gives back to the system what the C library keeps of freed memory.

What is resident then is what is held. How much is kept beside it depends on the sizes that came by, and would hide a
leak of a few percent.
"""

import ctypes
import sys

from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict = {}


@PromptServer.instance.routes.get("/soak/trim")
async def trim(request: web.Request) -> web.Response:
    """Answers whether the C library can: glibc, that is."""
    library = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    if library:
        library.malloc_trim(0)
    return web.json_response(library is not None)
