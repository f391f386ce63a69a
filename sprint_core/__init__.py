"""SANA-Sprint (arXiv 2503.09641) without ComfyUI: read pipeline.py first."""
