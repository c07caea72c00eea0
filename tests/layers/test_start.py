"""What a memory starts from: taps that see the token before, and projections of a pretrained attention."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from allmem_ops import AllMemConfig, MemoryBranch
from allmem_ops.evaluation.linear import LinearBranch, use_linear_memory
from allmem_ops.hf import convert
from allmem_ops.hf.centre import centre_memory
from allmem_ops.hf.convert import memory_branches
from allmem_ops.layers.start import rotate_rows

D_MODEL, HEADS, HEAD_DIM = 24, 2, 8


def make(**options):
    torch.manual_seed(0)
    return MemoryBranch(D_MODEL, AllMemConfig(heads=HEADS, head_dim=HEAD_DIM, **options), dtype=torch.float64)


@pytest.mark.parametrize("conv_size", [2, 3, 4])
@pytest.mark.parametrize("conv_init", ["uniform", "zero_sum", "token", "token_zero_sum"])
def test_shifted_makes_a_key_the_query_of_the_token_before(conv_init, conv_size):
    branch, x = make(qk_init="shifted", conv_init=conv_init, conv_size=conv_size), torch.randn(1, 12, D_MODEL, dtype=torch.float64)
    q, k, v = branch._read_input(x)[:3]
    torch.testing.assert_close(k[:, 1:], q[:, :-1])
    assert (k - q).abs().mean() > 1e-3 and v.abs().mean() > 1e-3


def test_shifted_needs_two_taps():
    with pytest.raises(ValueError, match="`conv_size` must be at least 2 with qk_init='shifted'"):
        AllMemConfig(qk_init="shifted", conv_size=1)


@pytest.mark.parametrize("qk_init", ["independent", "tied", "shifted"])
def test_token_taps(qk_init):
    """v sees its own token alone; what all tokens share drops out of q and k with "token_zero_sum"."""
    x, common = torch.randn(1, 12, D_MODEL, dtype=torch.float64), 30 * torch.randn(D_MODEL, dtype=torch.float64)
    branch = make(qk_init=qk_init, conv_init="token_zero_sum")
    plain, moved = (branch._read_input(y) for y in (x, x + common))
    for before, after in zip(plain[:2], moved[:2], strict=True):
        torch.testing.assert_close(before[:, 3:], after[:, 3:], atol=1e-9, rtol=0)
    width = HEADS * HEAD_DIM
    v = torch.nn.functional.silu(x @ branch.in_proj.weight[2 * width : 3 * width].T)
    torch.testing.assert_close(plain.v.flatten(2), v)
    branch = make(qk_init=qk_init, conv_init="token")
    assert torch.equal(branch.conv_weight.sum(-1), torch.ones(3 * width, dtype=torch.float64))


def test_the_linear_memory_takes_the_same_taps():
    config = AllMemConfig(heads=HEADS, head_dim=HEAD_DIM, qk_init="shifted", conv_init="token_zero_sum")
    q, k = LinearBranch(D_MODEL, config).conv_weight[: 2 * HEADS * HEAD_DIM].chunk(2)
    assert torch.equal(k, q.roll(-1, 1)) and not q[:, 0].any()


def llama(**changes):
    torch.manual_seed(1)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**shape, **({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8} | changes)))


def converted(model, **options):
    torch.manual_seed(2)
    return memory_branches(convert(model, AllMemConfig(window=16, sinks=2, chunk_size=8, **{"head_dim": 8, **options})))


def direction(x):
    return x / x.norm()


def test_values_come_from_the_attention_of_the_layer():
    model = llama()
    for branch, layer in zip(converted(model, projection_init="values"), model.model.layers, strict=True):
        v, o = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        own = branch.in_proj.weight[32:48]
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            torch.testing.assert_close(direction(own[part]), direction(v[part]))
            summed = o[:, 16 * head : 16 * head + 8] + o[:, 16 * head + 8 : 16 * head + 16]
            torch.testing.assert_close(direction(branch.out_proj.weight[:, part]), direction(summed))
        # q and k are drawn, and everything has the size of a draw
        assert torch.equal(branch.in_proj.weight[:16], branch.in_proj.weight[16:32])
        assert own.norm().item() == pytest.approx(16**0.5) and branch.out_proj.weight.norm().item() == pytest.approx(32**0.5)


def test_attention_lends_q_and_k_too():
    model = llama()
    branch, attention = converted(model, projection_init="attention", qk_init="independent")[1], model.model.layers[1].self_attn
    for head in range(2):
        part, k_part = slice(8 * head, 8 * head + 8), slice(16 + 8 * head, 24 + 8 * head)
        inv_freq = model.model.rotary_emb.inv_freq
        q = rotate_rows(attention.q_proj.weight, inv_freq, 4 * 16).view(2, 2, 8, 32)[head].mean(0)
        torch.testing.assert_close(direction(branch.in_proj.weight[part]), direction(q))
        torch.testing.assert_close(direction(branch.in_proj.weight[k_part]), direction(attention.k_proj.weight[part]))
    tied = converted(llama(), projection_init="attention", qk_init="tied")[1].in_proj.weight
    assert torch.equal(tied[:16], tied[16:32]) and torch.equal(tied[16:32], branch.in_proj.weight[16:32])


def test_random_leaves_the_draw_as_it_is():
    torch.manual_seed(2)
    config = AllMemConfig(window=16, sinks=2, chunk_size=8, head_dim=8)
    alone = [MemoryBranch(32, config, heads=2) for _ in range(2)]
    for branch, own in zip(converted(llama(), projection_init="random"), alone, strict=True):
        assert torch.equal(branch.in_proj.weight, own.in_proj.weight) and torch.equal(branch.out_proj.weight, own.out_proj.weight)


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 4), (2, 16), (4, 4), (1, 8)])
def test_other_shapes_read_a_subspace_of_a_head(heads, head_dim):
    model = llama()
    branches = converted(model, projection_init="attention", heads=heads, head_dim=head_dim)
    for branch, layer in zip(branches, model.model.layers, strict=True):
        weight = branch.in_proj.weight[2 * heads * head_dim : 3 * heads * head_dim].view(heads, head_dim, 32)
        for head in range(heads):
            group = layer.self_attn.v_proj.weight.view(2, 8, 32)[head * 2 // heads]
            left = weight[head] - weight[head] @ torch.linalg.pinv(group) @ group
            assert left.abs().max() < 1e-5 and torch.linalg.matrix_rank(weight[head]) == min(head_dim, 8)
        assert weight.norm().item() == pytest.approx((heads * head_dim) ** 0.5)


def test_rotated_rows_score_as_the_attention_does_at_that_distance():
    model, x = llama(), torch.randn(1, 41, 32)
    attention, rope = model.model.layers[0].self_attn, model.model.rotary_emb
    q, k = (p(x).view(1, 41, -1, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    turned_q, turned_k = apply_rotary_pos_emb(q, k, *rope(x, torch.arange(41)[None]))
    want = (turned_q[0, 3, 16:] * turned_k[0, 1, :25]).sum(-1)
    rows = rotate_rows(attention.q_proj.weight, rope.inv_freq, 16)
    got = ((x[0, 16:] @ rows[24:].T) * k[0, 1, :25]).sum(-1)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("linear", [False, True])
def test_a_centred_memory_does_not_see_what_all_tokens_share(linear):
    torch.manual_seed(0)
    model = convert(llama(), AllMemConfig(window=16, sinks=2, chunk_size=8, head_dim=8, projection_init="attention"))
    if linear:
        use_linear_memory(model)
    ids, seen = torch.randint(0, 64, (2, 40)), {}
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda m, a, k: seen.update(x=k["hidden_states"]), with_kwargs=True)
    assert centre_memory(model, ids) is model and model.training
    mean, branch = seen["x"].mean((0, 1)), model.model.layers[1].self_attn.memory
    rows, others = branch.in_proj.weight.tensor_split([branch.splits[0]])
    assert (rows @ mean).abs().max() < 1e-5 and rows.norm(dim=-1).min() > 0.1 and not others.any()
    assert not branch.in_proj.weight.grad_fn


def test_equal_features_start_from_one_draw():
    branch = make(feature_init="equal", w_init_scale=8.0)
    assert torch.equal(branch.w_up, branch.w_gate) and not torch.equal(make().w_up, make().w_gate)
