"""Triton kernels of `gated_fusion`; what they compute stands in the operator's README."""
