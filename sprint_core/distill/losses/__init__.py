"""The mathematics of the paper's distillation, as pure functions."""
