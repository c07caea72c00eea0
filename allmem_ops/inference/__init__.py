"""Inference in constant memory: reading texts of any length, and decoding whose cost does not grow. Needs the extra `[hf]`."""

from allmem_ops.inference.decoder import Decoder
from allmem_ops.inference.sampling import Sampling

__all__ = ["Decoder", "Sampling"]
