"""The Triton kernels of `swa`. They know strides and sizes, nothing of the public functions."""
