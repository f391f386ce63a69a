"""The SANA-Sprint of plain shapes with its ControlNet: bundled before the one of emoji, and small enough for tests."""

from pathlib import Path

MODEL = Path(__file__).parent / "shapes" / "sana_sprint_tiny.safetensors"
CONTROL = MODEL.with_name("sana_controlnet_tiny.safetensors")
EVALUATED = ["--model", str(MODEL)]  # of sprint_core.evaluate
TRAINED_ON = {"student": MODEL, "vae": MODEL, "text_encoder": MODEL}  # of a ControlNet's recipe
