"""`swa_step` on the GPU: one token a sequence against a `WindowCache`, the cache updated in place.

Two kernels. The first one only reads the cache: each program attends one range of slots of one key/value head with all its
query heads (the rows of one product) and leaves an unnormalised sum. The second one adds the ranges up in a fixed order
together with the new token, which it takes from the input, and writes: output, the token's slot, the position. So no
program reads what another one writes in the same launch, and the cache update costs no pass of its own.

On Hopper and later the launches are programmatic (PDL): each kernel's programs may start while the kernel before it drains and
wait for its writes (`gdc_wait`) before they touch what it writes.

Slots are numbered through both buffers: slot s < sinks is sink s, slot s >= sinks is ring slot s - sinks. A sequence at
position p (the index of the new token) has its first min(p, sinks + window) slots filled. The new token goes to slot p if
p < sinks, else to slot sinks + (p - sinks) % window: the first free one, or the one of the token that leaves the window.
"""

import triton
import triton.language as tl

# The running maximum of a range without a visible slot: finite, so that no difference is inf - inf.
_LOWEST = tl.constexpr(-1e38)
# Rows that a program has fetched at once: a thread each.
_FETCHED = tl.constexpr(64)


@triton.jit
def _new_slot(position, window, sinks):
    return tl.where(position < sinks, position, sinks + (position - sinks) % window)


@triton.jit
def _range(position, window, sinks, i_s, splits):
    """Slots [start, end) of range i_s: the filled ones are shared out evenly, by 16: a cache that is hardly filled keeps all busy too."""
    filled = tl.cast(tl.minimum(position, window + sinks), tl.int32)
    units = tl.cdiv(filled, 16)
    return i_s * units // splits * 16, tl.minimum((i_s + 1) * units // splits * 16, filled)


@triton.jit
def _fetch(p, m_s, BYTES: tl.constexpr):
    """Have the L2 cache read BYTES at each pointer of m_s; nothing waits for it."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [tl.cast(p, tl.int64), tl.cast(m_s, tl.int32), tl.full([1], BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["window", "sinks", "splits"])
def swa_step_split_kernel(
    q,
    q_sinks,
    sink_k,
    sink_v,
    ring_k,
    ring_v,
    positions,
    active,
    part_o,
    part_ml,
    seen,
    stride_qb,
    stride_qh,
    stride_qd,
    stride_fb,
    stride_fh,
    stride_fd,
    stride_a,
    window,
    sinks,
    splits,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
    FETCH: tl.constexpr,
):
    """Grid (HK, splits, B): heads vary fastest, so that programs that run together read neighbouring memory.

    FETCH: the bytes of a slot's row, or 0: the cache is on its way to L2 while the kernel before runs, which makes q and not the cache.
    """
    i_h, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    HK = tl.num_programs(0)
    sink_k += (i_b * sinks * HK + i_h) * D
    sink_v += (i_b * sinks * HK + i_h) * D
    ring_k += (i_b * window * HK + i_h) * D
    ring_v += (i_b * window * HK + i_h) * D
    if FETCH > 0:
        start, end = _range(tl.load(positions + i_b), window, sinks, i_s, splits)
        for s0 in range(start, end, _FETCHED):
            o_s = s0 + tl.arange(0, _FETCHED)
            sink = o_s < sinks
            o_r = tl.cast(tl.where(sink, o_s, o_s - sinks), tl.int64) * HK * D
            _fetch(tl.where(sink, sink_k + o_r, ring_k + o_r), o_s < end, FETCH)
            _fetch(tl.where(sink, sink_v + o_r, ring_v + o_r), o_s < end, FETCH)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(positions + i_b, volatile=FETCH > 0)
    on = position if active is None else tl.where(tl.load(active + i_b * stride_a) != 0, position, 0)
    if (i_h == 0) & (i_s == 0):
        # The second kernel's programs need the position, which one of them moves on.
        tl.store(seen + i_b, position)
    new = tl.cast(_new_slot(position, window, sinks), tl.int32)

    o_g, o_d, o_n = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BN)
    m_g, m_d = o_g < G, o_d < D
    o_h = i_h * G + o_g
    m_q = m_g[:, None] & m_d[None, :]
    b_q = tl.load(q + i_b * stride_qb + o_h[:, None] * stride_qh + o_d[None, :] * stride_qd, mask=m_q, other=0.0)
    if q_sinks is not None:
        b_f = tl.load(q_sinks + i_b * stride_fb + o_h[:, None] * stride_fh + o_d[None, :] * stride_fd, mask=m_q, other=0.0)

    b_m = tl.full([BG], _LOWEST, tl.float32)
    b_l = tl.zeros([BG], tl.float32)
    b_o = tl.zeros([BG, BD], tl.float32)
    start, end = _range(on, window, sinks, i_s, splits)
    for s0 in range(start, end, BN):
        o_s = s0 + o_n
        # The slot of the new token holds nothing yet, or the token that leaves the window.
        m_s = (o_s < end) & (o_s != new)
        sink = o_s < sinks
        o_r = tl.cast(tl.where(sink, o_s, o_s - sinks), tl.int64) * HK * D
        p_k = tl.where(sink, sink_k + o_r, ring_k + o_r)[:, None] + o_d[None, :]
        p_v = tl.where(sink, sink_v + o_r, ring_v + o_r)[:, None] + o_d[None, :]
        b_k = tl.load(p_k, mask=m_s[:, None] & m_d[None, :], other=0.0)
        b_v = tl.load(p_v, mask=m_s[:, None] & m_d[None, :], other=0.0)
        # [BG, BD] @ [BD, BN] -> [BG, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if q_sinks is not None:
            # [BG, BD] @ [BD, BN] -> [BG, BN]
            b_far = tl.dot(b_f, tl.trans(b_k), input_precision="ieee")
            b_s = tl.where((sink & (position - o_s >= window))[None, :], b_far, b_s)
        b_s = tl.where(m_s[None, :], b_s * scale_log2, float("-inf"))
        b_top = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_top[:, None])
        b_less = tl.exp2(b_m - b_top)
        b_l = b_l * b_less + tl.sum(b_p, 1)
        # [BG, BN] @ [BN, BD] -> [BG, BD]
        b_o = tl.dot(tl.cast(b_p, b_v.dtype), b_v, b_o * b_less[:, None], input_precision="ieee")
        b_m = b_top

    o_row = (i_b * HK * G + o_h) * splits + i_s
    tl.store(part_o + o_row[:, None] * D + o_d[None, :], b_o, mask=m_q)
    tl.store(part_ml + o_row * 2, b_m, mask=m_g)
    tl.store(part_ml + o_row * 2 + 1, b_l, mask=m_g)


@triton.jit(do_not_specialize=["window", "sinks", "splits"])
def swa_step_merge_kernel(
    q,
    k,
    v,
    sink_k,
    sink_v,
    ring_k,
    ring_v,
    positions,
    active,
    part_o,
    part_ml,
    seen,
    o,
    stride_qb,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vd,
    stride_a,
    window,
    sinks,
    splits,
    scale_log2,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(D, BC), HQ, B): one query head and BC channels of its output; the first head of a group also writes the token."""
    i_c, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    HQ = tl.num_programs(1)
    i_hk, HK = i_h // G, HQ // G
    o_d, o_s, o_c = tl.arange(0, BD), tl.arange(0, BS), i_c * BC + tl.arange(0, BC)
    m_d, m_c = o_d < D, o_c < D
    on = i_b >= 0
    if active is not None:
        on = tl.load(active + i_b * stride_a) != 0
    b_q = tl.load(q + i_b * stride_qb + i_h * stride_qh + o_d * stride_qd, mask=m_d, other=0.0)
    b_k = tl.load(k + i_b * stride_kb + i_hk * stride_kh + o_d * stride_kd, mask=m_d, other=0.0)
    b_kc = tl.load(k + i_b * stride_kb + i_hk * stride_kh + o_c * stride_kd, mask=m_c, other=0.0)
    b_vc = tl.load(v + i_b * stride_vb + i_hk * stride_vh + o_c * stride_vd, mask=m_c, other=0.0)

    # The new token is the first range: its score is finite, and so is every maximum from here on.
    b_m = tl.sum(tl.cast(b_q, tl.float32) * tl.cast(b_k, tl.float32), 0) * scale_log2
    b_l = tl.full([], 1.0, tl.float32)
    b_o = tl.cast(b_vc, tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(seen + i_b)
    row = (i_b * HQ + i_h) * splits
    for s0 in range(0, splits, BS):
        m_s = s0 + o_s < splits
        b_ms = tl.load(part_ml + (row + s0 + o_s) * 2, mask=m_s, other=-1e38)
        b_ls = tl.load(part_ml + (row + s0 + o_s) * 2 + 1, mask=m_s, other=0.0)
        b_os = tl.load(part_o + (row + s0 + o_s)[:, None] * D + o_c[None, :], mask=m_s[:, None] & m_c[None, :], other=0.0)
        b_top = tl.maximum(b_m, tl.max(b_ms, 0))
        b_w = tl.exp2(b_ms - b_top)
        b_less = tl.exp2(b_m - b_top)
        b_l = b_l * b_less + tl.sum(b_ls * b_w, 0)
        b_o = b_o * b_less + tl.sum(b_os * b_w[:, None], 0)
        b_m = b_top
    tl.store(o + (i_b * HQ + i_h) * D + o_c, tl.where(on, b_o / b_l, 0.0), mask=m_c)

    sink = position < sinks
    row = tl.where(sink, i_b * sinks + position, i_b * window + (position - sinks) % window)
    o_w = (row * HK + i_hk) * D + o_c
    # Widths and not booleans: the interpreter of Triton 3.9 broadcasts a scalar comparison wrongly.
    width = tl.where(on & (i_h % G == 0), D, 0)
    width_sink = tl.where(sink, width, 0)
    tl.store(sink_k + o_w, b_kc, mask=o_c < width_sink)
    tl.store(sink_v + o_w, b_vc, mask=o_c < width_sink)
    tl.store(ring_k + o_w, b_kc, mask=o_c < width - width_sink)
    tl.store(ring_v + o_w, b_vc, mask=o_c < width - width_sink)
    tl.store(positions + i_b, position + 1, mask=on & (i_c == 0) & (i_h == 0))
