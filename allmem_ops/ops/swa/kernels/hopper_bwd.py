"""The `swa` backward for sm_90 in Gluon: dk, dv and dq from one recomputation, five products a pair.

A program owns 128 keys of one key/value head: two warpgroups of 64 keys hold dk and dv in registers and walk over the query tiles
of each query head of the group. Scores are computed as K Q^T, so that P^T and dS^T come out as the left operands of dv += P^T dO and
dk += dS^T Q. The parts of dq go through shared memory to `acc` in float32, added by TMA. Besides the warpgroups a program has a warp
that loads and a warp that adds.

Order of the additions to a tile of `acc`: by key tile, so the sum is the same in every run. `turn` counts the additions of each tile; a
program adds when all key tiles before its own have. It walks from the last query tile back to the first: the program of the key tile
before is then two or more query tiles ahead at the same time, and nobody waits. Programs take their key tile from a counter
(the first of `turn`), so a program only ever waits for programs that have started.

Far sink pairs (SINKS): a tile of sinks sees all queries, so ranges of these are programs of their own, which come before those of the
window, add to `acc` before them, and leave their dk and dv to the window program of the same keys. Without SINKS (packed sequences, or
queries of their own for sinks) the portable kernels have left them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from allmem_ops.ops.kernels.gluon import tma_add, tma_load, tma_store, view
from allmem_ops.ops.swa import geometry

key_tiles = gluon.jit(geometry.key_tiles)

ROWS = gl.constexpr(64)  # keys of a warpgroup, queries of a tile, rows of a part of dq
KEYS = gl.constexpr(128)
THREADS = gl.constexpr(256)  # that hold dk and dv
FAR_AWAY = gl.constexpr(2**31 - 1)
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
        fence.proxy.async.global;
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
def _announce(p_done):
    """Each thread counts itself in after its stores."""
    gl.inline_asm_elementwise(
        """{
        red.release.gpu.global.add.s32 [$1], 1;
        mov.b32 $0, 0;
        }""",
        "=r,l",
        [p_done.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _await_parts(p_done, threads):
    """Wait until so many threads have counted themselves in."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred mine;
        .reg .b32 count;
        AGAIN:
        ld.acquire.gpu.global.b32 count, [$1];
        setp.lt.s32 mine, count, $2;
        @mine bra AGAIN;
        mov.b32 $0, count;
        }""",
        "=r,l,r",
        [p_done.to(gl.int64), threads],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _next(i_x, i_y, inner):
    """The next step of a walk in rounds of `inner` steps, from (-1, 0) on."""
    i_x += 1
    if i_x == inner:
        i_x = 0
        i_y += 1
    return i_x, i_y


@gluon.jit
def _tile(i_x, i_y, last, in_turn):
    """(query tile, head of the group) of a step: a round is a head, from its last tile back, or, `in_turn`, a tile of all heads."""
    i_m = last - 1 - gl.where(in_turn != 0, i_y, i_x)
    return i_m, gl.where(in_turn != 0, i_x, i_y)


@gluon.jit
def _step(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring, and its phase."""
    slot += 1
    if slot == SLOTS:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def _clear(s_x, left, COLUMNS: gl.constexpr, WIDTH: gl.constexpr):
    """Zero the rows of a tile from `left` on, by one warp: a period of the swizzle, eight rows of a panel of WIDTH columns, at a time."""
    LINES: gl.constexpr = gl.BlockedLayout([1, WIDTH // 16], [2, 16], [1, 1], [1, 0])
    pieces = view(s_x, s_x.dtype, [COLUMNS // WIDTH * ROWS // 8, 8, WIDTH], s_x.layout)
    o_r = gl.arange(0, 8, gl.SliceLayout(1, LINES))
    for n in range(gl.maximum(left, 0) // 8, ROWS // 8):
        for w in gl.static_range(COLUMNS // WIDTH):
            piece = pieces.index(w * (ROWS // 8) + n)
            piece.store(gl.where((n * 8 + o_r < left)[:, None], piece.load(LINES), 0.0).to(s_x.dtype))


@gluon.jit
def _load_warp(x, buffers, barriers, place, Tk, G, D: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr):
    """Loads; and of a packed sequence's last tiles it zeroes the rows of the next sequence: their p and dS are 0, but 0 * NaN is not.

    Such a tile arrives at a barrier of this warp's own, the last of its ring, and is passed on when it is clean.
    """
    q, k, v, do, rows, _acc, _dk, _dv, k_half = x
    s_q, s_do, s_k, s_v, s_rows, _s_ds, _s_dq, s_half = buffers
    kv_full, q_full, q_free, do_full, do_free, _ds_full, _dq_full, _dq_free = barriers
    i_b, i_h, _i_n, j0, inner, last, count, begin, r0, in_turn = place
    QUERY_BYTES: gl.constexpr = ROWS * D * 2 + ROWS * 4
    KEY_BYTES: gl.constexpr = KEYS * D * 2
    VALUE_BYTES: gl.constexpr = KEYS * 256  # of V, and at D = 64 of K once more
    k_full, v_full = kv_full.index(0), kv_full.index(1)
    if PACKED:
        k_full = kv_full.index(gl.where(Tk - j0 < KEYS, 2, 0))
        v_full = kv_full.index(gl.where(Tk - j0 < KEYS, 2, 1))
    if count > 0:
        mbarrier.expect(k_full, KEY_BYTES)
        for w in gl.static_range(2):
            tma_load(k, [i_b, begin + j0 + w * ROWS, i_h, 0], k_full, view(s_k.index(w), k.dtype, [1, ROWS, 1, D], k.layout))
    i_x, i_y = -1 + 0 * last, 0 * last
    stage, phase = 0 * last, 1 + 0 * last
    cuts = 0 * last
    for t in range(count):
        i_x, i_y = _next(i_x, i_y, inner)
        i_m, i_g = _tile(i_x, i_y, last, in_turn)
        i_hq = i_h * G + i_g
        row = begin + i_m * ROWS
        left = Tk - i_m * ROWS
        arrival = stage
        if PACKED:
            arrival = gl.where(left < ROWS, STAGES, stage)
        mbarrier.wait(q_free.index(stage), phase)
        full = q_full.index(arrival)
        mbarrier.expect(full, QUERY_BYTES)
        tma_load(q, [i_b, row, i_hq, 0], full, view(s_q.index(stage), q.dtype, [1, ROWS, 1, D], q.layout))
        tma_load(rows, [0, i_b, i_hq, r0 + i_m * ROWS], full, view(s_rows.index(2 * stage), gl.float32, [1, 1, 1, ROWS], rows.layout))
        if t == 0:
            mbarrier.expect(v_full, VALUE_BYTES)
            for w in gl.static_range(2):
                tma_load(v, [i_b, begin + j0 + w * ROWS, i_h, 0], v_full, view(s_v.index(w), v.dtype, [1, ROWS, 1, D], v.layout))
            if D == 64:
                for n in gl.static_range(4):
                    half = view(s_half.index(n), k.dtype, [1, ROWS, 1, 32], k_half.layout)
                    tma_load(k_half, [i_b, begin + j0 + n // 2 * ROWS, i_h, n % 2 * 32], v_full, half)
        mbarrier.wait(do_free.index(stage), phase)
        full = do_full.index(arrival)
        mbarrier.expect(full, QUERY_BYTES)
        tma_load(do, [i_b, row, i_hq, 0], full, view(s_do.index(stage), do.dtype, [1, ROWS, 1, D], do.layout))
        tma_load(rows, [1, i_b, i_hq, r0 + i_m * ROWS], full, view(s_rows.index(2 * stage + 1), gl.float32, [1, 1, 1, ROWS], rows.layout))
        if PACKED:
            if (t == 0) & (Tk - j0 < KEYS):
                mbarrier.wait(kv_full.index(2), 0)
                for w in gl.static_range(2):
                    _clear(s_v.index(w), Tk - j0 - w * ROWS, D, 64)
                    if D == 64:
                        _clear(s_half.index(2 * w), Tk - j0 - w * ROWS, 32, 32)
                        _clear(s_half.index(2 * w + 1), Tk - j0 - w * ROWS, 32, 32)
                    else:
                        _clear(s_k.index(w), Tk - j0 - w * ROWS, D, 64)
                fence_async_shared()
                mbarrier.arrive(kv_full.index(0), count=1)
                mbarrier.arrive(kv_full.index(1), count=1)
            if left < ROWS:
                mbarrier.wait(q_full.index(STAGES), cuts)
                _clear(s_q.index(stage), left, D, 64)
                mbarrier.wait(do_full.index(STAGES), cuts)
                _clear(s_do.index(stage), left, D, 64)
                fence_async_shared()
                mbarrier.arrive(q_full.index(stage), count=1)
                mbarrier.arrive(do_full.index(stage), count=1)
                cuts ^= 1
        stage, phase = _step(stage, phase, STAGES)


@gluon.jit
def _add_warp(
    x, buffers, barriers, place, turn, start, window, sinks, tiles, Tk, HQ, G, D: gl.constexpr, SLOTS: gl.constexpr, SINKS: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Adds each part of dq to `acc` in its turn; the first key tile of a query tile stores it.

    A packed sequence's last tile ends among the next one's queries. There it adds zeros (what comes as 0 * NaN too), which
    change nothing at any time, and does not store; for its own queries zeros are there (`swa_bwd_rows_kernel`).
    """
    _q, _k, _v, _do, _rows, acc, _dk, _dv, _k_half = x
    _s_q, _s_do, _s_k, _s_v, _s_rows, _s_ds, s_dq, _s_half = buffers
    _kv_full, _q_full, _q_free, _do_full, _do_free, _ds_full, dq_full, dq_free = barriers
    i_b, i_h, i_n, _j0, inner, last, count, begin, r0, in_turn = place
    Tq, sink_tiles, range_ = sinks
    turn += 1 + (i_b * HQ + i_h * G).to(gl.int64) * tiles + r0 // ROWS
    i_x, i_y = _next(-1 + 0 * last, 0 * last, inner)
    i_m, i_g = _tile(i_x, i_y, last, in_turn)
    seen = 0 * last
    slot, phase = 0 * last, 0 * last
    for _ in range(count):
        p_turn = turn + i_g * tiles + i_m
        rank = i_n - gl.maximum(start + i_m * ROWS - window + 1, 0) // KEYS
        if SINKS:  # add before the window does: those tiles of sinks that a query of this tile sees from afar
            sunk = gl.minimum((gl.maximum(start + gl.minimum((i_m + 1) * ROWS, Tq) - window, 0) + KEYS - 1) // KEYS, sink_tiles)
            rank = gl.where(range_ >= 0, i_n, rank + sunk)
        row = begin + i_m * ROWS
        i_hq = i_h * G + i_g
        _await_turn(p_turn, rank, seen)
        for w in gl.static_range(2):
            mbarrier.wait(dq_full.index(slot * 2 + w), phase)
            first = rank == 0
            if PACKED:
                left = Tk - i_m * ROWS
                first &= left >= ROWS
                if left < ROWS:
                    _clear(s_dq.index(slot * 2 + w), left, D // 2, 32)
                    fence_async_shared()
            b_dq = view(s_dq.index(slot * 2 + w), gl.float32, [1, 1, ROWS, D // 2], acc.layout)
            if first:
                tma_store(acc, [i_b, i_hq, row, w * (D // 2)], b_dq)
            else:
                tma_add(acc, [i_b, i_hq, row, w * (D // 2)], b_dq)
        # The next turn is looked up while this tile is on its way; after the last tile, one that does not matter.
        i_x, i_y = _next(i_x, i_y, inner)
        i_m, i_g = _tile(i_x, i_y, last, in_turn)
        seen = _look_up_turn(turn + gl.minimum(i_g, G - 1) * tiles + gl.maximum(i_m, 0))
        _pass_turn(p_turn, rank + 1)
        for w in gl.static_range(2):
            mbarrier.arrive(dq_free.index(slot * 2 + w), count=1)
        slot, phase = _step(slot, phase, SLOTS)


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
def _put_out(x, outputs, s_x, place, Tk, p_part, splits, scale, b_dk, b_dv, D: gl.constexpr, W: gl.constexpr):
    """Add what the far sinks leave for these keys and put dk and dv out, through shared memory that this warpgroup alone reads."""
    dk, dv = x[6], x[7]
    p_dk, p_dv, stride_b, stride_t, stride_h = outputs
    i_b, i_h, _i_n, j0, _inner, _last, _count, begin, _r0, _in_turn = place
    if splits > 0:  # in the order of their queries
        for _ in range(splits):
            b_dk += gl.load(p_part)
            b_dv += gl.load(p_part + KEYS * D)
            p_part += 2 * KEYS * D
    row = begin + j0 + W * ROWS
    left = Tk - j0 - W * ROWS
    _store(dv, p_dv, s_x, b_dv.to(dv.dtype), i_b, row, i_h, left, stride_b, stride_t, stride_h, D)
    _store(dk, p_dk, s_x, (b_dk * scale).to(dk.dtype), i_b, row, i_h, left, stride_b, stride_t, stride_h, D)


@gluon.jit
def _put_sums(
    x, outputs, s_x, place, Tk, parts, scale, b_dk, b_dv, D: gl.constexpr, W: gl.constexpr, SUMS: gl.constexpr, SINKS: gl.constexpr
):
    """dk and dv to where they belong: those of a range of far sink pairs into `part`."""
    part, splits, range_, p_done = parts
    o_r = W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    p_part = part + o_r[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, SUMS))[None, :]
    if SINKS:
        if range_ >= 0:
            p_part += range_ * (2 * KEYS * D)
            gl.store(p_part, b_dk)
            gl.store(p_part + KEYS * D, b_dv)
            _announce(p_done)
        else:
            if splits > 0:
                _await_parts(p_done, splits * THREADS)
            _put_out(x, outputs, s_x, place, Tk, p_part, splits, scale, b_dk, b_dv, D, W)
    else:
        _put_out(x, outputs, s_x, place, Tk, p_part, splits, scale, b_dk, b_dv, D, W)


@gluon.jit
def _scores(s_q, s_do, s_k, s_v, s_rows, q_full, do_full, stage, phase, none, QUERIES: gl.constexpr, W: gl.constexpr):
    """S^T - lse / scale and dP^T - delta of a tile, in flight. As what the products start from, lse and delta keep no registers."""
    mbarrier.wait(q_full.index(stage), phase)
    mbarrier.wait(do_full.index(stage), phase)
    b_s = s_rows.index(2 * stage).load(QUERIES)[None, :] - none
    b_dp = s_rows.index(2 * stage + 1).load(QUERIES)[None, :] - none
    # [64, D] @ [D, 64] -> [64, 64]
    b_s = warpgroup_mma(s_k.index(W), s_q.index(stage).permute((1, 0)), b_s, is_async=True)
    # [64, D] @ [D, 64] -> [64, 64]
    b_dp = warpgroup_mma(s_v.index(W), s_do.index(stage).permute((1, 0)), b_dp, is_async=True)
    return b_s, b_dp


@gluon.jit
def _softmax(b_s, b_dp, i_m, o_m, o_j, masks, scale_log2, dtype: gl.constexpr, BEHIND: gl.constexpr, SINKS: gl.constexpr):
    """P^T and dS^T, while the BEHIND products that were issued after theirs run."""
    masked_before, masked_from, _start, _Tk, nearest, farthest, _hidden = masks
    b_s = warpgroup_mma_wait(BEHIND + 1, deps=(b_s,))
    b_p = gl.exp2(b_s * scale_log2)
    if (i_m < masked_before) | (i_m >= masked_from):
        apart = (i_m * ROWS + o_m)[None, :] - o_j[:, None]
        if SINKS:
            b_p = gl.where((apart >= nearest) & (apart < farthest), b_p, 0.0)
        else:
            b_p = gl.where((apart >= 0) & (apart < farthest), b_p, 0.0)
    b_dp = warpgroup_mma_wait(BEHIND, deps=(b_dp,))
    return b_p.to(dtype), (b_p * b_dp).to(dtype)


@gluon.jit
def _unless_hidden(o_j, hidden):
    """Positions of keys; those from `hidden` on are after all queries."""
    return gl.where(o_j < hidden, o_j, FAR_AWAY // 2)


@gluon.jit
def _warpgroup_128(
    x,
    outputs,
    buffers,
    barriers,
    place,
    masks,
    parts,
    scale,
    scale_log2,
    W: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    SINKS: gl.constexpr,
):
    """64 keys of head dim 128: their dk and dv, and one half of dq's columns. The last product runs while dq is on its way."""
    s_q, s_do, s_k, s_v, s_rows, s_ds, s_dq, _s_half = buffers
    kv_full, q_full, q_free, do_full, do_free, ds_full, dq_full, dq_free = barriers
    _i_b, _i_h, _i_n, j0, inner, last, count, _begin, _r0, in_turn = place
    start, Tk = masks[2], masks[3]
    dtype: gl.constexpr = x[0].dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    # A row of the shared layout is 128 bytes: a tile of 128 columns is two panels of 64.
    k_panels = view(s_k, dtype, [4, ROWS, 64], s_k.layout)
    o_j = j0 + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    if SINKS:
        o_j = _unless_hidden(o_j, masks[6])
    o_m = start + gl.arange(0, ROWS, QUERIES)
    b_dk = gl.zeros([ROWS, 128], gl.float32, SUMS)
    b_dv = gl.zeros([ROWS, 128], gl.float32, SUMS)
    none = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    mbarrier.wait(kv_full.index(0), 0, pred=count > 0)
    mbarrier.wait(kv_full.index(1), 0, pred=count > 0)
    i_x, i_y = -1 + 0 * last, 0 * last
    stage, phase = 0 * last, 0 * last
    slot, ring = 0 * last, 0 * last
    out, passed = 0 * last, 1 + 0 * last
    for _ in range(count):
        i_x, i_y = _next(i_x, i_y, inner)
        i_m, _ = _tile(i_x, i_y, last, in_turn)
        b_s, b_dp = _scores(s_q, s_do, s_k, s_v, s_rows, q_full, do_full, stage, phase, none, QUERIES, W)
        b_p, b_ds = _softmax(b_s, b_dp, i_m, o_m, o_j, masks, scale_log2, dtype, 0, SINKS)
        b_p = gl.convert_layout(b_p, LEFT, assert_trivial=True)
        # Two slots in turn: whoever writes here has seen the other warpgroup's dS of the last tile, so its dq of the one before is done.
        s_ds.index(slot * 2 + W).store(b_ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(slot), count=1)
        b_ds = gl.convert_layout(b_ds, LEFT, assert_trivial=True)
        # [64, 64] @ [64, 128] -> [64, 128]
        b_dv = warpgroup_mma(b_p, s_do.index(stage), b_dv, is_async=True)
        mbarrier.wait(ds_full.index(slot), ring)
        b_dq = gl.zeros([ROWS, 64], gl.float32, SCORES)
        for w in gl.static_range(2):
            # [64, 64] @ [64, 64] -> [64, 64]: columns W * 64 on of dq [64, 128]
            b_dq = warpgroup_mma(s_ds.index(slot * 2 + w).permute((1, 0)), k_panels.index(2 * w + W), b_dq, use_acc=w > 0, is_async=True)
        # [64, 64] @ [64, 128] -> [64, 128]
        b_dk = warpgroup_mma(b_ds, s_q.index(stage), b_dk, is_async=True)
        mbarrier.wait(dq_free.index(out * 2 + W), passed)
        b_dq, b_dv, b_p = warpgroup_mma_wait(1, deps=(b_dq, b_dv, b_p))
        mbarrier.arrive(do_free.index(stage), count=1)
        s_dq.index(out * 2 + W).store(b_dq)
        fence_async_shared()
        mbarrier.arrive(dq_full.index(out * 2 + W), count=1)
        b_dk, b_ds = warpgroup_mma_wait(0, deps=(b_dk, b_ds))
        mbarrier.arrive(q_free.index(stage), count=1)
        stage, phase = _step(stage, phase, STAGES)
        slot, ring = _step(slot, ring, 2)
        out, passed = _step(out, passed, SLOTS)
    _put_sums(x, outputs, s_v.index(W), place, Tk, parts, scale, b_dk, b_dv, 128, W, SUMS, SINKS)


@gluon.jit
def _sums_64(b_p, b_ds, b_dv, b_dk, s_q, s_do, s_ds, s_half, ds_full, stage, slot, ring, W: gl.constexpr):
    """dv, dk and this warpgroup's part of dq of a tile, in flight: four products."""
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    # [64, 64] @ [64, 64] -> [64, 64]
    b_dv = warpgroup_mma(b_p, s_do.index(stage), b_dv, is_async=True)
    # [64, 64] @ [64, 64] -> [64, 64]
    b_dk = warpgroup_mma(b_ds, s_q.index(stage), b_dk, is_async=True)
    mbarrier.wait(ds_full.index(slot), ring)
    b_dq = gl.zeros([ROWS, 32], gl.float32, PART)
    for w in gl.static_range(2):
        # [64, 64] @ [64, 32] -> [64, 32]: columns W * 32 on of dq [64, 64]
        b_dq = warpgroup_mma(s_ds.index(slot * 2 + w).permute((1, 0)), s_half.index(2 * w + W), b_dq, use_acc=w > 0, is_async=True)
    return b_dv, b_dk, b_dq


@gluon.jit
def _warpgroup_64(
    x, outputs, buffers, barriers, place, masks, parts, scale, scale_log2, W: gl.constexpr, STAGES: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """The same for head dim 64, where registers are left for a tile's sums to run under the next tile's exponentials."""
    s_q, s_do, s_k, s_v, s_rows, s_ds, s_dq, s_half = buffers
    kv_full, q_full, q_free, do_full, do_free, ds_full, dq_full, dq_free = barriers
    _i_b, _i_h, _i_n, j0, inner, last, count, _begin, _r0, in_turn = place
    start, Tk = masks[2], masks[3]
    dtype: gl.constexpr = x[0].dtype
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, SUMS)
    o_j = j0 + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    if SINKS:
        o_j = _unless_hidden(o_j, masks[6])
    o_m = start + gl.arange(0, ROWS, QUERIES)
    b_dk = gl.zeros([ROWS, 64], gl.float32, SUMS)
    b_dv = gl.zeros([ROWS, 64], gl.float32, SUMS)
    none = gl.zeros([ROWS, ROWS], gl.float32, SUMS)
    if count > 0:
        mbarrier.wait(kv_full.index(0), 0)
        mbarrier.wait(kv_full.index(1), 0)
        i_x, i_y = 0 * last, 0 * last
        stage, phase = 0 * last, 0 * last
        slot, ring = 0 * last, 0 * last
        i_m, _ = _tile(i_x, i_y, last, in_turn)
        b_s, b_dp = _scores(s_q, s_do, s_k, s_v, s_rows, q_full, do_full, stage, phase, none, QUERIES, W)
        b_p, b_ds = _softmax(b_s, b_dp, i_m, o_m, o_j, masks, scale_log2, dtype, 0, SINKS)
        s_ds.index(W).store(b_ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(0), count=1)
        b_p = gl.convert_layout(b_p, LEFT, assert_trivial=True)
        b_ds = gl.convert_layout(b_ds, LEFT, assert_trivial=True)
        for _ in range(1, count):
            i_x, i_y = _next(i_x, i_y, inner)
            i_m, _ = _tile(i_x, i_y, last, in_turn)
            before = stage
            stage, phase = _step(stage, phase, STAGES)
            b_s, b_dp = _scores(s_q, s_do, s_k, s_v, s_rows, q_full, do_full, stage, phase, none, QUERIES, W)
            b_dv, b_dk, b_dq = _sums_64(b_p, b_ds, b_dv, b_dk, s_q, s_do, s_ds, s_half, ds_full, before, slot, ring, W)
            b_p1, b_ds1 = _softmax(b_s, b_dp, i_m, o_m, o_j, masks, scale_log2, dtype, 4, SINKS)
            mbarrier.wait(dq_free.index(slot * 2 + W), ring ^ 1)
            b_dq, b_dv, b_dk, b_p, b_ds = warpgroup_mma_wait(0, deps=(b_dq, b_dv, b_dk, b_p, b_ds))
            mbarrier.arrive(do_free.index(before), count=1)
            mbarrier.arrive(q_free.index(before), count=1)
            s_dq.index(slot * 2 + W).store(b_dq)
            before = slot
            slot, ring = _step(slot, ring, 2)
            # Whoever writes here has seen the other warpgroup's dS of the last tile, so its dq of the one before is done.
            s_ds.index(slot * 2 + W).store(b_ds1)
            fence_async_shared()
            mbarrier.arrive(dq_full.index(before * 2 + W), count=1)
            mbarrier.arrive(ds_full.index(slot), count=1)
            b_p = gl.convert_layout(b_p1, LEFT, assert_trivial=True)
            b_ds = gl.convert_layout(b_ds1, LEFT, assert_trivial=True)
        b_dv, b_dk, b_dq = _sums_64(b_p, b_ds, b_dv, b_dk, s_q, s_do, s_ds, s_half, ds_full, stage, slot, ring, W)
        mbarrier.wait(dq_free.index(slot * 2 + W), ring ^ 1)
        b_dq, b_dv, b_dk, b_p, b_ds = warpgroup_mma_wait(0, deps=(b_dq, b_dv, b_dk, b_p, b_ds))
        s_dq.index(slot * 2 + W).store(b_dq)
        fence_async_shared()
        mbarrier.arrive(dq_full.index(slot * 2 + W), count=1)
    _put_sums(x, outputs, s_v.index(W), place, Tk, parts, scale, b_dk, b_dv, 64, W, SUMS, SINKS)


@gluon.jit
def _place_in_order(pid, windows, ranges, units):
    """(whether it is one of far sinks, its unit, which one of the unit's) of a program.

    A unit, some heads, has `ranges` programs of far sinks, which come within the unit before: early enough that nobody waits for their
    additions.
    """
    ahead = windows // 4
    first = pid < ranges
    r = gl.maximum(pid - ranges, 0)
    unit = r // (windows + ranges)
    r -= unit * (windows + ranges)
    beyond = (unit + 1 < units) & (r >= ahead)
    next_unit = beyond & (r < ahead + ranges) & (pid >= ranges)
    r = gl.where(next_unit, r - ahead, gl.where(beyond, r - ranges, r))
    return first | next_unit, unit + gl.where(next_unit, 1, 0), gl.where(first, pid, r)


@gluon.jit(
    do_not_specialize=[
        "Tq",
        "Tk",
        "window",
        "sinks",
        "sequences",
        "slots",
        "tiles",
        "splits",
        "far_slots",
        "HK",
        "G",
        "heads",
        "in_turn",
        "units",
    ],
    do_not_specialize_on_alignment=[
        "Tq",
        "Tk",
        "window",
        "sinks",
        "sequences",
        "slots",
        "tiles",
        "splits",
        "far_slots",
        "HK",
        "G",
        "heads",
        "in_turn",
        "units",
    ],
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
    k_half,
    p_dk,
    p_dv,
    part,
    turn,
    done,
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
    heads,
    in_turn,
    units,
    D: gl.constexpr,
    REGISTERS: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    SINKS: gl.constexpr,
):
    """Grid: `heads` key/value heads, fastest, times key tiles (`slots`) times the other heads times batch, in the order of a counter.

    q, k, v, do, dk, dv: descriptors of [B, T, H, D] in tiles of 64 rows; k_half: k in tiles of 64 rows and 32 columns (D = 64 only).
    rows: [2, B, HQ, P], see `swa_bwd_rows_kernel`. acc: fp32 [B, HQ, Tq, D]; left unscaled. turn: int32 zeros, the counter and
    [B, HQ, tiles = P / 64]. part: what the far sink pairs of `splits` ranges add to dk and dv; SINKS:
    programs of this launch leave it, and count in `done` int32 [B, sink tiles, HK], zero. `heads` divides HK. `in_turn`: a query
    tile of all heads of the group before the next tile.
    """
    pid = gl.atomic_add(turn, 1)
    if SINKS:
        far, unit, r = _place_in_order(pid, slots * heads, splits * ((sinks + KEYS - 1) // KEYS) * heads, units)
    else:
        unit, r = pid // (slots * heads), pid % (slots * heads)
    blocks = HK // heads
    i_h = unit % blocks * heads + r % heads
    i_b = unit // blocks
    i_n = r // heads
    sink_tiles = (sinks + KEYS - 1) // KEYS
    range_ = splits
    if SINKS:
        # Tile after tile of sinks, not range after range: a tile's ranges are not those of the one before, whose additions it awaits.
        range_ = gl.where(far, i_n % splits, -1)
        i_n = gl.where(far, i_n // splits, i_n)
    begin = 0
    r0 = 0
    i_f = i_b
    if cu_seqlens is not None:
        sequence, begin, Tk, i_n = _sequence_of_slot(cu_seqlens, sequences, Tk, i_n)
        Tq = Tk
        r0 = (begin // ROW_TILE + sequence) * ROW_TILE
        i_f = gl.where(far_slots == sequences, sequence, begin // (window + 1))
    start = Tk - Tq
    j0 = i_n * KEYS
    # A slot behind its sequence's end has no queries, and stores nothing. Keys beyond Tk count as keys: causality hides them.
    first, full, right, last, far_first, far_full, far_end = key_tiles(j0, j0 + KEYS, start, Tk, window, sinks, ROWS)
    last = gl.where(j0 < Tk, last, first)
    part += ((i_f.to(gl.int64) * sink_tiles + i_n) * HK + i_h) * splits * (2 * KEYS * D)
    nearest, farthest, hidden = window, window, window
    if SINKS:
        done += (i_b * sink_tiles + i_n) * HK + i_h
        each = (far_end - far_first + splits - 1) // splits
        far_first = gl.minimum(far_first + range_ * each, far_end)
        first = gl.where(far, far_first, first)
        last = gl.where(far, gl.minimum(far_first + each, far_end), last)
        full = gl.where(far, far_full, full)
        right = gl.where(far, far_end, right)
        nearest = gl.where(far, window, 0)
        farthest = gl.where(far, FAR_AWAY, window)
        hidden = gl.where(far, sinks, FAR_AWAY)
    splits = gl.where((j0 < Tk) & (far_end > 0), splits, 0)

    dtype: gl.constexpr = q.dtype
    PACKED: gl.constexpr = cu_seqlens is not None
    HALF: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    s_q = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], HALF)
    s_do = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], HALF)
    s_k = gl.allocate_shared_memory(dtype, [2, ROWS, D], HALF)
    s_v = gl.allocate_shared_memory(dtype, [2, ROWS, D], HALF)
    s_half = s_k
    if D == 64:  # the columns of K in two halves, each an operand: half of a 128-byte row is none
        s_half = gl.allocate_shared_memory(dtype, [4, ROWS, 32], gl.NVMMASharedLayout(64, 16, 2))
    s_rows = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], LINE)
    s_ds = gl.allocate_shared_memory(dtype, [4, ROWS, ROWS], HALF)
    s_dq = gl.allocate_shared_memory(gl.float32, [2 * SLOTS, ROWS, D // 2], gl.NVMMASharedLayout(128, 32, 2))
    kv_full = gl.allocate_shared_memory(gl.int64, [3, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], BARRIER)
    do_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    dq_full = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], BARRIER)
    dq_free = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(ds_full.index(i), count=2)
    mbarrier.init(kv_full.index(2), count=2)
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_free.index(i), count=2)
        mbarrier.init(do_free.index(i), count=2)
    for i in gl.static_range(2 * SLOTS):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_free.index(i), count=1)
    fence_async_shared()
    x = (q, k, v, do, rows, acc, dk, dv, k_half)
    buffers = (s_q, s_do, s_k, s_v, s_rows, s_ds, s_dq, s_half)
    barriers = (kv_full, q_full, q_free, do_full, do_free, ds_full, dq_full, dq_free)
    count = last - first
    place = (i_b, i_h, i_n, j0, gl.where(in_turn != 0, G, count), last, G * count, begin, r0, in_turn)
    outputs = (p_dk, p_dv, stride_b, stride_t, stride_h)
    masks = (full, right, start, Tk, nearest, farthest, hidden)
    parts = (part, splits, range_, done)
    seen_far = (Tq, sink_tiles, range_)
    HQ = HK * G
    if D == 128:
        gl.warp_specialize(
            [
                (_warpgroup_128, (x, outputs, buffers, barriers, place, masks, parts, scale, scale_log2, 0, STAGES, SLOTS, SINKS)),
                (_warpgroup_128, (x, outputs, buffers, barriers, place, masks, parts, scale, scale_log2, 1, STAGES, SLOTS, SINKS)),
                (_load_warp, (x, buffers, barriers, place, Tk, G, D, STAGES, PACKED)),
                (_add_warp, (x, buffers, barriers, place, turn, start, window, seen_far, tiles, Tk, HQ, G, D, SLOTS, SINKS, PACKED)),
            ],
            [4, 1, 1],
            [REGISTERS, 32, 32],
        )
    else:
        gl.warp_specialize(
            [
                (_warpgroup_64, (x, outputs, buffers, barriers, place, masks, parts, scale, scale_log2, 0, STAGES, SINKS)),
                (_warpgroup_64, (x, outputs, buffers, barriers, place, masks, parts, scale, scale_log2, 1, STAGES, SINKS)),
                (_load_warp, (x, buffers, barriers, place, Tk, G, D, STAGES, PACKED)),
                (_add_warp, (x, buffers, barriers, place, turn, start, window, seen_far, tiles, Tk, HQ, G, D, SLOTS, SINKS, PACKED)),
            ],
            [4, 1, 1],
            [REGISTERS, 32, 32],
        )
