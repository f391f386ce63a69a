"""The only modules that touch ComfyUI's internals."""
