"""Compiles what every operator launches on a GPU that is not there, and prints what it takes: one JSON object a kernel.

    python tests/ops/kernels/launches.py swa sm90

Shapes are those that configs are pinned for; tensors have no data. Run without TRITON_INTERPRET.
"""

import json
import sys

import torch
from torch import Tensor

from allmem_ops.testing.aot import absent_gpu

HALF, SINGLE, OFFSETS = torch.bfloat16, torch.float32, torch.int32


def empty(*shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def swa() -> None:
    from allmem_ops.ops.swa import registration
    from allmem_ops.ops.swa.launch_bwd import swa_triton_backward
    from allmem_ops.ops.swa.launch_step import swa_step

    T, HQ, HK = 4096, 16, 8
    for dtype, D, extra in ((HALF, 64, 0), (HALF, 128, 0), (HALF, 128, 1), (HALF, 256, 0), (SINGLE, 128, 0)):
        q, k, v = (empty(1, T, h, D, dtype=dtype) for h in (HQ, HK, HK))
        lse, cu = empty(1, T, HQ), empty(9, dtype=OFFSETS) if extra else None
        q_sinks = q if extra else None
        registration._forward(q, k, v, q_sinks, cu, 512, 4, 0.1)
        if cu is not None:
            registration._forward(q, k, v, None, cu, 512, 4, 0.1)
        swa_triton_backward(q, lse, q, k, v, q_sinks, cu, q, lse, 512, 4, 0.1)
        one = [empty(4, 1, h, D, dtype=dtype) for h in (HQ, HK, HK)]
        buffers = [empty(4, n, HK, D, dtype=dtype) for n in (4, 4, 512, 512)]
        swa_step(*one, one[0] if extra else None, None, *buffers, empty(4, dtype=torch.int64), 0.1)


def ttt_mlp() -> None:
    from allmem_ops.ops.ttt_mlp.launch import ttt_mlp_triton_forward
    from allmem_ops.ops.ttt_mlp.launch_bwd import ttt_mlp_triton_backward
    from allmem_ops.ops.ttt_mlp.launch_step import ttt_mlp_folded, ttt_mlp_step
    from allmem_ops.ops.ttt_mlp.reference import Options

    for dtype, H, d, h, packed, norm, clip, chunk_size in (
        (HALF, 8, 64, 128, False, "pre_write", None, 512),
        (HALF, 8, 64, 128, True, "post_write", 1.0, 2048),
        (HALF, 16, 128, 256, False, "pre_write", None, 2048),
        (SINGLE, 8, 64, 128, False, "pre_write", None, 2048),
    ):
        T = 8192
        q, k, v = (empty(1, T, H, d, dtype=dtype) for _ in range(3))
        eta, mu = empty(1, T, H, 3), empty(1, T, H)
        weights = [empty(H, h, d), empty(H, h, d), empty(H, d, h)]
        cu = empty(9, dtype=OFFSETS) if packed else None
        options = Options(chunk_size, norm, True, clip, 1e-5)

        saved = ttt_mlp_triton_forward(q, k, v, eta, mu, weights, None, cu, options, False, True)
        ttt_mlp_triton_backward(q, [None] * 6, q, k, v, eta, mu, weights, None, cu, saved, options, False)

        N, gate, down = 4, (4, H, h, d), (4, H, d, h)
        tails = [empty(N, H, 64, d, dtype=dtype), empty(N, H, 64, d, dtype=dtype), empty(N, H, 64, 3), empty(N, dtype=torch.int64)]
        state = [*(empty(*s) for s in (gate, gate, down) * 3), empty(N, H), *(empty(N, dtype=torch.int64) for _ in range(2)), *tails]
        state += [empty(*s, dtype=dtype) for s in (gate, gate, down) if dtype == HALF]
        norms = [empty(N, H, h), empty(N, H, h), empty(N, H, d)]
        for tokens in (1, 8):
            one = empty(N, tokens, H, d, dtype=dtype)
            active = empty(N, dtype=torch.bool) if packed else None
            ttt_mlp_step(one, one, one, empty(N, tokens, H, 3), empty(N, tokens, H), state, norms, active, options)
        ttt_mlp_folded(state[:3], norms, state[6:9], tails, norm, 1e-5)


def gated_fusion() -> None:
    from allmem_ops.ops.fusion.launch import launch_backward, launch_forward

    T, H, d = 4096, 16, 64
    attn, memory, gate = empty(1, T, H * d, dtype=HALF), empty(1, T, H, d, dtype=HALF), empty(1, T, H, dtype=HALF)
    alpha, norm = empty(H * d), empty(d)
    for form in ((attn, memory, alpha, gate, norm), (None, memory, None, gate, norm), (attn, attn, alpha, None, None)):
        launch_forward(*form, 1e-6)
        launch_backward(attn, *form[1:], 1e-6)


def memory_input() -> None:
    from allmem_ops.ops.memory_input.launch import launch_backward, launch_forward, launch_step
    from allmem_ops.ops.memory_input.reference import Inputs, Options

    T, H, d, taps = 4096, 8, 64, 4
    options = Options(H, True, True, 1e-6, 1e-6)
    for cu in (None, empty(9, dtype=OFFSETS)):
        projected = empty(1, T, 3 * H * d + 5 * H, dtype=HALF)
        parameters = empty(3 * H * d, taps), empty(5 * H), empty(d), empty(d)
        q = empty(1, T, H, d, dtype=HALF)
        gradients = q, q, q, empty(1, T, H, 3), empty(1, T, H), empty(1, T, H, dtype=HALF)
        inputs = Inputs(projected, *parameters, None, cu)
        launch_forward(inputs, options)
        launch_backward(gradients, inputs, options)
    one = empty(4, 1, 3 * H * d + 5 * H, dtype=HALF)
    launch_step(Inputs(one, *parameters, empty(4, taps - 1, 3 * H * d, dtype=HALF), None), None, options)


def rotary() -> None:
    from allmem_ops.ops.rotary.launch import launch_backward, launch_forward, launch_table

    T = 4096
    launch_table(empty(1, T, dtype=torch.int64), empty(64))
    for HQ, HK, D, with_norms in ((16, 8, 128, True), (16, 8, 128, False), (9, 3, 64, False)):
        q, k, qkv = (empty(1, T, h, D, dtype=HALF) for h in (HQ, HK, HQ + 2 * HK))
        cos, norm = empty(1, T, D // 2), empty(D, dtype=HALF) if with_norms else None
        launch_forward(qkv, cos, cos, norm, norm, HQ, HK, 1e-6)
        launch_backward(q, k, k, qkv if with_norms else None, cos, cos, norm, norm, 1e-6)
    q, none, cos, norm = empty(1, T, 9, 64, dtype=HALF), empty(1, T, 0, 64, dtype=HALF), empty(1, T, 32, dtype=HALF), empty(64, dtype=HALF)
    for weight in (None, norm):  # as converted models call it
        launch_forward(q, cos, cos, weight, None, 9, 0, 1e-6)
        launch_backward(q, none, none, q if weight is norm else None, cos, cos, weight, None, 1e-6)


def inference() -> None:
    from allmem_ops import AllMemConfig
    from allmem_ops.inference import launch
    from allmem_ops.layers.memory import MemoryBranch

    for B, dtype, K in ((1, HALF, 1024), (4, HALF, 2048), (1, SINGLE, 576)):
        x, gate_up, norm = empty(B, K, dtype=dtype), empty(B, 6 * K, dtype=dtype), empty(K, dtype=dtype)
        launch.linear(x, empty(6 * K, K, dtype=dtype), norm, norm=(norm, 1e-6), ahead=(x, gate_up))
        launch.linear(gate_up, empty(K, 3 * K, dtype=dtype), gated=True, into=x)
        launch.linear(gate_up[:, : 2 * K], empty(K, 2 * K, dtype=dtype), also=(x, empty(K, K, dtype=dtype)), into=x)
        cos, head = empty(B, 1, 128, dtype=dtype), empty(128, dtype=dtype)
        launch.heads(empty(B, 4096, dtype=dtype), (head, head, 1e-6), (16, 8), 128, (cos, cos), (cos, cos))
        with torch.device("meta"):
            branch = MemoryBranch(K, AllMemConfig(heads=8, head_dim=64, hidden_dim=128, chunk_size=2048))
            state = branch.initial_state(B, dtype)
        columns, active = empty(B, branch.in_proj.out_features, dtype=dtype), empty(B, dtype=torch.bool)
        _, fold = launch.memory(columns, branch, state, active, beside=True)
        fold()


def training() -> None:
    from allmem_ops.training.launch_kl import kl_rows

    for dtype, grad in ((HALF, True), (SINGLE, True), (HALF, False)):
        kl_rows(empty(1024, 49152), empty(1024, 49152), empty(1024, dtype=torch.bool), dtype, grad)


def main() -> None:
    op, gpu = sys.argv[1:]
    with absent_gpu(gpu) as launched:
        globals()[op]()
    for found in launched:
        facts = found._asdict()
        ptx = facts.pop("ptx")
        sys.stdout.write(json.dumps(facts | {"wgmma": "wgmma" in ptx}) + "\n")


if __name__ == "__main__":
    main()
