"""What each part of an image costs on this machine, beside diffusers: python -m benchmarks."""
