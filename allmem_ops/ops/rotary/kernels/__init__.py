"""Triton kernels of `rotary`."""
