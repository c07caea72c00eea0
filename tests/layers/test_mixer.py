"""`TokenMixer`: against attention and memory written out by hand; split, packed and stepwise."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmem_ops import AllMemConfig, TokenMixer
from allmem_ops.layers.mixer import TokenMixerState

D_MODEL, HEADS, HEADS_KV, HEAD_DIM = 24, 4, 2, 8
SHAPE = {"heads": HEADS, "heads_kv": HEADS_KV, "head_dim": HEAD_DIM}


def make(*, alive=True, trained_length=None, qk_norm=False, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = AllMemConfig(**{"window": 6, "sinks": 2, "chunk_size": 5, "eta_init": 0.05, "head_dim": 8, **options})
    mixer = TokenMixer(D_MODEL, **SHAPE, config=config, trained_length=trained_length, qk_norm=qk_norm, dtype=dtype)
    if alive:
        with torch.no_grad():
            for p in mixer.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return mixer


def tokens(length, batch=1, seed=0):
    return torch.randn(batch, length, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(x, position):
    """RoPE as a complex product: channel pairs (i, i + D/2)."""
    frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    z = torch.complex(x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]) * torch.polar(torch.ones_like(frequencies), position * frequencies)
    return torch.cat([z.real, z.imag], -1)


def attention_by_hand(mixer, x, trained_length=None):
    """Token by token, head by head, from the visibility rule."""
    x = mixer.norm(x)
    q, k, v = mixer.qkv_proj(x)[0].split([HEADS * HEAD_DIM, HEADS_KV * HEAD_DIM, HEADS_KV * HEAD_DIM], -1)
    q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)) for y in (q, k, v))
    if mixer.q_norm is not None:
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    rows = []
    for i in range(x.shape[1]):
        heads = []
        for head in range(HEADS):
            kv, scores, values = head // (HEADS // HEADS_KV), [], []
            for j in range(i + 1):
                far = i - j >= mixer.config.window
                if far and j >= mixer.config.sinks:
                    continue
                at = min(i, trained_length - 1) if far and trained_length is not None else i
                scores.append(turned(q[i, head], at) @ turned(k[j, kv], j) * HEAD_DIM**-0.5)
                values.append(v[j, kv])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        rows.append(torch.cat(heads))
    return mixer.o_proj(torch.stack(rows)[None])


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("trained_length", [None, 9])
def test_a_new_mixer_is_windowed_attention_with_sinks(qk_norm, trained_length):
    mixer, x = make(alive=False, qk_norm=qk_norm, trained_length=trained_length), tokens(14)
    want = attention_by_hand(mixer, x, trained_length)
    torch.testing.assert_close(mixer(x), want, atol=1e-9, rtol=0)
    assert want.abs().max() > 0.1


def test_clamping_moves_far_sinks_past_the_trained_length_and_nothing_else():
    x = tokens(14)
    plain, clamped = make(alive=False)(x), make(alive=False, trained_length=9)(x)
    same = (plain - clamped).abs().amax((0, 2)) < 1e-9
    assert same[:9].all() and not same[9:].any()
    absolute = make(alive=False, trained_length=9, sink_positions="absolute")(x)
    assert torch.equal(plain, absolute)


def test_the_memory_is_added_with_alpha():
    mixer, x = make(), tokens(17, 2)
    branch = mixer.memory
    hidden = mixer.norm(x)
    attention = torch.cat([attention_by_hand(mixer, row[None]) for row in x])
    torch.testing.assert_close(mixer(x), attention + branch.alpha * branch(hidden), atol=1e-9, rtol=0)


@given(cuts=st.lists(st.integers(1, 18), max_size=4, unique=True), trained_length=st.sampled_from([None, 7]))
def test_split_anywhere_equals_one_pass(cuts, trained_length):
    mixer, x = make(trained_length=trained_length), tokens(19, 2)
    want, state = mixer(x), mixer.initial_state(2)
    size = state.nbytes
    edges = [0, *sorted(cuts), 19]
    parts = [mixer(x[:, a:b], state=state) for a, b in pairwise(edges)]
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-9, rtol=0)
    assert state.nbytes == size and state.window.positions.tolist() == [19, 19]


def test_steps_equal_one_pass_at_different_positions():
    mixer, x = make(trained_length=7), tokens(15, 3)
    lengths, outputs = [0, 4, 9], []
    state = mixer.initial_state(3)
    with torch.no_grad():
        want = mixer(x)
        for row, length in enumerate(lengths):
            one = mixer.initial_state(1)
            if length:
                mixer(x[row : row + 1, :length], state=one)
            state.copy_([row], one, [0])
        state.memory.started = True
        for step in range(6):
            token = torch.stack([x[row, length + step] for row, length in enumerate(lengths)])[:, None]
            outputs.append(mixer(token, state=state))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(torch.cat(outputs, 1)[row], want[row, length : length + 6], atol=1e-9, rtol=0)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(sum))
def test_packed_equals_separate(lengths):
    mixer, x = make(trained_length=7), tokens(sum(lengths))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    want = torch.cat([mixer(x[:, a:b]) for a, b in pairwise(ends) if b > a], 1)
    torch.testing.assert_close(mixer(x, cu_seqlens=ends), want, atol=1e-9, rtol=0)


@torch.no_grad()
def test_inactive_rows_stay_bit_for_bit():
    mixer, x = make(), tokens(6, 2)
    state = mixer.initial_state(2)
    mixer(x[:, :5], state=state)
    before = state.clone()
    y = mixer(x[:, 5:], state=state, active=torch.tensor([True, False]))
    assert torch.equal(y[1], torch.zeros_like(y[1])) and y[0].abs().max() > 0
    for kept, now in zip(_tensors(before), _tensors(state), strict=True):
        assert torch.equal(kept[1], now[1])
    assert state.window.positions.tolist() == [6, 5]


def _tensors(state):
    return [*state.window.tensors().values(), *state.memory.memory.tensors().values(), *state.memory.conv.tensors().values()]


@torch.no_grad()
def test_state_is_selected_reset_and_restored():
    mixer, x = make(), tokens(12, 2)
    state = mixer.initial_state(2)
    mixer(x[:, :7], state=state)
    fork = state.index_select([1, 1])
    saved = TokenMixerState.from_state_dict(state.clone().state_dict())
    want = mixer(x[:, 7:], state=state)
    got = mixer(x[1:, 7:].expand(2, -1, -1), state=fork)
    torch.testing.assert_close(got, want[1:].expand_as(got), atol=1e-12, rtol=0)
    assert torch.equal(mixer(x[:, 7:], state=saved), want)
    state.reset()
    torch.testing.assert_close(mixer(x, state=state), mixer(x), atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="`state` must have the keys window, memory"):
        TokenMixerState.from_state_dict({"window": {}})
    with pytest.raises(ValueError, match="`other` must be a TokenMixerState"):
        state.copy_([0], state.memory, [0])


def test_gradients_reach_every_parameter():
    mixer, x = make(qk_norm=True), tokens(13)
    mixer(x).square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "`heads` must be a multiple of heads_kv=2; got 3"),
        ({"head_dim": 7}, "`head_dim` must be even; got 7"),
        ({"trained_length": 0}, "`trained_length` must be"),
        ({"config": None}, "`config` must be an AllMemConfig; got NoneType"),
        ({"qk_norm": 1}, "`qk_norm` must be"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        TokenMixer(D_MODEL, **{**SHAPE, "config": AllMemConfig(), **change})


def test_bad_calls():
    mixer, x = make(), tokens(4, 2)
    with pytest.raises(ValueError, match=r"`x` must have shape \[B, T, d_model\] with d_model=24"):
        mixer(x[..., :5])
    with pytest.raises(ValueError, match="`state` must hold 2 sequences; got 1"):
        mixer(x, state=mixer.initial_state(1))
    with pytest.raises(ValueError, match="`cu_seqlens` must be None with a `state`"):
        mixer(x[:1], state=mixer.initial_state(1), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="`active` needs a `state` and one token; got 4 tokens"):
        mixer(x, state=mixer.initial_state(2), active=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="`active` needs a `state` and one token; got no state"):
        mixer(x, active=torch.tensor([True, False]))
