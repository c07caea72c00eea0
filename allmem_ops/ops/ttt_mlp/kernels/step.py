"""`ttt_mlp_step` on the GPU: a `MemoryState` read and written in place, each sequence at its own counters.

One program has one head of one sequence, all of its hidden units, so that row norms, the clip and the commit need nobody
else. A token is read at the weights as they are and appended to the tail; G takes the tail in when that is full or the chunk
is (`tail.py` says why), and a full chunk is committed. r_*: what reads use, the weights in q's dtype (`MemoryState.rounded`; the
weights themselves for float32).

* One token: the first kernel reads and appends, and is all that most steps need. The second one folds and commits where a
  sequence is due, and moves the counters on, which no program of it needs: it takes them from a copy that the first one made.
  On Hopper and later both are launched while the kernel before them drains, and wait for its writes (PDL).
* A pass over a state with a tail: one kernel folds it first.
* More tokens: one kernel does it all, in segments that end where the tail or the chunk is full; a last one moves the counters on.
"""

import triton
import triton.language as tl

from allmem_ops.ops.ttt_mlp.kernels.common import POST_WRITE, PRE_WRITE, column_size, row_scale

TAIL = tl.constexpr(64)
# Sequences that a program looks through at once for those that are due.
_BATCH = tl.constexpr(128)


# ---- one head of one sequence


@triton.jit
def _load(p, i_x, o_d, o_h, D: tl.constexpr, HID: tl.constexpr, DOWN: tl.constexpr):
    """Tile [BD, HS] of a matrix: [d, h] in memory (DOWN) or [h, d]."""
    if DOWN:
        at = o_d[:, None] * HID + o_h[None, :]
    else:
        at = o_h[None, :] * D + o_d[:, None]
    return tl.load(p + i_x * (D * HID) + at, mask=(o_d < D)[:, None] & (o_h < HID)[None, :], other=0.0)


@triton.jit
def _store(p, b, i_x, o_d, o_h, D: tl.constexpr, HID: tl.constexpr, DOWN: tl.constexpr):
    if DOWN:
        at = o_d[:, None] * HID + o_h[None, :]
    else:
        at = o_h[None, :] * D + o_d[:, None]
    tl.store(p + i_x * (D * HID) + at, b, mask=(o_d < D)[:, None] & (o_h < HID)[None, :])


@triton.jit
def _down_scale(w_down, n_down, i_x, o_d, eps, D: tl.constexpr, HID: tl.constexpr, HS: tl.constexpr):
    """N / (|W| + eps) of the rows of Wdown [BD], which run over all hidden units."""
    b_sum = tl.zeros([o_d.shape[0]], tl.float32)
    for h0 in range(0, HID, HS):
        b = _load(w_down, i_x, o_d, h0 + tl.arange(0, HS), D, HID, True)
        b_sum += tl.sum(b * b, 1)
    return row_scale(tl.load(n_down + i_x * D + o_d, mask=o_d < D, other=0.0), tl.sqrt_rn(b_sum), eps)


@triton.jit
def _unit_scaled(b, n, i_x, o_h, eps, HID: tl.constexpr):
    """A tile of Wgate or Wup, each hidden unit's row scaled to its norm in `n`."""
    return b * row_scale(tl.load(n + i_x * HID + o_h, mask=o_h < HID, other=0.0), column_size(b), eps)[None, :]


@triton.jit
def _fold(
    w_gate, w_up, w_down, g_gate, g_up, g_down, n_gate, n_up, n_down, tail_k, tail_v, tail_eta, i_x, tokens, eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, BT: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Add the gradient of the first `tokens` tokens of the tail to G."""
    o_d = tl.arange(0, BD)
    s_down = tl.zeros([BD], tl.float32)
    if NORM == PRE_WRITE:
        s_down = _down_scale(w_down, n_down, i_x, o_d, eps, D, HID, HS)
    # Operands that carry a rate are fp32 where q is float16, which lacks the range for them.
    dtype = tail_k.dtype.element_ty
    wide = tl.float32 if dtype == tl.float16 else dtype
    for h0 in range(0, HID, HS):
        o_h = h0 + tl.arange(0, HS)
        b_gate = _load(w_gate, i_x, o_d, o_h, D, HID, False)
        b_up = _load(w_up, i_x, o_d, o_h, D, HID, False)
        b_down = _load(w_down, i_x, o_d, o_h, D, HID, True)
        if NORM == PRE_WRITE:
            b_gate = _unit_scaled(b_gate, n_gate, i_x, o_h, eps, HID)
            b_up = _unit_scaled(b_up, n_up, i_x, o_h, eps, HID)
            b_down *= s_down[:, None]
        b_gate, b_up, b_down = tl.cast(b_gate, dtype), tl.cast(b_up, dtype), tl.cast(b_down, dtype)
        b_gg = _load(g_gate, i_x, o_d, o_h, D, HID, False)
        b_gu = _load(g_up, i_x, o_d, o_h, D, HID, False)
        b_gd = _load(g_down, i_x, o_d, o_h, D, HID, True)
        for t0 in range(0, TAIL, BT):
            o_t = t0 + tl.arange(0, BT)
            m_t = o_t < tokens
            m_td = m_t[:, None] & (o_d < D)[None, :]
            o_td = (i_x * TAIL + o_t)[:, None] * D + o_d[None, :]
            o_e = (i_x * TAIL + o_t) * 3
            b_k = tl.load(tail_k + o_td, mask=m_td, other=0.0)
            b_v = tl.load(tail_v + o_td, mask=m_td, other=0.0)
            # [BT, BD] @ [BD, HS] -> [BT, HS]
            b_a = tl.dot(b_k, b_gate, input_precision=PREC)
            b_b = tl.dot(b_k, b_up, input_precision=PREC)
            b_p = tl.dot(b_v, b_down, input_precision=PREC)
            b_s = tl.sigmoid(b_a)
            b_silu = b_a * b_s
            b_yg = b_p * b_b * (b_s + b_silu * (1 - b_s)) * tl.load(tail_eta + o_e, mask=m_t, other=0.0)[:, None]
            b_yu = b_p * b_silu * tl.load(tail_eta + o_e + 1, mask=m_t, other=0.0)[:, None]
            b_z = b_silu * b_b * tl.load(tail_eta + o_e + 2, mask=m_t, other=0.0)[:, None]
            # P is -V Wdown, so that all three are subtracted: [BD, BT] @ [BT, HS] -> [BD, HS]
            b_kt, b_vt = tl.trans(tl.cast(b_k, wide)), tl.trans(tl.cast(b_v, wide))
            b_gg -= tl.dot(b_kt, tl.cast(b_yg, wide), input_precision=PREC)
            b_gu -= tl.dot(b_kt, tl.cast(b_yu, wide), input_precision=PREC)
            b_gd -= tl.dot(b_vt, tl.cast(b_z, wide), input_precision=PREC)
        _store(g_gate, b_gg, i_x, o_d, o_h, D, HID, False)
        _store(g_up, b_gu, i_x, o_d, o_h, D, HID, False)
        _store(g_down, b_gd, i_x, o_d, o_h, D, HID, True)


@triton.jit
def _clip_factor(square, grad_clip):
    size = tl.sqrt_rn(square)
    return tl.where(size > grad_clip, grad_clip / size, 1.0)


@triton.jit
def _square(p, i_x, o_d, D: tl.constexpr, HID: tl.constexpr, HS: tl.constexpr, DOWN: tl.constexpr):
    """Sum of the squares of a matrix."""
    b_sum = tl.zeros([HS], tl.float32)
    for h0 in range(0, HID, HS):
        b = _load(p, i_x, o_d, h0 + tl.arange(0, HS), D, HID, DOWN)
        b_sum += tl.sum(b * b, 0)
    return tl.sum(b_sum, 0)


@triton.jit
def _commit_matrix(
    w, r, m, g, n, i_x, o_d, mu, grad_clip, s_down, eps,
    D: tl.constexpr, HID: tl.constexpr, HS: tl.constexpr, NORM: tl.constexpr, DOWN: tl.constexpr,
):  # fmt: skip
    """M = mu M - clip(G), W = write point + M, G = 0 for one matrix; r: what reads it; s_down: the scales of Wdown's rows."""
    factor = 1.0
    if grad_clip is not None:
        factor = _clip_factor(_square(g, i_x, o_d, D, HID, HS, DOWN), grad_clip)
    if DOWN and NORM == POST_WRITE:
        # The norms of the new rows of Wdown are known after one pass over them.
        b_sum = tl.zeros([o_d.shape[0]], tl.float32)
        for h0 in range(0, HID, HS):
            o_h = h0 + tl.arange(0, HS)
            b_m = mu * _load(m, i_x, o_d, o_h, D, HID, DOWN) - factor * _load(g, i_x, o_d, o_h, D, HID, DOWN)
            b_u = _load(w, i_x, o_d, o_h, D, HID, DOWN) + b_m
            b_sum += tl.sum(b_u * b_u, 1)
        s_down = row_scale(tl.load(n + i_x * D + o_d, mask=o_d < D, other=0.0), tl.sqrt_rn(b_sum), eps)
    for h0 in range(0, HID, HS):
        o_h = h0 + tl.arange(0, HS)
        b_w = _load(w, i_x, o_d, o_h, D, HID, DOWN)
        if NORM == PRE_WRITE:
            if DOWN:
                b_w *= s_down[:, None]
            else:
                b_w = _unit_scaled(b_w, n, i_x, o_h, eps, HID)
        b_m = mu * _load(m, i_x, o_d, o_h, D, HID, DOWN) - factor * _load(g, i_x, o_d, o_h, D, HID, DOWN)
        b_w += b_m
        if NORM == POST_WRITE:
            if DOWN:
                b_w *= s_down[:, None]
            else:
                b_w = _unit_scaled(b_w, n, i_x, o_h, eps, HID)
        _store(w, b_w, i_x, o_d, o_h, D, HID, DOWN)
        _store(r, tl.cast(b_w, r.dtype.element_ty), i_x, o_d, o_h, D, HID, DOWN)
        _store(m, b_m, i_x, o_d, o_h, D, HID, DOWN)
        _store(g, tl.zeros_like(b_m), i_x, o_d, o_h, D, HID, DOWN)


@triton.jit
def _commit(
    w_gate, w_up, w_down, r_gate, r_up, r_down, m_gate, m_up, m_down, g_gate, g_up, g_down, n_gate, n_up, n_down, i_x, mu, grad_clip, eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The write of a full chunk, whose mean of mu is `mu`."""
    o_d = tl.arange(0, BD)
    s_down = tl.zeros([BD], tl.float32)
    if NORM == PRE_WRITE:
        s_down = _down_scale(w_down, n_down, i_x, o_d, eps, D, HID, HS)
    _commit_matrix(w_gate, r_gate, m_gate, g_gate, n_gate, i_x, o_d, mu, grad_clip, s_down, eps, D, HID, HS, NORM, False)
    _commit_matrix(w_up, r_up, m_up, g_up, n_up, i_x, o_d, mu, grad_clip, s_down, eps, D, HID, HS, NORM, False)
    _commit_matrix(w_down, r_down, m_down, g_down, n_down, i_x, o_d, mu, grad_clip, s_down, eps, D, HID, HS, NORM, True)


# ---- counters


@triton.jit
def _kept(tail, i_n):
    """Tokens in the tail, int32. Clamped: bad values can't lead outside the tensors."""
    return tl.minimum(tl.maximum(tl.cast(tl.load(tail + i_n), tl.int32), 0), TAIL - 1)


@triton.jit
def step_counters(count, tail, active, stride_a, i_n):
    """(whether the sequence takes part, tokens in its open chunk, tokens in its tail), int32."""
    on = i_n >= 0
    if active is not None:
        on = tl.load(active + i_n * stride_a) != 0
    held = tl.maximum(tl.cast(tl.load(count + i_n), tl.int32), 0)
    return on, held, _kept(tail, i_n)


@triton.jit
def _advance(count, position, tail, seen, o_n, N, T, chunk_size):
    """Move the counters of the sequences o_n on by T tokens; `seen` holds them as they were, and tail = -1 where nothing moves."""
    kept = tl.load(seen + 2 * o_n, mask=o_n < N, other=-1)
    held = tl.load(seen + 2 * o_n + 1, mask=o_n < N, other=0)
    m_n = kept >= 0
    # A fold empties the tail at every TAIL tokens, and the commit of a chunk begins anew.
    ahead = held + T
    kept = tl.where(ahead < chunk_size, kept + T, ahead % chunk_size) % TAIL
    tl.store(count + o_n, tl.cast(ahead % chunk_size, tl.int64), mask=m_n)
    tl.store(tail + o_n, tl.cast(kept, tl.int64), mask=m_n)
    tl.store(position + o_n, tl.load(position + o_n, mask=m_n, other=0) + T, mask=m_n)


# ---- one token


@triton.jit
def ttt_mlp_step_token_kernel(
    q, k, v, eta, mu, r_gate, r_up, r_down, mu_sum, tail_k, tail_v, tail_eta, count, tail, active, seen, o, H,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kd, stride_vb, stride_vh, stride_vd, stride_eb, stride_eh, stride_ei,
    stride_mb, stride_mh, stride_a,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (N * H): read with one token and append it to the tail."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_x = tl.cast(tl.program_id(0), tl.int64)
    i_n, i_h = i_x // H, i_x % H
    on, held, kept = step_counters(count, tail, active, stride_a, i_n)
    if i_h == 0:
        tl.store(seen + 2 * i_n, tl.where(on, kept, -1))
        tl.store(seen + 2 * i_n + 1, held)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_q = tl.cast(tl.load(q + i_n * stride_qb + i_h * stride_qh + o_d * stride_qd, mask=m_d, other=0.0), tl.float32)
    b_k = tl.load(k + i_n * stride_kb + i_h * stride_kh + o_d * stride_kd, mask=m_d, other=0.0)
    b_v = tl.load(v + i_n * stride_vb + i_h * stride_vh + o_d * stride_vd, mask=m_d, other=0.0)
    b_o = tl.zeros([BD], tl.float32)
    for h0 in range(0, HID, HS):
        o_h = h0 + tl.arange(0, HS)
        m_w = (o_h < HID)[:, None] & m_d[None, :]
        o_w = i_x * (D * HID) + o_h[:, None] * D + o_d[None, :]
        o_down = i_x * (D * HID) + o_d[:, None] * HID + o_h[None, :]
        # All loads before the first use: they are what this kernel waits for.
        b_gate = tl.load(r_gate + o_w, mask=m_w, other=0.0)
        b_up = tl.load(r_up + o_w, mask=m_w, other=0.0)
        b_down = tl.load(r_down + o_down, mask=m_d[:, None] & (o_h < HID)[None, :], other=0.0)
        b_a = tl.sum(tl.cast(b_gate, tl.float32) * b_q[None, :], 1)
        b_b = tl.sum(tl.cast(b_up, tl.float32) * b_q[None, :], 1)
        b_s = b_a * tl.sigmoid(b_a) * b_b
        b_o += tl.sum(tl.cast(b_down, tl.float32) * b_s[None, :], 1)
    if RESIDUAL:
        b_o += b_q
    tl.store(o + i_x * D + o_d, tl.where(on, b_o, 0.0), mask=m_d)

    # Widths and not booleans: the interpreter of Triton 3.9 broadcasts a scalar comparison wrongly.
    width = tl.where(on, D, 0)
    at = i_x * TAIL + kept
    tl.store(tail_k + at * D + o_d, b_k, mask=o_d < width)
    tl.store(tail_v + at * D + o_d, b_v, mask=o_d < width)
    o_e = tl.arange(0, 4)
    b_e = tl.load(eta + i_n * stride_eb + i_h * stride_eh + o_e * stride_ei, mask=o_e < 3, other=0.0)
    tl.store(tail_eta + at * 3 + o_e, b_e, mask=o_e < tl.where(on, 3, 0))
    b_mu = tl.load(mu_sum + i_x) + tl.load(mu + i_n * stride_mb + i_h * stride_mh)
    tl.store(mu_sum + i_x, b_mu, mask=on)


@triton.jit(do_not_specialize=["N", "chunk_size", "eps", "grad_clip"])
def ttt_mlp_step_fold_kernel(
    w_gate, w_up, w_down, r_gate, r_up, r_down, m_gate, m_up, m_down, g_gate, g_up, g_down, n_gate, n_up, n_down,
    mu_sum, tail_k, tail_v, tail_eta, count, position, tail, seen, N, H, chunk_size, grad_clip, eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, BT: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr,
    PDL: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Any grid: after one more token, fold the tails that are full or end a chunk, commit full chunks, move the counters on.

    Every program looks through all sequences and takes its share of the heads of those that are due: usually none, and it ends.
    LATE: the kernel before has nothing to do with the memory, and the one before that is done: it is waited for at the end.
    """
    if PDL and not LATE:
        tl.extra.cuda.gdc_wait()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    programs = tl.num_programs(0)
    o_b = tl.arange(0, _BATCH)
    for n0 in range(0, N, _BATCH):
        o_n = n0 + o_b
        kept = tl.load(seen + 2 * o_n, mask=o_n < N, other=-1)
        held = tl.load(seen + 2 * o_n + 1, mask=o_n < N, other=0)
        due = tl.cast((kept >= 0) & ((kept + 1 == TAIL) | (held + 1 == chunk_size)), tl.int32)
        items = tl.sum(due, 0) * H
        rank = due
        if items > 0:
            rank *= tl.cumsum(due, 0)
        for item in range(tl.program_id(0), items, programs):
            here = rank == item // H + 1
            i_n = tl.sum(tl.where(here, o_n, 0), 0)
            i_x = tl.cast(i_n, tl.int64) * H + item % H
            _fold(
                w_gate, w_up, w_down, g_gate, g_up, g_down, n_gate, n_up, n_down, tail_k, tail_v, tail_eta, i_x,
                tl.sum(tl.where(here, kept, 0), 0) + 1, eps, D, HID, BD, HS, BT, NORM, PREC,
            )  # fmt: skip
            if tl.sum(tl.where(here, held, 0), 0) + 1 == chunk_size:
                # G as `_fold` left it, written by other threads of this program.
                tl.debug_barrier()
                mean = tl.load(mu_sum + i_x) / chunk_size
                _commit(
                    w_gate, w_up, w_down, r_gate, r_up, r_down, m_gate, m_up, m_down, g_gate, g_up, g_down, n_gate, n_up, n_down,
                    i_x, mean, grad_clip, eps, D, HID, BD, HS, NORM,
                )  # fmt: skip
                tl.debug_barrier()
                tl.store(mu_sum + i_x, 0.0)
        if tl.program_id(0) == 0:
            _advance(count, position, tail, seen, o_n, N, 1, chunk_size)
    if PDL and LATE:
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["eps"])
def ttt_mlp_step_tail_kernel(
    w_gate, w_up, w_down, g_gate, g_up, g_down, n_gate, n_up, n_down, tail_k, tail_v, tail_eta, tail, H, eps,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, BT: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (N * H): fold what the tail holds, whatever that is."""
    i_x = tl.cast(tl.program_id(0), tl.int64)
    kept = _kept(tail, i_x // H)
    if kept > 0:
        _fold(
            w_gate, w_up, w_down, g_gate, g_up, g_down, n_gate, n_up, n_down, tail_k, tail_v, tail_eta, i_x, kept, eps,
            D, HID, BD, HS, BT, NORM, PREC,
        )  # fmt: skip


# ---- more tokens


@triton.jit
def _read(
    q, o, r_gate, r_up, r_down, i_x, i_n, i_h, H, start, stop, T, stride_qb, stride_qt, stride_qh, stride_qd,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, BT: tl.constexpr, RESIDUAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """o of the tokens [start, stop), at the weights as they are."""
    o_d = tl.arange(0, BD)
    dtype = q.dtype.element_ty
    q += i_n * stride_qb + i_h * stride_qh
    for t0 in range(start, stop, BT):
        o_t = t0 + tl.arange(0, BT)
        m_td = (o_t < stop)[:, None] & (o_d < D)[None, :]
        b_q = tl.load(q + tl.cast(o_t, tl.int64)[:, None] * stride_qt + o_d[None, :] * stride_qd, mask=m_td, other=0.0)
        b_o = tl.zeros([BT, BD], tl.float32)
        for h0 in range(0, HID, HS):
            o_h = h0 + tl.arange(0, HS)
            # [BT, BD] @ [BD, HS] -> [BT, HS]
            b_a = tl.dot(b_q, _load(r_gate, i_x, o_d, o_h, D, HID, False), input_precision=PREC)
            b_b = tl.dot(b_q, _load(r_up, i_x, o_d, o_h, D, HID, False), input_precision=PREC)
            b_s = tl.cast(b_a * tl.sigmoid(b_a) * b_b, dtype)
            # [BT, HS] @ [HS, BD] -> [BT, BD]
            b_o = tl.dot(b_s, tl.trans(_load(r_down, i_x, o_d, o_h, D, HID, True)), b_o, input_precision=PREC)
        if RESIDUAL:
            b_o += tl.cast(b_q, tl.float32)
        tl.store(o + ((i_n * T + o_t)[:, None] * H + i_h) * D + o_d[None, :], tl.cast(b_o, dtype), mask=m_td)


@triton.jit
def _append(
    k, v, eta, mu, tail_k, tail_v, tail_eta, i_x, i_n, i_h, start, stop, kept,
    stride_kb, stride_kt, stride_kh, stride_kd, stride_vb, stride_vt, stride_vh, stride_vd, stride_eb, stride_et, stride_eh, stride_ei,
    stride_mb, stride_mt, stride_mh, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Put the tokens [start, stop) behind the `kept` tokens of the tail; the sum of their mu."""
    o_d, o_r = tl.arange(0, BD), tl.arange(0, TAIL)
    o_t = tl.cast(start + o_r, tl.int64)
    m_t = o_t < stop
    m_td = m_t[:, None] & (o_d < D)[None, :]
    k += i_n * stride_kb + i_h * stride_kh
    v += i_n * stride_vb + i_h * stride_vh
    eta += i_n * stride_eb + i_h * stride_eh
    o_tail = i_x * TAIL + kept + o_r
    b_k = tl.load(k + o_t[:, None] * stride_kt + o_d[None, :] * stride_kd, mask=m_td, other=0.0)
    b_v = tl.load(v + o_t[:, None] * stride_vt + o_d[None, :] * stride_vd, mask=m_td, other=0.0)
    tl.store(tail_k + o_tail[:, None] * D + o_d[None, :], b_k, mask=m_td)
    tl.store(tail_v + o_tail[:, None] * D + o_d[None, :], b_v, mask=m_td)
    for i in tl.static_range(3):
        tl.store(tail_eta + o_tail * 3 + i, tl.load(eta + o_t * stride_et + i * stride_ei, mask=m_t, other=0.0), mask=m_t)
    return tl.sum(tl.load(mu + i_n * stride_mb + o_t * stride_mt + i_h * stride_mh, mask=m_t, other=0.0), 0)


@triton.jit(do_not_specialize=["T", "chunk_size", "eps", "grad_clip"])
def ttt_mlp_step_segments_kernel(
    q, k, v, eta, mu, w_gate, w_up, w_down, r_gate, r_up, r_down, m_gate, m_up, m_down, g_gate, g_up, g_down, n_gate, n_up, n_down,
    mu_sum, tail_k, tail_v, tail_eta, count, tail, active, seen, o, H, T, chunk_size, grad_clip, eps,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd, stride_vb, stride_vt, stride_vh, stride_vd,
    stride_eb, stride_et, stride_eh, stride_ei, stride_mb, stride_mt, stride_mh, stride_a,
    D: tl.constexpr, HID: tl.constexpr, BD: tl.constexpr, HS: tl.constexpr, BT: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (N * H): T tokens in segments that end where the tail or the chunk is full."""
    i_x = tl.cast(tl.program_id(0), tl.int64)
    i_n, i_h = i_x // H, i_x % H
    on, held, kept = step_counters(count, tail, active, stride_a, i_n)
    if i_h == 0:
        tl.store(seen + 2 * i_n, tl.where(on, kept, -1))
        tl.store(seen + 2 * i_n + 1, held)
    if on:
        b_mu = tl.load(mu_sum + i_x)
        start = 0
        while start < T:
            stop = start + tl.minimum(T - start, tl.minimum(chunk_size - held, -(kept - TAIL)))
            _read(
                q, o, r_gate, r_up, r_down, i_x, i_n, i_h, H, start, stop, T, stride_qb, stride_qt, stride_qh, stride_qd,
                D, HID, BD, HS, BT, RESIDUAL, PREC,
            )  # fmt: skip
            b_mu += _append(
                k, v, eta, mu, tail_k, tail_v, tail_eta, i_x, i_n, i_h, start, stop, kept,
                stride_kb, stride_kt, stride_kh, stride_kd, stride_vb, stride_vt, stride_vh, stride_vd,
                stride_eb, stride_et, stride_eh, stride_ei, stride_mb, stride_mt, stride_mh, D, BD,
            )  # fmt: skip
            held += stop - start
            kept += stop - start
            start = stop
            # What one part writes the next one reads, by other threads of this program.
            tl.debug_barrier()
            if (kept == TAIL) | (held == chunk_size):
                _fold(
                    w_gate, w_up, w_down, g_gate, g_up, g_down, n_gate, n_up, n_down, tail_k, tail_v, tail_eta, i_x, kept, eps,
                    D, HID, BD, HS, BT, NORM, PREC,
                )  # fmt: skip
                kept = 0
                tl.debug_barrier()
            if held == chunk_size:
                _commit(
                    w_gate, w_up, w_down, r_gate, r_up, r_down, m_gate, m_up, m_down, g_gate, g_up, g_down, n_gate, n_up, n_down,
                    i_x, b_mu / chunk_size, grad_clip, eps, D, HID, BD, HS, NORM,
                )  # fmt: skip
                held = 0
                b_mu = 0.0
                tl.debug_barrier()
        tl.store(mu_sum + i_x, b_mu)
    else:
        o_d, o_t = tl.arange(0, BD), tl.arange(0, TAIL)
        for start in range(0, T, TAIL):
            m_td = (start + o_t < T)[:, None] & (o_d < D)[None, :]
            tl.store(
                o + ((i_n * T + start + o_t)[:, None] * H + i_h) * D + o_d[None, :],
                tl.zeros([TAIL, BD], o.dtype.element_ty),
                mask=m_td,
            )


@triton.jit(do_not_specialize=["N", "T", "chunk_size"])
def ttt_mlp_step_count_kernel(count, position, tail, seen, N, T, chunk_size):
    """Grid (cdiv(N, 128)): move the counters on by T tokens."""
    _advance(count, position, tail, seen, tl.program_id(0) * _BATCH + tl.arange(0, _BATCH), N, T, chunk_size)
