"""What the shipped templates say and how they are laid out: prompts, titles, notes, and the groups of each graph.

tools/make_templates.py writes it into workflows/, whose files keep the nodes, their links and their other values. For
another bundled model change PROMPTS, then run make_templates.py, make_thumbnails.py and make_graph.py.
"""

from dataclasses import dataclass, field

from tools import template_drawings

# Every prompt of every template. The first group is what the bundled model knows, the last what a published one does.
PROMPTS = {
    "start": "a slice of pizza",
    "changed": "a slice of watermelon",
    "left": "a cat on the left",
    "added": "a penguin on the right",
    "controlled": "a mushroom on a purple background, flat style",
    "drawn": "a mushroom",
    "painted": "a soft ice cream",
    "published": "a tiny astronaut hatching from an egg on the moon",
}

HUB = "https://huggingface.co"  # the one host of these that ComfyUI offers to download from


@dataclass(frozen=True)
class File:
    """A model file that a template names. What its publisher calls it may say too little: then `name` is another."""

    folder: str
    name: str
    url: str

    @property
    def published_as(self) -> str:
        return self.url.rsplit("/", 1)[1]


SPRINT_LARGE = File(
    "diffusion_models",
    "Sana_Sprint_1.6B_1024px.pth",
    f"{HUB}/Efficient-Large-Model/Sana_Sprint_1.6B_1024px/resolve/main/checkpoints/Sana_Sprint_1.6B_1024px.pth",
)
SPRINT_SMALL = File(
    "diffusion_models",
    "Sana_Sprint_0.6B_1024px.pth",
    f"{HUB}/Efficient-Large-Model/Sana_Sprint_0.6B_1024px/resolve/main/checkpoints/Sana_Sprint_0.6B_1024px.pth",
)
GEMMA = File(
    "text_encoders",
    "gemma_2_2b_it_elm_bf16.safetensors",
    f"{HUB}/Comfy-Org/PixelDiT/resolve/main/text_encoders/gemma_2_2b_it_elm_bf16.safetensors",
)
GEMMA_SMALL = File(
    "text_encoders",
    "gemma_2_2b_it_elm_fp8_scaled.safetensors",
    f"{HUB}/Comfy-Org/PixelDiT/resolve/main/text_encoders/gemma_2_2b_it_elm_fp8_scaled.safetensors",
)
DC_AE = File(
    "vae",
    "dc-ae-f32c32-sana-1.1.safetensors",
    f"{HUB}/mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers/resolve/main/diffusion_pytorch_model.safetensors",
)
TAESANA = File("vae_approx", "taesana_decoder.pth", "https://github.com/madebyollin/taesd/raw/main/taesana_decoder.pth")
FLUX = File(
    "checkpoints",
    "flux1-schnell-fp8.safetensors",
    f"{HUB}/Comfy-Org/flux1-schnell/resolve/main/flux1-schnell-fp8.safetensors",
)


@dataclass(frozen=True)
class Plan:
    """A template: its groups from left to right, each a list of columns of node ids, and what its nodes say."""

    groups: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...]
    note: int
    text: str
    is_note_below: bool = False  # below the first group: where a wide node needs the page
    titles: dict[int, str] = field(default_factory=dict)
    prompts: dict[int, str] = field(default_factory=dict)  # node id: key of PROMPTS
    files: dict[int, File] = field(default_factory=dict)
    values: dict[int, tuple] = field(default_factory=dict)  # other widget values that the template depends on
    shown: tuple[int, ...] = ()  # nodes whose images the thumbnail shows: one, or a small one upon another
    beside: tuple[str, ...] = ()  # or both side by side, under these words
    card: tuple[str, ...] = ()  # or a drawn card: what is large on it, and two lines


BUNDLED = """*Load SANA-Sprint* starts with the small model that comes with this pack: emoji, 256 x 256 pixels. \
For a real one put a diffusers folder into `models/diffusers`, press **R**, and choose it there."""


@dataclass(frozen=True)
class Live:
    """What the live canvas of a template says and shows."""

    prompt: str  # a key of PROMPTS
    seed: int
    drawing: str
    strength: float = 1  # of the ControlNet, if it has one


# At full strength the bundled ControlNet keeps to the lines, and things lose their details.
SKETCH = Live("drawn", 4, template_drawings.MUSHROOM, strength=0.6)
LIVE = {
    "06 Sketch to Image": SKETCH,
    "08 Live Paint Canvas": Live("painted", 3, template_drawings.ICE_CREAM),
    "09 Sketch App Mode": SKETCH,
}
SUBGRAPHS = {"Text to Image (SANA-Sprint)": "start", "Sketch to Image (SANA-Sprint)": "drawn"}  # keys of PROMPTS

PARTS = ("1 Model", ((1, 2, 3),))
DRAWN = (("2 Drawing", ((3,),)), ("3 Image", ((4,),)))
DRAWN_TITLES = {3: "Draw here", 4: "What you drew last"}
KEYS = """Keys: **B** brush, **E** eraser, **[** and **]** size, **Ctrl+Z** undo, **Ctrl+Shift+Z** redo. Drop an image \
on the sheet to %s. The graph keeps the strokes: shared, or dropped as a saved PNG, it shows the same drawing."""
TITLE_PREFIX = "SANA-Sprint "

PLANS = {
    "01 Text to Image": Plan(
        (("1 Model", ((1,),)), ("2 Prompt", ((2, 3),)), ("3 Image", ((4,), (5,), (6,)))),
        7,
        f"""## Text to image

Type a prompt, choose **1 to 4 steps**, press *Run*.

- {BUNDLED}
- The bundled model knows 329 things, places, numbers up to four, and grounds: *two cats on a blue background*, \
*a rocket in the top left corner*.
- Guidance is built into the model: there is no cfg. *SANA-Sprint Negative (NAG)* adds a negative prompt.

*Node Info* on each node opens its help page. [The paper](https://arxiv.org/abs/2503.09641)""",
        prompts={2: "start"},
        shown=(6,),
    ),
    "02 Image to Image": Plan(
        (
            ("1 Model", ((1,),)),
            ("2 Prompt", ((2, 8, 3),)),
            ("3 First image", ((4,), (5,), (6, 7))),
            ("4 Image to image", ((9,), (10,), (11,))),
        ),
        12,
        f"""## Image to image

Changes an image by a prompt. **denoise** is the strength: 1 keeps nothing of the image, 0.4 changes little. It \
multiplies \
every angle of the schedule, and the sampler shows them.

- The first image is generated here. For your own, connect *Load Image* and *Upscale Image* (to the model's size: \
1024 px for \
SANA-Sprint) to *VAE Encode*.
- {BUNDLED}""",
        titles={2: "Prompt of the first image", 8: "Prompt of the result", 4: "First image", 6: "First image",
                9: "Image to image, denoise 0.6", 11: "Result"},
        prompts={2: "start", 8: "changed"},
        shown=(6, 11),
    ),
    "03 Inpaint a Mask": Plan(
        (
            ("1 Model", ((1,),)),
            ("2 Prompt", ((2, 8, 3),)),
            ("3 First image", ((4,), (5,), (6, 7))),
            ("4 Mask", ((12, 13), (14,), (15,))),
            ("5 Inpaint", ((9,), (10,), (11,))),
        ),
        16,
        f"""## Inpaint

Only the masked area is generated anew (the VAE's round trip touches the rest a little).

- The mask is a rectangle from stock nodes. For your own, use *Load Image*, open its mask editor, and connect its \
MASK to \
*Set Latent Noise Mask*.
- {BUNDLED}""",
        titles={2: "Prompt of the first image", 8: "Prompt of the masked area", 4: "First image", 6: "First image",
                12: "Mask 0: keep", 13: "Mask 1: inpaint", 9: "Inpaint", 11: "Result"},
        prompts={2: "left", 8: "added"},
        shown=(6, 11),
    ),
    "04 Stock KSampler Nodes": Plan(
        (
            ("1 Model", ((1,),)),
            ("2 Prompt", ((2, 3), (7,))),
            ("3 Image", ((4, 8), (5, 9), (6, 10))),
        ),
        11,
        f"""## Stock nodes

SANA-Sprint is an ordinary MODEL.

- Above: ComfyUI's *KSampler* with sampler **lcm**, scheduler **simple** and **cfg 1**.
- Below: *SANA-Sprint Sampler* with schedule **app**.
- Same steps, same seed: the same image on the CPU. On a GPU *lcm* draws other noise from the second step on; ours \
never does.
- {BUNDLED}""",
        titles={7: "Negative: unused at cfg 1", 6: "KSampler", 10: "SANA-Sprint Sampler"},
        prompts={2: "start"},
        shown=(6, 10),
        beside=("KSampler", "SANA-Sprint Sampler"),
    ),
    "05 ControlNet Soft Edges": Plan(
        (
            ("1 Model", ((1, 20),)),
            ("2 Prompt", ((30, 2, 3),)),
            ("3 First image", ((31,), (32,), (36, 33), (34,))),
            ("4 Image", ((35,), (4,), (5,), (6,))),
        ),
        37,
        f"""## ControlNet

The edges of one image steer another: the prompt decides the colours, the edges decide the shapes.

- For your own image connect *Load Image* to *Soft Edges*. *scribble* draws even lines, as the published \
ControlNets saw.
- The published SANA ControlNets (0.6B, 1.6B) go into `models/controlnet`. HED, which draws the edges that they \
were trained \
with, goes into `models/annotators`.
- *end_percent* 0.1 steers only the first step.
- {BUNDLED}""",
        titles={30: "Prompt of the first image", 2: "Prompt of the result", 31: "First image", 36: "First image",
                34: "Edges", 4: "Image by its edges", 6: "Result"},
        prompts={30: "drawn", 2: "controlled"},
        shown=(34, 6),
    ),
    "06 Sketch to Image": Plan(
        (("1 Model", ((1, 2),)), *DRAWN),
        5,
        f"""## Draw, and watch it paint

1. Press **Go live**, below the drawing.
2. Draw another outline and say what it is, or let the mushroom become *an umbrella* or *a jellyfish*.
3. Change the prompt, the seed or *strength* while you draw.
4. **Stop**, or run something else: the last drawing is painted with *final_steps* and saved.

{KEYS % "trace it"}""",
        is_note_below=True,
        titles=DRAWN_TITLES,
    ),
    "07 Steps x Seeds": Plan(
        (
            ("1 Model", ((1,),)),
            ("2 Prompt", ((2, 3),)),
            ("3 Image", ((4, 5, 6), (7, 8, 9))),
            ("4 Grid", ((10,), (11,), (12, 13, 14), (15,), (16,), (17,))),
        ),
        18,
        f"""## Steps x seeds

One prompt with **1, 2 and 4 steps** (rows) and **3 seeds** (columns), as one image.

- A batch of 3 takes the seeds *seed*, *seed* + 1 and *seed* + 2: image 2 of the batch is what seed 1 makes alone.
- More steps add detail to the same image: each row starts from the same noise.
- For three prompts instead of three seeds write them in three lines, and switch *one_prompt_per_line* of \
*SANA-Sprint Text \
Encode* on.
- {BUNDLED}""",
        titles={17: "Grid"},
        prompts={2: "start"},
        shown=(17,),
    ),
    "08 Live Paint Canvas": Plan(
        (("1 Model", ((1,),)), *DRAWN),
        5,
        f"""## Paint, and watch it repaint

1. Press **Go live**, below the drawing.
2. Paint patches of colour where things shall be.
3. Change the prompt, the seed or *denoise* while you draw.
4. **Stop**, or run something else: the last drawing is painted with *final_steps* and saved.

{KEYS % "paint over it"}

*denoise* 1 keeps nothing of your paint, 0.3 nearly all. With a ControlNet, mode *both* adds lines.""",
        is_note_below=True,
        titles=DRAWN_TITLES,
    ),
    "09 Sketch App Mode": Plan(
        (("1 Model", ((1, 2),)), *DRAWN),
        5,
        """## The sketch without its graph

It opens in ComfyUI's *App mode*: the prompt and the sheet stand beside the page, and no node is to be seen. *Graph*, \
at the top, shows them.

The graph is that of *06 Sketch to Image*.""",
        is_note_below=True,
        titles=DRAWN_TITLES,
    ),
    "10 Published 1.6B Model": Plan(
        (PARTS, ("2 Prompt", ((5, 4),)), ("3 Image", ((6,), (7,), (8,)))),
        9,
        """## SANA-Sprint 1.6B

1024 x 1024 pixels in **1 to 4 steps**, from single files. 2 steps are a good default; guidance is built in.""",
        prompts={5: "published"},
        files={1: SPRINT_LARGE, 2: GEMMA, 3: DC_AE},
        card=("1.6B", "published model", "1024 px in 2 steps"),
    ),
    "11 Low VRAM 8-bit": Plan(
        (PARTS, ("2 Prompt", ((5, 4),)), ("3 Image", ((6,), (7,), (8,)))),
        9,
        """## Low VRAM

- The **0.6B** transformer is rounded to **8 bits while it loads**: *dtype* fp8_e4m3fn, an advanced input.
- Gemma-2 is an 8-bit file and runs **on the CPU**: no graphics memory, some seconds for each new prompt.
- **TAESANA** decodes in little memory. For the final image choose a DC-AE in *Load SANA VAE*, with *VAE Decode \
(Tiled)*.""",
        prompts={5: "published"},
        files={1: SPRINT_SMALL, 2: GEMMA_SMALL, 3: TAESANA},
        values={1: ("fp8_e4m3fn", "auto"), 2: ("auto", "cpu")},
        card=("8-bit", "low VRAM: 0.6B in fp8", "text encoder on the CPU"),
    ),
    "12 High Resolution Upscale": Plan(
        (
            PARTS,
            ("2 Prompt", ((5, 4),)),
            ("3 Image, 1024 px", ((6,), (7,), (8,))),
            ("4 Upscale, 2048 px", ((9,), (10,), (11,), (12,), (13,))),
        ),
        14,
        """## High resolution

1. Generate at 1024 px, which SANA-Sprint was trained at.
2. Upscale the pixels.
3. Image to image: *denoise* 0.5 adds the details and keeps the image.

VAE encode and decode are **tiled**: they need the memory of one tile.""",
        titles={6: "Text to image", 8: "1024 px", 11: "Image to image, denoise 0.5", 13: "2048 px"},
        prompts={5: "published"},
        files={1: SPRINT_LARGE, 2: GEMMA, 3: DC_AE},
        card=("2048", "pixels: upscale and refine", "tiled VAE, 1.6B"),
    ),
    "13 Refine with FLUX": Plan(
        (
            ("1 Model", ((1, 2, 3, 20),)),
            ("2 Prompt", ((5, 21, 4), (22,))),
            ("3 Draft", ((6,), (7,))),
            ("4 Refine", ((23,), (24,), (25,), (26,), (27,))),
        ),
        28,
        """## Two model families

SANA-Sprint drafts in one step, FLUX.1-schnell refines. Each family has its own latent space, so the image goes \
**through \
pixels**: decoded by one VAE, encoded by the other. Any other checkpoint may take FLUX's place.""",
        titles={5: "Prompt for SANA-Sprint", 21: "Prompt for FLUX", 20: "FLUX.1-schnell",
                22: "Negative: unused at cfg 1",
                6: "Draft, 1 step", 23: "VAE Encode for FLUX", 24: "Refine", 26: "Draft and result"},
        prompts={5: "published", 21: "published"},
        files={1: SPRINT_LARGE, 2: GEMMA, 3: DC_AE, 20: FLUX},
        card=("FLUX", "refines SANA-Sprint's draft", "two models, one graph"),
    ),
}  # fmt: skip
