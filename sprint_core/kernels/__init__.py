"""Fused kernels for GPUs, in Triton: what takes torch several launches, in one."""
