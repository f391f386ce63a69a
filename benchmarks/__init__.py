"""What each part of a picture costs on this machine, beside diffusers: python -m benchmarks."""
