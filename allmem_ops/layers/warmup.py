"""`warmup`: compile the kernels of a shape before the first call that counts."""

import time

import torch
from torch import Tensor

from allmem_ops._impl import KERNEL_DTYPES
from allmem_ops._validation import check_bool, check_int, fail, short
from allmem_ops.layers.config import AllMemConfig
from allmem_ops.layers.mixer import TokenMixer

# Tokens of the sequences that warm up: several tiles and chunks of everything, none of it long.
LENGTH, CHUNK = 256, 96


def warmup(
    config: AllMemConfig,
    *,
    d_model: int,
    heads: int,
    heads_kv: int,
    head_dim: int,
    qk_norm: bool = False,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    training: bool = True,
    decoding: bool = True,
    packed: bool = False,
) -> float:
    """Run everything that a layer of this shape will launch once, on a few tokens of noise, so that Triton compiles it now.

    What is compiled depends on dtypes, head dims, head counts and options, never on T, window, sinks or chunk size, so that a call with
    others finds its kernels ready. Compiled kernels also stay in Triton's cache on disk: a second process warms up in a moment.

    Args:
        config: the layer's; window, sinks and chunk size may be any.
        d_model, heads, heads_kv, head_dim, qk_norm: of the layer, as `TokenMixer` takes them.
        batch: sequences side by side: the memory's chain is split over the GPU by their number.
        dtype: of the activations.
        device: where the layer will run.
        training: forward and backward.
        decoding: a prompt, and steps of one token, with a state.
        packed: forward (and backward with `training`) with `cu_seqlens`.

    Returns:
        Seconds that it took.

    Raises:
        ValueError: an argument out of range; also those of `TokenMixer`.

    Example:
        >>> from allmem_ops import AllMemConfig, warmup
        >>> config = AllMemConfig(heads=1, head_dim=16, hidden_dim=16)
        >>> seconds = warmup(config, d_model=32, heads=2, heads_kv=1, head_dim=16, dtype=torch.float32, device="cpu")
        >>> 0 < seconds < 60
        True
    """
    check_int("batch", batch, 1)
    for name, value in (("training", training), ("decoding", decoding), ("packed", packed)):
        check_bool(name, value)
    if packed and batch > LENGTH:
        fail("batch", f"must be at most {LENGTH} with `packed`", batch)
    if dtype not in KERNEL_DTYPES:
        fail("dtype", f"must be one of {', '.join(map(short, KERNEL_DTYPES))}", dtype)
    if not isinstance(config, AllMemConfig):
        fail("config", "must be an AllMemConfig", type(config).__name__)
    start = time.perf_counter()
    small = config.replace(window=min(config.window, LENGTH // 2), sinks=min(config.sinks, 4), chunk_size=CHUNK)
    shape = {"heads": heads, "heads_kv": heads_kv, "head_dim": head_dim, "qk_norm": qk_norm}
    mixer = TokenMixer(d_model, **shape, config=small, device=device, dtype=dtype)

    def noise(rows: int, length: int) -> Tensor:
        return torch.randn(rows, length, d_model, device=device, dtype=dtype)

    def run(x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        with torch.set_grad_enabled(training):
            y = mixer(x, cu_seqlens=cu_seqlens)
        if training:
            torch.autograd.grad(y.sum(), list(mixer.parameters()))

    run(noise(batch, LENGTH))
    if packed:
        each = LENGTH // batch
        run(noise(1, batch * each), torch.arange(0, batch * each + 1, each, dtype=torch.int32, device=device))
    if decoding:
        with torch.no_grad():
            state = mixer.initial_state(batch, dtype)
            mixer(noise(batch, LENGTH), state=state)
            mixer(noise(batch, 2 * CHUNK), state=state)
            for _ in range(2):
                mixer(noise(batch, 1), state=state)
    if mixer.inv_freq.is_cuda:
        torch.cuda.synchronize(mixer.inv_freq.device)
    return time.perf_counter() - start
