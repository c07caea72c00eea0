"""Triton kernels of `memory_input`; what they compute stands in the operator's README."""
