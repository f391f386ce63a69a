"""The nodes, as ComfyUI's V3 extension. They are thin: adapters/ makes the objects, sprint_core works."""

from comfy_api.latest import ComfyExtension, io

from ..sprint_core import messages
from .adapters import live_socket, migration, screen, threads
from .control import ControlNetApply, SoftEdges
from .latent import EmptyLatent
from .live import LiveCanvas
from .loaders import LoadControlNet, LoadLoRA, LoadModel, LoadSprint, LoadTextEncoder, LoadVAE
from .negative import Negative
from .sampling import Sampler, Schedule, TrigFlowSampler
from .text import TextEncode

NODES = [
    LoadSprint,
    LoadModel,
    LoadTextEncoder,
    LoadVAE,
    LoadControlNet,
    LoadLoRA,
    TextEncode,
    Negative,
    ControlNetApply,
    SoftEdges,
    EmptyLatent,
    Schedule,
    TrigFlowSampler,
    Sampler,
    LiveCanvas,
]


class SanaSprintExtension(ComfyExtension):
    """What ComfyUI asks for this pack's nodes."""

    async def on_load(self) -> None:
        messages.PLACES.prefixes = screen.places
        threads.advise()
        live_socket.register()
        await migration.offer()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
