"""`MemoryBranch`: the path around the memory, written out once more by hand, and its state."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from allmem_ops import AllMemConfig, MemoryBranch, ttt_mlp
from allmem_ops.layers.memory import MemoryBranchState

D_MODEL, HEADS, HEAD_DIM = 24, 2, 8


def make(*, alive=True, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = AllMemConfig(**{"heads": HEADS, "head_dim": HEAD_DIM, "chunk_size": 5, "eta_init": 0.05, **options})
    branch = MemoryBranch(D_MODEL, config, dtype=dtype)
    if alive:
        with torch.no_grad():
            for p in branch.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return branch


def data(length, batch=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, length, D_MODEL, generator=generator, dtype=dtype) for _ in range(2))


def by_hand(branch, x, attn):
    """spec.md, "Path around the memory", for the default options."""
    config, width = branch.config, HEADS * HEAD_DIM
    rows = branch.in_proj.weight.split([width, width, width, 3 * HEADS, HEADS, HEADS])
    biases = branch.head_bias.split([3 * HEADS, HEADS, HEADS])
    conv = branch.conv_weight.split(width)

    def path(i):
        y = F.pad((x @ rows[i].T).transpose(1, 2), (3, 0))
        return F.silu(F.conv1d(y, conv[i][:, None], groups=width).transpose(1, 2)).unflatten(-1, (HEADS, HEAD_DIM))

    def normalised(y, weight):
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    q, k, v = normalised(path(0), branch.q_norm), normalised(path(1), branch.k_norm), path(2)
    eta = F.softplus(x @ rows[3].T + biases[0]).unflatten(-1, (HEADS, 3))
    mu = torch.sigmoid(x @ rows[4].T + biases[1])
    gate = torch.sigmoid(x @ rows[5].T + biases[2])
    r = ttt_mlp(q, k, v, branch.w_gate, branch.w_up, branch.w_down, eta, mu, chunk_size=config.chunk_size, impl="reference").o
    r = r / (r.square().mean(-1, keepdim=True) + 1e-6).sqrt() * branch.readout_norm * gate[..., None]
    return attn + branch.alpha * (r.flatten(2) @ branch.out_proj.weight.T)


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("length", [1, 5, 17])
def test_equals_the_path_written_by_hand(impl, length):
    branch, (x, attn) = make(impl=impl), data(length, 2)
    got, expected = branch(x, attn), by_hand(branch, x, attn)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)
    assert (got - attn).abs().max() > 1e-2
    upstream = torch.randn_like(got)
    names, parameters = zip(*branch.named_parameters(), strict=True)
    for name, *pair in zip(names, *(torch.autograd.grad(y, parameters, upstream, allow_unused=True) for y in (got, expected)), strict=True):
        grad, want = (torch.zeros(()) if g is None or not g.any() else g for g in pair)  # no write, no gradient of what is written
        torch.testing.assert_close(grad, want, atol=1e-10, rtol=1e-8, check_dtype=False, msg=name)


def test_a_new_branch_returns_attention_bit_for_bit_and_alpha_learns():
    branch, (x, attn) = make(alive=False, dtype=torch.float32), data(17, dtype=torch.float32)
    y = branch(x, attn)
    assert torch.equal(y, attn)
    y.sum().backward()
    assert branch.alpha.grad.abs().min() > 0


def test_start_values():
    branch = make(alive=False, eta_init=0.03, mu_init=0.2, gate_init=0.9)
    assert branch.in_proj.weight[3 * HEADS * HEAD_DIM :].abs().max() == 0
    eta, mu, gate = branch.head_bias.split([3 * HEADS, HEADS, HEADS])
    torch.testing.assert_close(F.softplus(eta), torch.full_like(eta, 0.03))
    torch.testing.assert_close(mu.sigmoid(), torch.full_like(mu, 0.2))
    torch.testing.assert_close(gate.sigmoid(), torch.full_like(gate, 0.9))


def test_tied_q_and_k_start_equal_and_part_in_training():
    branch, (x, _) = make(alive=False, qk_init="tied"), data(17)
    width = HEADS * HEAD_DIM
    q, k, v, *_ = branch._read_input(x)
    assert torch.equal(q, k) and not torch.equal(k, v)
    branch(x).square().sum().backward()
    grads = branch.in_proj.weight.grad[: 2 * width].split(width)
    assert (grads[0] - grads[1]).abs().max() > 1e-6
    q, k, _ = branch.in_proj.weight[: 3 * width].split(width)
    assert not torch.equal(*make(alive=False, qk_init="independent").in_proj.weight[: 2 * width].split(width)) and torch.equal(q, k)


def test_zero_sum_taps_drop_what_all_tokens_share():
    x, common = next(data(40)), 30 * torch.randn(D_MODEL, dtype=torch.float64)
    for conv_size in (2, 3, 4):
        branch = make(alive=False, conv_init="zero_sum", conv_size=conv_size)
        plain, shifted = (branch._read_input(y).v[:, conv_size - 1 :] for y in (x, x + common))
        torch.testing.assert_close(plain, shifted, atol=1e-9, rtol=0)
        assert plain.square().mean() > 1e-3
    assert make(alive=False, conv_init="zero_sum", conv_size=1).conv_weight.abs().min() > 0
    uniform = make(alive=False, conv_init="uniform")
    plain, shifted = (uniform._read_input(y).v[:, 3:] for y in (x, x + common))
    assert (plain - shifted).abs().mean() > 1


def test_qk_activation_none_leaves_q_and_k_linear():
    branch, (x, _) = make(qk_activation="none", qk_norm="none", conv_size=1), data(5)
    projected = (x @ branch.in_proj.weight.T)[..., : 3 * HEADS * HEAD_DIM] * branch.conv_weight[:, 0]
    plain = projected.unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)
    q, k, v, *_ = branch._read_input(x)
    for got, want in zip((q, k, v), (plain[0], plain[1], F.silu(plain[2])), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("length", [HEADS * HEAD_DIM + 1, 3])  # one folds alpha into the output projection, one does not pay
@pytest.mark.parametrize("with_state", [False, True])
def test_alpha_folded_into_the_output_projection_gives_the_same(length, with_state):
    branch, (x, attn) = make(), data(length, 2)
    expected = branch(x, attn)
    state = branch.initial_state(2, torch.float64) if with_state else None
    mine = attn.clone()
    with torch.no_grad():
        y = branch(x, mine, state=state, overwrite_attn=True)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    folded = 2 * length > branch.out_proj.in_features
    assert (y.data_ptr() == mine.data_ptr()) == folded and torch.equal(mine, y if folded else attn)
    kept = attn.clone()
    torch.testing.assert_close(branch(x, kept, overwrite_attn=True), expected)  # with gradients nothing is overwritten
    assert torch.equal(kept, attn)


def test_alpha_folded_gives_inactive_rows_attention():
    branch, (x, attn) = make(), data(40, 2)
    state = branch.initial_state(2, torch.float64)
    with torch.no_grad():
        y = branch(x, attn.clone(), state=state, active=torch.tensor([True, False]), overwrite_attn=True)
    assert torch.equal(y[1], attn[1]) and (y[0] - attn[0]).abs().max() > 1e-3


def test_parameter_count_of_the_default_on_smollm2():
    """15.8 M over 30 layers of width 576 with 3 heads of 64."""
    branch = MemoryBranch(576, AllMemConfig(heads=3), device="meta")
    assert 30 * sum(p.numel() for p in branch.parameters()) == 15_834_690


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_split_equals_one_pass(lengths, grad):
    branch, (x, attn) = make(), data(sum(lengths), 2)
    state = branch.initial_state(2, torch.float64)
    size = state.nbytes
    with torch.set_grad_enabled(grad):
        parts = [branch(a, b, state=state) for a, b in zip(x.split(lengths, 1), attn.split(lengths, 1), strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), branch(x, attn), atol=1e-11, rtol=1e-8)
    assert state.nbytes == size


OPTIONS = [
    {"gate": "channel"},
    {"gate": "none"},
    {"qk_norm": "rms"},
    {"qk_norm": "l2"},
    {"qk_norm": "none"},
    {"conv_size": 1},
    {"conv_size": 2},
    {"readout_norm": False},
    {"norm": "post_write"},
    {"norm": "none"},
    {"residual": False},
    {"grad_clip": 0.1},
    {"hidden_dim": 24},
    {"gate": "none", "readout_norm": False},
    {"conv_init": "uniform"},
    {"qk_activation": "none"},
    {"qk_init": "independent"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_changes_the_output_and_keeps_split_equal_to_whole(options):
    branch, (x, attn) = make(**options), data(13)
    whole = branch(x, attn)
    assert (whole - make()(x, attn)).abs().max() > 1e-6
    state = branch.initial_state(1, torch.float64)
    with torch.no_grad():
        parts = [branch(a, b, state=state) for a, b in zip(x.split([6, 1, 6], 1), attn.split([6, 1, 6], 1), strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-11, rtol=1e-8)


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_equals_separate(with_state):
    branch, lengths = make(), [7, 0, 1, 12]
    x, attn = data(sum(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    state = branch.initial_state(4, torch.float64) if with_state else None
    got = branch(x, attn, state=state, cu_seqlens=offsets)
    pieces = list(zip(x.split(lengths, 1), attn.split(lengths, 1), strict=True))
    expected = torch.cat([branch(a, b) for a, b in pieces if a.shape[1]], 1)
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-8)
    if with_state:  # every sequence goes on by itself
        more, attn_more = data(4, 4, seed=1)
        with torch.no_grad():
            following = branch(more, attn_more, state=state)
        for n, (a, b) in enumerate(pieces):
            whole = branch(torch.cat([a, more[n : n + 1]], 1), torch.cat([b, attn_more[n : n + 1]], 1))
            torch.testing.assert_close(following[n], whole[0, -4:], atol=1e-11, rtol=1e-8)


def test_inactive_rows_keep_state_and_output():
    branch, (x, attn) = make(), data(3, 2)
    state = branch.initial_state(2, torch.float64)
    with torch.no_grad():
        branch(*data(8, 2, seed=1), state=state)
        before = state.clone()
        y = branch(x, attn, state=state, active=torch.tensor([True, False]))
    assert torch.equal(y[1], attn[1])
    assert (y[0] - attn[0]).abs().max() > 1e-3
    for name, tensor in state.memory.tensors().items():
        assert torch.equal(tensor[1], before.memory.tensors()[name][1]), name
    assert torch.equal(state.conv.inputs[1], before.conv.inputs[1])
    assert not torch.equal(state.conv.inputs[0], before.conv.inputs[0])


def test_a_fresh_state_does_not_hide_the_initial_weights_gradient():
    branch, (x, attn) = make(), data(13)
    names = [n for n, _ in branch.named_parameters()]
    expected = torch.autograd.grad(branch(x, attn).sum(), list(branch.parameters()))
    got = torch.autograd.grad(branch(x, attn, state=branch.initial_state(1, torch.float64)).sum(), list(branch.parameters()))
    for name, a, b in zip(names, got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_writes_off_reads_the_initial_memory_only():
    branch, (x, attn) = make(), data(13)
    on = branch(x, attn)
    branch.writes = False
    off = branch(x, attn)
    assert torch.equal(off[:, :5], on[:, :5])
    assert (off - on)[:, 5:].abs().max() > 1e-4
    other, _ = data(13, seed=2)
    x2 = torch.cat([other[:, :5], x[:, 5:]], 1)  # what was read long ago leaves no trace (the convolution looks 3 back)
    torch.testing.assert_close(branch(x2, attn)[:, 8:], off[:, 8:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("packed", [None, [0, 6, 17]])
def test_recompute_gives_the_same_gradients_and_keeps_only_the_inputs(packed):
    branch, (x, attn) = make(), data(17)
    leaves = [x.requires_grad_(), attn.requires_grad_(), *branch.parameters()]
    cu_seqlens = None if packed is None else torch.tensor(packed)
    found, kept = [], []
    for branch.recompute in (False, True):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = branch(x, attn, cu_seqlens=cu_seqlens)
        own = [t for t in saved if not any(t is leaf for leaf in leaves)]
        kept.append(sum(t.nbytes for t in own))
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert kept[1] <= (0 if packed is None else cu_seqlens.nbytes) < kept[0]


def test_recompute_with_a_state_keeps_everything_and_gives_the_same():
    branch, (x, attn) = make(), data(17)
    found = []
    for branch.recompute in (False, True):
        y = branch(x, attn, state=branch.initial_state(1, torch.float64))
        found.append([y, *torch.autograd.grad(y.square().sum(), list(branch.parameters()))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_half_precision_activations_with_fp32_parameters():
    branch = make(dtype=torch.float32)
    x, attn = data(30, 2, dtype=torch.float32)
    exact = by_hand(branch.double(), x.double(), attn.double()) - attn.double()
    branch.float()
    y = branch(x.bfloat16(), torch.zeros_like(attn).bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("gate", ["head", "none", "channel"])
def test_half_precision_gradients(gate):
    """Also where the projection's 58 or 54 columns are filled up to whole 16 bytes."""
    branch = make(dtype=torch.float32, gate=gate)
    x, attn = data(30, 2, dtype=torch.float32)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        module = branch.double() if dtype == torch.float64 else branch.float()
        y = module(x.to(dtype), attn.to(dtype))
        found.append([g.double() for g in torch.autograd.grad(y.double().square().sum(), list(module.parameters()))])
    for (name, p), exact, got in zip(branch.named_parameters(), *found, strict=True):
        assert got.shape == p.shape
        assert (got - exact).norm() <= 0.05 * exact.norm(), name


def test_state_round_trip_and_rows():
    branch, state = make(), make().initial_state(3, torch.float64)
    with torch.no_grad():
        branch(*data(8, 3, seed=1), state=state)
    again = MemoryBranchState.from_state_dict(state.state_dict())
    picked = again.index_select([2, 0])
    x, attn = data(4, 3)
    with torch.no_grad():
        expected = branch(x, attn, state=state)
        got = branch(x[[2, 0]], attn[[2, 0]], state=picked)
    torch.testing.assert_close(got, expected[[2, 0]])
    again.reset([1])
    fresh = branch.initial_state(3, torch.float64)
    assert torch.equal(again.memory.w_gate[1], fresh.memory.w_gate[1])
    again.reset()
    assert not again.started
    with pytest.raises(ValueError, match="`state` must have the keys memory, conv, started; got"):
        MemoryBranchState.from_state_dict({"memory": {}})


def test_errors_name_the_argument():
    branch, (x, attn) = make(), data(4, 2)
    state = branch.initial_state(2, torch.float64)
    with pytest.raises(ValueError, match=r"`x` must have shape \[B, T, d_model\] with d_model=24; got \[2, 4, 23\]"):
        branch(x[..., :-1])
    with pytest.raises(ValueError, match=r"`attn` must have shape \[B, T, d_model\] with T=4; got \[2, 3, 24\]"):
        branch(x, attn[:, :3])
    with pytest.raises(ValueError, match="`state` must hold 1 sequences; got 2"):
        branch(x[:1], state=state)
    with pytest.raises(ValueError, match="`active` needs a `state`"):
        branch(x, active=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="`active` needs gradients to be disabled"):
        branch(x, state=state, active=torch.ones(2, dtype=torch.bool))
    with torch.no_grad(), pytest.raises(ValueError, match="`state` must have been made with chunk_size=5; got 4"):
        branch(x, state=make(chunk_size=4).initial_state(2, torch.float64))
    with pytest.raises(ValueError, match="`heads` must be given"):
        MemoryBranch(8, AllMemConfig())
    with pytest.raises(ValueError, match="`config` must be an AllMemConfig"):
        MemoryBranch(8, {"heads": 2})
    with pytest.raises(TypeError):
        branch(x, attn, window=3)
