"""The nodes, as ComfyUI's V3 extension. They are thin: adapters/ makes the objects, sprint_core works."""

from comfy_api.latest import ComfyExtension

from .latent import EmptyLatent
from .loaders import LoadModel, LoadSprint, LoadTextEncoder, LoadVAE
from .sampling import Sampler, Schedule, TrigFlowSampler
from .text import TextEncode

NODES = [LoadSprint, LoadModel, LoadTextEncoder, LoadVAE, TextEncode, EmptyLatent, Schedule, TrigFlowSampler, Sampler]


class SanaSprintExtension(ComfyExtension):
    async def get_node_list(self):
        return NODES
