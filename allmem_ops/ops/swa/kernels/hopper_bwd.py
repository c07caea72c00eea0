"""The window pairs of the `swa` backward for sm_90 in Gluon: dk, dv and dq from one recomputation, five products a pair.

A program owns 128 keys of one key/value head: two warpgroups of 64 keys hold dk and dv in registers and walk over the query tiles
of each query head of the group. Scores are computed as K Q^T, so that P^T and dS^T come out as the left operands of dv += P^T dO and
dk += dS^T Q. The parts of dq go through shared memory to `acc` in float32, added by TMA. Besides the warpgroups a program has a warp
that loads and a warp that adds.

Order of the additions to a tile of `acc`: by key tile, so the sum is the same in every run. `turn` counts the additions of each tile; a
program adds when all key tiles before its own have. It walks from the last query tile back to the first: the program of the key tile
before is then two or more query tiles ahead at the same time, and nobody waits. Programs take their key tile from a counter
(`ticket`), so a program only ever waits for programs that have started.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from allmem_ops.ops.kernels.gluon import tma_add, tma_load, tma_store, view
from allmem_ops.ops.swa import geometry

key_tiles = gluon.jit(geometry.key_tiles)

ROWS = gl.constexpr(64)  # keys of a warpgroup, and the rows and columns of a part of dq
KEYS = gl.constexpr(128)
ROW_TILE = gl.constexpr(128)


@gluon.jit
def _start(cu_seqlens, n, T):
    """First token of sequence n; offsets out of range never lead outside [0, T]."""
    return gl.minimum(gl.maximum(gl.load(cu_seqlens + n).to(gl.int32), 0), T)


@gluon.jit
def _sequence_of_slot(cu_seqlens, sequences, T, slot):
    """(sequence, its start, its length, its key tile) of a tile slot, see kernels/bwd.py."""
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if _start(cu_seqlens, middle, T) // KEYS + middle <= slot:
            low = middle
        else:
            high = middle
    begin = _start(cu_seqlens, low, T)
    return low, begin, gl.maximum(_start(cu_seqlens, low + 1, T) - begin, 0), slot - (begin // KEYS + low)


@gluon.jit
def _look_up_turn(p_turn):
    """How many tiles have been added, not waited for."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [p_turn.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _await_turn(p_turn, rank, count):
    """Wait until `rank` tiles have been added (`count`: when it was looked up before); these are then visible to TMA as well."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred mine;
        .reg .b32 count;
        mov.b32 count, $3;
        WAIT:
        setp.ge.s32 mine, count, $2;
        @mine bra DONE;
        ld.acquire.gpu.global.b32 count, [$1];
        bra WAIT;
        DONE:
        fence.proxy.async;
        mov.b32 $0, count;
        }""",
        "=r,l,r,r",
        [p_turn.to(gl.int64), rank, count],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _pass_turn(p_turn, count):
    """Publish `count` after this warp's bulk stores: `tma.store_wait` only waits until they have read their source."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .b32 lane;
        cp.async.bulk.wait_group 0;
        fence.proxy.async;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid;
        setp.eq.u32 first, lane, 0;
        @first st.release.gpu.global.b32 [$1], $2;
        mov.b32 $0, $2;
        }""",
        "=r,l,r",
        [p_turn.to(gl.int64), count],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _next(i_m, i_g, first, last):
    """The order of the query tiles, from (last, 0) on: a head's tiles from the last one back, then the next head's."""
    if i_m == first:
        i_m = last
        i_g += 1
    return i_m - 1, i_g


@gluon.jit
def _load_warp(x, buffers, barriers, place, G, BM: gl.constexpr, D: gl.constexpr):
    q, k, v, do, rows, _acc, _dk, _dv = x
    s_q, s_do, s_k, s_v, s_rows, _s_ds, _s_dq = buffers
    k_full, v_full, q_full, q_free, do_full, do_free, _ds_full, _dq_full, _dq_free = barriers
    i_b, i_h, _i_n, j0, first, last, count, begin, r0 = place
    QUERY_BYTES: gl.constexpr = BM * D * 2 + BM * 4
    KEY_BYTES: gl.constexpr = KEYS * D * 2
    mbarrier.expect(k_full, KEY_BYTES)
    for w in gl.static_range(2):
        tma_load(k, [i_b, begin + j0 + w * ROWS, i_h, 0], k_full, view(s_k.index(w), k.dtype, [1, ROWS, 1, D], k.layout))
    i_m, i_g = last, 0 * last
    for t in range(count):
        i_m, i_g = _next(i_m, i_g, first, last)
        i_hq = i_h * G + i_g
        stage = t & 1
        phase = ((t >> 1) & 1) ^ 1
        row = begin + i_m * BM
        mbarrier.wait(q_free.index(stage), phase)
        full = q_full.index(stage)
        mbarrier.expect(full, QUERY_BYTES)
        tma_load(q, [i_b, row, i_hq, 0], full, view(s_q.index(stage), q.dtype, [1, BM, 1, D], q.layout))
        tma_load(rows, [0, i_b, i_hq, r0 + i_m * BM], full, view(s_rows.index(2 * stage), gl.float32, [1, 1, 1, BM], rows.layout))
        if t == 0:
            mbarrier.expect(v_full, KEY_BYTES)
            for w in gl.static_range(2):
                tma_load(v, [i_b, begin + j0 + w * ROWS, i_h, 0], v_full, view(s_v.index(w), v.dtype, [1, ROWS, 1, D], v.layout))
        mbarrier.wait(do_free.index(stage), phase)
        full = do_full.index(stage)
        mbarrier.expect(full, QUERY_BYTES)
        tma_load(do, [i_b, row, i_hq, 0], full, view(s_do.index(stage), do.dtype, [1, BM, 1, D], do.layout))
        tma_load(rows, [1, i_b, i_hq, r0 + i_m * BM], full, view(s_rows.index(2 * stage + 1), gl.float32, [1, 1, 1, BM], rows.layout))


@gluon.jit
def _add_warp(x, buffers, barriers, place, turn, start, window, tiles, HQ, G, BM: gl.constexpr, D: gl.constexpr):
    """Adds each part of dq to `acc` in its turn; the first key tile of a query tile stores it."""
    _q, _k, _v, _do, _rows, acc, _dk, _dv = x
    _s_q, _s_do, _s_k, _s_v, _s_rows, _s_ds, s_dq = buffers
    _k_full, _v_full, _q_full, _q_free, _do_full, _do_free, _ds_full, dq_full, dq_free = barriers
    i_b, i_h, i_n, _j0, first, last, count, _first_token, r0 = place
    turn += (i_b * HQ + i_h * G).to(gl.int64) * tiles + r0 // BM
    i_m, i_g = _next(last, 0 * last, first, last)
    seen = 0 * last
    for t in range(count):
        p_turn = turn + i_g * tiles + i_m
        rank = i_n - gl.maximum(start + i_m * BM - window + 1, 0) // KEYS
        row = r0 + i_m * BM
        i_hq = i_h * G + i_g
        _await_turn(p_turn, rank, seen)
        for w in gl.static_range(2):
            slot = (t & 1) * 2 + w
            mbarrier.wait(dq_full.index(slot), (t >> 1) & 1)
            b_dq = view(s_dq.index(slot), gl.float32, [1, 1, ROWS, 64], acc.layout)
            corner = [i_b, i_hq, row, w * 64] if D == 128 else [i_b, i_hq, row + w * ROWS, 0]
            if rank == 0:
                tma_store(acc, corner, b_dq)
            else:
                tma_add(acc, corner, b_dq)
        # The next turn is looked up while this tile is on its way; after the last tile, one that does not matter.
        i_m, i_g = _next(i_m, i_g, first, last)
        seen = _look_up_turn(turn + gl.minimum(i_g, G - 1) * tiles + i_m)
        _pass_turn(p_turn, rank + 1)
        for w in gl.static_range(2):
            mbarrier.arrive(dq_free.index((t & 1) * 2 + w), count=1)


@gluon.jit
def _store(x, p_x, s_x, b_x, i_b, row, i_h, left, stride_b, stride_t, stride_h, D: gl.constexpr):
    """Put a warpgroup's rows, those of the `left` ones before the sequence's end. TMA cuts at the tensor's end, so it does whole tiles."""
    if left >= ROWS:
        s_x.store(b_x)
        fence_async_shared()
        tma_store(x, [i_b, row, i_h, 0], view(s_x, x.dtype, [1, ROWS, 1, D], x.layout))
        tma.store_wait(0)
    else:
        SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
        o_r = gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
        o_d = gl.arange(0, D, gl.SliceLayout(0, SUMS))
        p_x += i_b.to(gl.int64) * stride_b + i_h * stride_h
        gl.store(p_x + ((row + o_r).to(gl.int64) * stride_t)[:, None] + o_d[None, :], b_x, mask=(o_r < left)[:, None])


@gluon.jit
def _warpgroup(
    x,
    outputs,
    buffers,
    barriers,
    place,
    masks,
    part,
    splits,
    scale,
    scale_log2,
    BM: gl.constexpr,
    D: gl.constexpr,
    W: gl.constexpr,
):
    """64 keys: their dk and dv, and one of the two parts of dq."""
    q, _k, _v, _do, _rows, _acc, dk, dv = x
    s_q, s_do, s_k, s_v, s_rows, s_ds, s_dq = buffers
    k_full, v_full, q_full, q_free, do_full, do_free, ds_full, dq_full, dq_free = barriers
    i_b, i_h, _i_n, j0, first, last, count, begin, _r0 = place
    masked_before, masked_from, start, Tk, window = masks
    p_dk, p_dv, stride_b, stride_t, stride_h = outputs
    dtype: gl.constexpr = q.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    # A row of the shared layout is 128 bytes: a tile of D or BM columns is D / 64 or BM / 64 panels of 64.
    k_panels = view(s_k, dtype, [2 * (D // 64), ROWS, 64], s_k.layout)
    ds_panels = view(s_ds, dtype, [4 * (BM // 64), ROWS, 64], s_ds.layout)
    o_j = j0 + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    o_m = start + gl.arange(0, BM, QUERIES)
    b_dk = gl.zeros([ROWS, D], gl.float32, SUMS)
    b_dv = gl.zeros([ROWS, D], gl.float32, SUMS)
    mbarrier.wait(k_full, 0)
    i_m, i_g = last, 0 * last
    for t in range(count):
        i_m, i_g = _next(i_m, i_g, first, last)
        stage = t & 1
        phase = (t >> 1) & 1
        slot = stage * 2 + W
        none = gl.zeros([ROWS, BM], gl.float32, SCORES)
        mbarrier.wait(q_full.index(stage), phase)
        # [64, D] @ [D, BM] -> [64, BM]
        b_s = warpgroup_mma(s_k.index(W), s_q.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        if t == 0:
            mbarrier.wait(v_full, 0)
        mbarrier.wait(do_full.index(stage), phase)
        # [64, D] @ [D, BM] -> [64, BM]
        b_dp = warpgroup_mma(s_v.index(W), s_do.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        b_lse = s_rows.index(2 * stage).load(QUERIES)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_p = gl.exp2(b_s * scale_log2 - b_lse[None, :])
        if (i_m < masked_before) | (i_m >= masked_from):
            apart = (i_m * BM + o_m)[None, :] - o_j[:, None]
            b_p = gl.where((apart >= 0) & (apart < window), b_p, 0.0)
        b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
        b_delta = s_rows.index(2 * stage + 1).load(QUERIES)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(dtype)
        b_p = gl.convert_layout(b_p.to(dtype), LEFT, assert_trivial=True)
        # Two slots in turn: whoever writes here has seen the other warpgroup's dS of the last tile, so its dq of the one before is done.
        s_ds.index(slot).store(b_ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(stage), count=1)
        b_ds = gl.convert_layout(b_ds, LEFT, assert_trivial=True)
        # [64, BM] @ [BM, D] -> [64, D]
        b_dv = warpgroup_mma(b_p, s_do.index(stage), b_dv, is_async=True)
        mbarrier.wait(ds_full.index(stage), phase)
        b_dq = gl.zeros([ROWS, 64], gl.float32, PART)
        for w in gl.static_range(2):
            # [64, 64] @ [64, 64] -> [64, 64]: of dq [BM, D], the columns W * 64 on (D = 128) or the rows W * 64 on (D = 64)
            b_left = ds_panels.index(stage * 2 * (BM // 64) + (w if D == 128 else 2 * w + W)).permute((1, 0))
            b_dq = warpgroup_mma(b_left, k_panels.index(2 * w + W if D == 128 else w), b_dq, use_acc=w > 0, is_async=True)
        # [64, BM] @ [BM, D] -> [64, D]
        b_dk = warpgroup_mma(b_ds, s_q.index(stage), b_dk, is_async=True)
        # The last product runs while dq is on its way.
        mbarrier.wait(dq_free.index(slot), phase ^ 1)
        b_dq, b_dv, b_p = warpgroup_mma_wait(1, deps=(b_dq, b_dv, b_p))
        mbarrier.arrive(do_free.index(stage), count=1)
        s_dq.index(slot).store(b_dq)
        fence_async_shared()
        mbarrier.arrive(dq_full.index(slot), count=1)
        b_dk, b_ds = warpgroup_mma_wait(0, deps=(b_dk, b_ds))
        mbarrier.arrive(q_free.index(stage), count=1)
    if splits > 0:  # the far sink pairs of these keys, in the order of their queries
        o_r = W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
        p_part = part + o_r[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, SUMS))[None, :]
        for _ in range(splits):
            b_dk += gl.load(p_part)
            b_dv += gl.load(p_part + KEYS * D)
            p_part += 2 * KEYS * D
    row = begin + j0 + W * ROWS
    left = Tk - j0 - W * ROWS
    # This warpgroup alone reads its rows of V: its outputs leave through them.
    _store(dv, p_dv, s_v.index(W), b_dv.to(dtype), i_b, row, i_h, left, stride_b, stride_t, stride_h, D)
    _store(dk, p_dk, s_v.index(W), (b_dk * scale).to(dtype), i_b, row, i_h, left, stride_b, stride_t, stride_h, D)


@gluon.jit(
    do_not_specialize=["Tq", "Tk", "window", "sinks", "sequences", "slots", "tiles", "splits", "far_slots", "HK", "G"],
    do_not_specialize_on_alignment=["Tq", "Tk", "window", "sinks", "sequences", "slots", "tiles", "splits", "far_slots", "HK", "G"],
)
def swa_bwd_hopper_kernel(
    q,
    k,
    v,
    do,
    rows,
    acc,
    dk,
    dv,
    p_dk,
    p_dv,
    part,
    turn,
    ticket,
    cu_seqlens,
    stride_b,
    stride_t,
    stride_h,
    Tq,
    Tk,
    window,
    sinks,
    sequences,
    slots,
    tiles,
    splits,
    far_slots,
    scale,
    scale_log2,
    HK,
    G,
    D: gl.constexpr,
    BM: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Grid: key tiles (`slots`), fastest, times key/value heads times batch, as `ticket` gives them out.

    Programs that run together so work on one head, or two: at D = 128 its queries with their dO and dq take 1 KB a token over 132 * 128 +
    window tokens, which stays in the L2. Measured on an H100 at T = 32768, window 4096, 16/8 heads, with the 8 heads fastest: 5.7 ms with
    the two heads of a group one after the other (50 MB in use), 9.0 ms with these in turn (100 MB: each tile comes from DRAM).

    q, k, v, do, dk, dv: descriptors of [B, T, H, D] in tiles of BM (q, do) or 64 rows. rows: [2, B, HQ, P], see kernels/bwd.py. acc: fp32
    [B, HQ, P, D]; left unscaled. turn: int32 [B, HQ, tiles = P / BM] and ticket: int32 [1], both zero. part: what the far sink pairs
    of `splits` ranges add to dk and dv.
    """
    pid = gl.atomic_add(ticket, 1)
    slot = pid % slots
    i_h = pid // slots % HK
    i_b = pid // slots // HK
    i_n = slot
    begin = 0
    r0 = 0
    i_f = i_b
    if cu_seqlens is not None:
        sequence, begin, Tk, i_n = _sequence_of_slot(cu_seqlens, sequences, Tk, slot)
        Tq = Tk
        r0 = (begin // ROW_TILE + sequence) * ROW_TILE
        i_f = gl.where(far_slots == sequences, sequence, begin // (window + 1))
    start = Tk - Tq
    j0 = i_n * KEYS
    # A slot behind its sequence's end has no queries, and stores nothing. Keys beyond Tk count as keys: causality hides them.
    first, full, right, last, _far, _far_full, far_end = key_tiles(j0, j0 + KEYS, start, Tk, window, sinks, BM)
    last = gl.where(j0 < Tk, last, first)
    splits = gl.where((j0 < Tk) & (far_end > 0), splits, 0)
    sink_tiles = (sinks + KEYS - 1) // KEYS
    part += ((i_f.to(gl.int64) * sink_tiles + i_n) * HK + i_h) * splits * (2 * KEYS * D)

    dtype: gl.constexpr = q.dtype
    HALF: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    s_q = gl.allocate_shared_memory(dtype, [2, BM, D], HALF)
    s_do = gl.allocate_shared_memory(dtype, [2, BM, D], HALF)
    s_k = gl.allocate_shared_memory(dtype, [2, ROWS, D], HALF)
    s_v = gl.allocate_shared_memory(dtype, [2, ROWS, D], HALF)
    s_rows = gl.allocate_shared_memory(gl.float32, [4, BM], LINE)
    s_ds = gl.allocate_shared_memory(dtype, [4, ROWS, BM], HALF)
    s_dq = gl.allocate_shared_memory(gl.float32, [4, ROWS, 64], gl.NVMMASharedLayout(128, 32, 2))
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    do_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    dq_full = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    dq_free = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_free.index(i), count=2)
    for i in gl.static_range(4):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_free.index(i), count=1)
    fence_async_shared()
    x = (q, k, v, do, rows, acc, dk, dv)
    buffers = (s_q, s_do, s_k, s_v, s_rows, s_ds, s_dq)
    barriers = (kv_full.index(0), kv_full.index(1), q_full, q_free, do_full, do_free, ds_full, dq_full, dq_free)
    place = (i_b, i_h, i_n, j0, first, last, G * (last - first), begin, r0)
    outputs = (p_dk, p_dv, stride_b, stride_t, stride_h)
    masks = (full, right, start, Tk, window)
    gl.warp_specialize(
        [
            (_warpgroup, (x, outputs, buffers, barriers, place, masks, part, splits, scale, scale_log2, BM, D, 0)),
            (_warpgroup, (x, outputs, buffers, barriers, place, masks, part, splits, scale, scale_log2, BM, D, 1)),
            (_load_warp, (x, buffers, barriers, place, G, BM, D)),
            (_add_warp, (x, buffers, barriers, place, turn, start, window, tiles, HK * G, G, BM, D)),
        ],
        [4, 1, 1],
        [REGISTERS, 32, 32],
    )
