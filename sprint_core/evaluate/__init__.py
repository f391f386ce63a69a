"""How good a model is: python -m sprint_core.evaluate."""
