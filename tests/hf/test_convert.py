"""Conversion: exact where alpha = 0, the memory alone trains, nothing but the given instance changes."""

import copy
import io

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from allmem_ops.hf import convert, full_attention, memory_mode, memory_parameters, reconfigure, trainable_parameters
from tests.hf.tiny import FAMILY_NAMES, awaken, tiny_config, tiny_model, tokens


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def banded(length: int, window: int, sinks: int) -> torch.Tensor:
    """[1, 1, T, T] additive mask of sliding-window attention with sinks."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    visible = (j <= i) & ((i - j < window) | (j < sinks))
    return torch.zeros(length, length).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("length", [1, 40])
def test_wide_window_equals_original(family, length):
    model, ids = tiny_model(family), tokens(2, length)
    expected = logits(model, ids)
    convert(model, tiny_config(window=64))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(("window", "sinks"), [(12, 3), (5, 0), (1, 2)])
def test_small_window_equals_original_with_banded_mask(family, window, sinks):
    model, ids = tiny_model(family, attn_implementation="eager"), tokens(2, 40)
    expected = logits(model, ids, attention_mask=banded(40, window, sinks).expand(2, -1, -1, -1))
    unwindowed = logits(model, ids)
    convert(model, tiny_config(window=window, sinks=sinks))
    got = logits(model, ids)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert (got - unwindowed).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_memory_speaks_when_alpha_is_not_zero(family):
    model, ids = convert(tiny_model(family), tiny_config()), tokens(1, 30)
    before = logits(model, ids)
    awaken(model)
    assert (logits(model, ids) - before).abs().max() > 1e-2
    with memory_mode(model, "off"):
        assert torch.equal(logits(model, ids), before)
    with memory_mode(model, "no_writes"):
        silent = logits(model, ids)
    assert torch.equal(silent[:, :7], logits(model, ids)[:, :7])  # the first chunk is read before any write
    assert not torch.equal(silent, logits(model, ids))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_base_names_stay_and_only_the_memory_trains(family):
    model = tiny_model(family)
    names = set(dict(model.named_parameters()))
    convert(model, tiny_config())
    assert names < set(dict(model.named_parameters()))
    own = memory_parameters(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(own) == set(dict(model.named_parameters())) - names
    groups = trainable_parameters(model, lr=1e-3)
    assert [g["lr"] for g in groups] == [1e-3, pytest.approx(1e-2)]
    assert sum(len(g["params"]) for g in groups) == len(own)
    model(tokens(1, 20), labels=tokens(1, 20)).loss.backward()
    assert all((p.grad is not None) == (n in own) for n, p in model.named_parameters())
    assert own["model.layers.0.self_attn.memory.alpha"].grad.abs().max() > 0


def test_only_this_instance_changes():
    config = tiny_model().config
    torch.manual_seed(0)
    first, second = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    ids = tokens(1, 40)
    before, implementation = logits(second, ids), config._attn_implementation
    convert(first, tiny_config())
    assert second.config is config
    assert config._attn_implementation == implementation
    assert torch.equal(logits(second, ids), before)
    assert "memory" not in str(second)


def test_default_memory_shape_is_the_models_key_value_heads():
    model = convert(tiny_model(), tiny_config(head_dim=64))
    branch = model.model.layers[0].self_attn.memory
    assert (branch.heads, branch.config.head_dim, branch.config.hidden) == (3, 64, 128)


def test_memory_in_chosen_layers_only():
    model = awaken(convert(tiny_model(), tiny_config(memory_layers=(1,))))
    assert [hasattr(layer.self_attn, "memory") for layer in model.model.layers] == [False, True, False]
    ids = tokens(1, 30)
    with torch.no_grad():
        out = model(ids)
        steps = [model(ids[:, :20])]
        steps.append(model(ids[:, 20:], past_key_values=steps[0].past_key_values))
    torch.testing.assert_close(torch.cat([s.logits for s in steps], 1), out.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_own_window_gives_the_smaller_of_both(family, own):
    ids = tokens(1, 40)
    plain = convert(tiny_model(family), tiny_config(window=6))
    model = convert(tiny_model(family, **own), tiny_config(window=20))
    assert torch.equal(logits(model, ids), logits(plain, ids))
    reconfigure(model, window=4)
    reconfigure(plain, window=4)
    assert torch.equal(logits(model, ids), logits(plain, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_keeps_memory_in_fp32(dtype):
    exact, ids = awaken(convert(tiny_model(), tiny_config())), tokens(2, 40)
    model = convert(tiny_model().to(dtype), tiny_config())
    for name, p in memory_parameters(model).items():
        assert p.dtype == torch.float32
        p.data.copy_(memory_parameters(exact)[name])
    got, expected = logits(model, ids), logits(exact, ids)
    assert got.dtype == dtype
    with full_attention(exact), full_attention(model):
        allowed = (logits(model, ids).float() - logits(exact, ids)).abs().mean()  # what the base loses at this precision
    assert (got.float() - expected).abs().mean() <= 2 * allowed + 1e-3


def test_full_attention_is_the_original_and_comes_back_after_an_error():
    model, ids = tiny_model(), tokens(1, 40)
    original = logits(model, ids)
    convert(model, tiny_config())
    awaken(model)
    student = logits(model, ids)
    with full_attention(model):
        assert torch.equal(logits(model, ids), original)
        assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 42)
    with pytest.raises(ValueError, match="exactly one of input_ids"), full_attention(model):
        model()
    assert torch.equal(logits(model, ids), student)
    assert not torch.equal(student, original)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: torch.load(_saved(m), weights_only=False)], ids=["deepcopy", "pickle"])
def test_a_copied_model_is_independent(live, duplicate):
    ids = tokens(1, 30)
    other = duplicate(live)
    expected = logits(live, ids)
    assert torch.equal(logits(other, ids), expected)
    reconfigure(other, window=2)
    assert not torch.equal(logits(other, ids), expected)
    assert torch.equal(logits(live, ids), expected)


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_gradient_checkpointing_gives_the_same_gradients(live):
    ids = tokens(2, 30)
    live.train()
    live(ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in memory_parameters(live).items()}
    live.zero_grad()
    live.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = live(ids, labels=ids).loss
    reconfigure(live, window=3)  # drawn anew before the backward pass: the checkpointed layers keep their own
    reconfigure(live, window=12)
    loss.backward()
    for name, p in memory_parameters(live).items():
        torch.testing.assert_close(p.grad, expected[name], msg=name)
        assert expected[name].abs().max() > 0, name


def test_every_memory_parameter_learns(live):
    ids = tokens(1, 40)
    live(ids, labels=ids).loss.backward()
    dead = [n for n, p in memory_parameters(live).items() if not p.grad.abs().max() > 0]
    assert dead == []


def test_unknown_family_names_the_known_ones():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))
    with pytest.raises(ValueError, match=r"`model` must be of a supported family: llama, mistral, qwen2, qwen3; got 'gpt2'.*FAMILIES"):
        convert(model, tiny_config())


def test_bad_input_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="attention_dropout 0"):
        convert(tiny_model(attention_dropout=0.1), tiny_config())
    with pytest.raises(ValueError, match="must be a transformers causal LM"):
        convert(torch.nn.Linear(2, 2), tiny_config())
    with pytest.raises(ValueError, match="`config` must be an AllMemConfig; got dict"):
        convert(tiny_model(), {"window": 3})
    with pytest.raises(ValueError, match=r"`config.memory_layers` must lie in \[0, 3\)"):
        convert(tiny_model(), tiny_config(memory_layers=(3,)))
    with pytest.raises(ValueError, match="must be 'absolute' with RoPE of type 'dynamic'"):
        convert(tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), tiny_config())
    model = convert(tiny_model(), tiny_config())
    with pytest.raises(ValueError, match="must not be converted yet"):
        convert(model, tiny_config())
    with pytest.raises(ValueError, match="`output_attentions` must be False"):
        model(tokens(1, 4), output_attentions=True)
    with pytest.raises(ValueError, match="`window` must be at least 1; got 0"):
        reconfigure(model, window=0)
    with pytest.raises(ValueError, match="`mode` must be one of 'on', 'no_writes', 'off'; got 'of'"), memory_mode(model, "of"):
        pass
    for function in (trainable_parameters, memory_parameters, reconfigure):
        with pytest.raises(ValueError, match="`model` must be a converted model"):
            function(tiny_model())


def test_the_attention_name_alone_is_refused():
    convert(tiny_model(), tiny_config())  # registers the name
    config = AutoConfig.for_model("llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    config._attn_implementation = "allmem_swa"
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="works only in a model converted by"):
        model(torch.ones(1, 4, dtype=torch.long))
