"""One Layout per model part: how the published files name, shape and describe it."""
