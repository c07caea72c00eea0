"""The tile functions of `geometry.py` as device functions: one source for kernels and CPU tests."""

from collections.abc import Callable
from typing import Any

import triton

from allmem_ops._config import settings
from allmem_ops.ops.swa import geometry


def _device_function(function: Callable[..., Any]) -> Any:
    # The interpreter runs kernels as Python and calls the function as it is; `triton.jit` would ask it to import triton.language.
    return function if settings().interpret else triton.jit(function)


query_tiles = _device_function(geometry.query_tiles)
key_tiles = _device_function(geometry.key_tiles)
