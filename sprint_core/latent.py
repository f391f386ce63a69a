"""The latent that every SANA shares: [b, 32, h/32, w/32] (DC-AE f32c32, arXiv 2410.10733)."""

# latent = raw * SCALE. The pipeline or ComfyUI's latent format applies it, once; no network does.
SCALE = 0.41407
DOWNSCALE = 32  # pixels along one side of a latent cell
LATENT_CHANNELS = 32
