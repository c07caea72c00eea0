"""`AllMemConfig`: typed, validated, and the same after a trip through JSON."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allmem_ops import AllMemConfig

configs = st.builds(
    AllMemConfig,
    window=st.integers(1, 9000),
    sinks=st.integers(0, 300),
    chunk_size=st.integers(1, 5000),
    heads=st.none() | st.integers(1, 16),
    head_dim=st.integers(1, 256),
    hidden_dim=st.none() | st.integers(1, 512),
    memory_layers=st.none() | st.lists(st.integers(0, 40), unique=True).map(tuple),
    sink_positions=st.sampled_from(["clamped", "absolute"]),
    norm=st.sampled_from(["pre_write", "post_write", "none"]),
    residual=st.booleans(),
    grad_clip=st.none() | st.floats(1e-3, 1e3),
    eta_init=st.floats(1e-4, 1.0),
    mu_init=st.floats(0.01, 0.99),
    gate=st.sampled_from(["head", "channel", "none"]),
    conv_size=st.integers(1, 4),
    conv_init=st.sampled_from(["uniform", "zero_sum", "token", "token_zero_sum"]),
    qk_norm=st.sampled_from(["rms+l2", "rms", "l2", "none"]),
    qk_activation=st.sampled_from(["silu", "none"]),
    qk_init=st.sampled_from(["independent", "tied"]),
    feature_init=st.sampled_from(["independent", "equal"]),
    projection_init=st.sampled_from(["random", "values", "attention"]),
    impl=st.sampled_from(["auto", "chunk", "reference", "triton"]),
)


@given(configs)
def test_json_round_trip(config):
    assert AllMemConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("window", 0, "`window` must be at least 1; got 0"),
        ("window", 8.0, "`window` must be an int of at least 1; got float 8.0"),
        ("window", True, "`window` must be an int of at least 1; got bool True"),
        ("sinks", -1, "`sinks` must be at least 0; got -1"),
        ("chunk_size", 0, "`chunk_size` must be at least 1; got 0"),
        ("heads", 0, "`heads` must be at least 1; got 0"),
        ("head_dim", "64", "`head_dim` must be an int of at least 1; got str '64'"),
        ("hidden_dim", 0, "`hidden_dim` must be at least 1; got 0"),
        ("memory_layers", 3, "`memory_layers` must be None or a sequence of layer indices; got 3"),
        ("memory_layers", (1, 1), "`memory_layers` must name each layer once"),
        ("memory_layers", (-1,), "`memory_layers` must be at least 0; got -1"),
        ("sink_positions", "free", "`sink_positions` must be one of 'clamped', 'absolute'; got 'free'"),
        ("norm", "pre", "`norm` must be one of 'pre_write', 'post_write', 'none'; got 'pre'"),
        ("residual", 1, "`residual` must be a bool; got int 1"),
        ("grad_clip", 0.0, "`grad_clip` must be greater than 0.0; got 0.0"),
        ("weight_norm_eps", -1e-5, "`weight_norm_eps` must be at least 0.0"),
        ("eta_init", 0.0, "`eta_init` must be greater than 0.0; got 0.0"),
        ("eta_init", float("nan"), "`eta_init` must be greater than 0.0; got nan"),
        ("eta_init", float("inf"), "`eta_init` must be finite; got inf"),
        ("mu_init", 1.0, "`mu_init` must be below 1; got 1.0"),
        ("gate_init", 0.0, "`gate_init` must be greater than 0.0"),
        ("gate", "heads", "`gate` must be one of"),
        ("conv_size", 5, "`conv_size` must be from 1 to 4; got 5"),
        ("qk_norm", "rms,l2", "`qk_norm` must be one of"),
        ("conv_init", "zero", "`conv_init` must be one of 'uniform', 'zero_sum', 'token', 'token_zero_sum'; got 'zero'"),
        ("qk_activation", "relu", "`qk_activation` must be one of 'silu', 'none'; got 'relu'"),
        ("qk_init", True, "`qk_init` must be"),
        ("feature_init", "same", "`feature_init` must be one of 'independent', 'equal'; got 'same'"),
        ("projection_init", "o", "`projection_init` must be one of 'random', 'values', 'attention'; got 'o'"),
        ("readout_norm", None, "`readout_norm` must be a bool; got NoneType None"),
        ("norm_eps", "x", "`norm_eps` must be a number"),
        ("w_init_scale", 0.0, "`w_init_scale` must be greater than 0.0"),
        ("alpha_lr_scale", -1.0, "`alpha_lr_scale` must be greater than 0.0"),
        ("impl", "cuda", "`impl` must be one of 'reference', 'chunk', 'triton', 'auto'; got 'cuda'"),
    ],
)
def test_a_bad_field_is_named(field, value, message):
    with pytest.raises(ValueError) as caught:
        AllMemConfig(**{field: value})
    assert str(caught.value).startswith(message)


def test_every_field_is_documented():
    for field in dataclasses.fields(AllMemConfig):
        assert f"\n        {field.name}: " in AllMemConfig.__doc__, field.name


def test_unknown_fields_and_changes():
    with pytest.raises(TypeError, match="windows"):
        AllMemConfig(windows=3)
    with pytest.raises(ValueError, match=r"`values` must hold fields of AllMemConfig .* got \['windows'\]"):
        AllMemConfig.from_dict({"windows": 3})
    config = AllMemConfig()
    assert config.replace(window=7).window == 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3
    with pytest.raises(ValueError, match="`window` must be at least 1"):
        config.replace(window=0)
    assert config.hidden == 128
    assert config.replace(hidden_dim=96).hidden == 96


def test_the_specs_defaults():
    """spec.md's numbers, each a field."""
    config = AllMemConfig()
    assert (config.head_dim, config.hidden, config.conv_size) == (64, 128, 4)
    assert (config.norm, config.residual, config.grad_clip, config.weight_norm_eps) == ("pre_write", True, None, 1e-5)
    assert (config.sink_positions, config.qk_norm, config.gate, config.readout_norm) == ("clamped", "rms+l2", "head", True)
    assert (config.conv_init, config.qk_activation, config.qk_init) == ("zero_sum", "silu", "tied")
    assert (config.norm_eps, config.l2_eps, config.w_init_scale, config.alpha_lr_scale) == (1e-6, 1e-6, 1.0, 10.0)
