"""Hugging Face models: conversion, cache and checkpoints. Needs the extra `[hf]`; nothing outside this folder knows transformers."""

try:
    import transformers as _transformers  # noqa: F401 - only to say what is missing
except ImportError as error:
    raise ImportError('allmem_ops.hf needs transformers: pip install "allmem-ops[hf]"') from error

from allmem_ops.hf.cache import AllMemCache
from allmem_ops.hf.centre import centre_memory
from allmem_ops.hf.checkpoint import load_memory, save_memory
from allmem_ops.hf.convert import convert, full_attention, memory_mode, memory_parameters, reconfigure, trainable_parameters
from allmem_ops.hf.families import FAMILIES, Family
from allmem_ops.hf.state_file import load_cache, save_cache

__all__ = [
    "FAMILIES",
    "AllMemCache",
    "Family",
    "centre_memory",
    "convert",
    "full_attention",
    "load_cache",
    "load_memory",
    "memory_mode",
    "memory_parameters",
    "reconfigure",
    "save_cache",
    "save_memory",
    "trainable_parameters",
]
