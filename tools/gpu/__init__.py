"""What tools/gpu_check.py measures, a module for each kind of question."""
