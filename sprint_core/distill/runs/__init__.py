"""Whole runs: the stages of a recipe in their order, from files to files."""
