"""Triton kernels of `ttt_mlp`."""
