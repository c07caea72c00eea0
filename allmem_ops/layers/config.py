"""`AllMemConfig`: every choice that the paper leaves open, as a typed and validated field."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from allmem_ops._impl import IMPLS
from allmem_ops._validation import check_bool, check_choice, check_float, check_int, fail


@dataclass(frozen=True)
class AllMemConfig:
    """The shape and the rules of an AllMem token mixer (arXiv 2602.13680).

    `[P]` marks what the paper fixes, `[D]` what it leaves open; a `[D]` default is this library's decision.

    Args:
        window: tokens that the sliding-window attention sees, the query's own included. [P: 4096 for 37k, 8192 for 128k]
        sinks: first tokens of a sequence that stay visible for ever. [P: up to 256]
        chunk_size: tokens between two writes of the memory; any integer. [P: 2048]
        heads: memory heads H; None: the model's number of key/value heads. [P]
        head_dim: channels d of a memory head. [P: H*d = 512 with 8 heads]
        hidden_dim: hidden width h of a head's SwiGLU; None: 2*d. [D: follows from the paper's parameter counts]
        memory_layers: indices of the layers that get a memory; None: every layer. [P: every layer]
        sink_positions: "clamped": past the trained length P a sink outside the window is scored with the query
            rotated at position min(i, P-1); "absolute": always at position i. [D]
        norm: where the weights are normalised: "pre_write" (read, normalise, write) [P], "post_write" or "none".
        residual: the memory returns X + MLP(X) instead of MLP(X). [P]
        grad_clip: threshold on the Frobenius norm of each matrix's chunk gradient, per head; None: off. [D]
        weight_norm_eps: added to a row norm, outside the root, before dividing by it. [D]
        eta_init: initial learning rate of the memory, softplus of the eta head's bias. [D: by measurement]
        mu_init: initial momentum, sigmoid of the mu head's bias. [D]
        gate_init: initial gate, sigmoid of the gate head's bias. [D]
        gate: "head" (one gate a head), "channel" (one a channel) or "none". [D]
        conv_size: taps of the depth-wise causal convolution, 2 to 4; 1: none. [P: 4]
        conv_init: how its taps start: "uniform" in +-1/sqrt(conv_size); "zero_sum": the same less each channel's mean, so
            that what all tokens have in common drops out of q, k and v (one tap stays uniform); "token": one on the current
            token, zero on those before it; "token_zero_sum": the same, in q and k less the mean. [D: by measurement, docs/results.md]
        qk_norm: what normalises q and k per head: "rms+l2" (RMSNorm, then L2), "rms", "l2" or "none". [D: order]
        qk_activation: what follows the convolution on q and k: "silu" [P] or "none"; v always has SiLU.
        qk_init: "independent": q and k start from draws of their own; "tied": from one draw of projection and convolution,
            so that a repeated token reads under the key it was written under; "shifted": tied, and k's taps are q's moved one
            token back: the key of a token is the query of the token before it, so that a repeated token reads what followed it.
            All train freely afterwards. [D]
        projection_init: "random"; "values": v and the output projection start from the layer's pretrained attention (the value
            projection of the memory head's key/value head, the output projection's part of it summed over its query heads);
            "attention": q and k too, q as the mean of its query heads, turned by RoPE as for a key 4 windows back.
            `convert` does it; a memory head of another width reads random directions of its head. Biases are left out. [D]
        readout_norm: RMSNorm per head on what is read. [D: form]
        norm_eps: eps of the RMSNorms, inside the root. [D]
        l2_eps: eps of the L2 norm, inside the root. [D]
        w_init_scale: the initial weights W_0 are normal with standard deviation w_init_scale / sqrt(fan_in). [D]
        feature_init: how W_0's gate and up start: "independent", or "equal", from one draw: SiLU(a) * a tells k from -k and peaks
            where query and key agree. [D]
        alpha_lr_scale: alpha's learning rate over that of the other memory parameters. [D: at 1x it hardly leaves zero]
        impl: the implementation that the layers ask the operators for.

    Raises:
        ValueError: a field out of range; the message names it.

    Example:
        >>> config = AllMemConfig(window=512, sinks=4, chunk_size=256)
        >>> AllMemConfig.from_json(config.to_json()) == config
        True
    """

    window: int = 4096
    sinks: int = 128
    chunk_size: int = 2048
    heads: int | None = None
    head_dim: int = 64
    hidden_dim: int | None = None
    memory_layers: tuple[int, ...] | None = None
    sink_positions: Literal["clamped", "absolute"] = "clamped"
    norm: Literal["pre_write", "post_write", "none"] = "pre_write"
    residual: bool = True
    grad_clip: float | None = None
    weight_norm_eps: float = 1e-5
    eta_init: float = 1e-2
    mu_init: float = 0.5
    gate_init: float = 0.5
    gate: Literal["head", "channel", "none"] = "head"
    conv_size: int = 4
    conv_init: Literal["uniform", "zero_sum", "token", "token_zero_sum"] = "zero_sum"
    qk_norm: Literal["rms+l2", "rms", "l2", "none"] = "rms+l2"
    qk_activation: Literal["silu", "none"] = "silu"
    qk_init: Literal["independent", "tied", "shifted"] = "tied"
    projection_init: Literal["random", "values", "attention"] = "random"
    readout_norm: bool = True
    norm_eps: float = 1e-6
    l2_eps: float = 1e-6
    w_init_scale: float = 1.0
    feature_init: Literal["independent", "equal"] = "independent"
    alpha_lr_scale: float = 10.0
    impl: Literal["auto", "triton", "chunk", "reference"] = "auto"

    def __post_init__(self) -> None:
        for name, minimum in (("window", 1), ("sinks", 0), ("chunk_size", 1), ("head_dim", 1), ("conv_size", 1)):
            check_int(name, getattr(self, name), minimum)
        if self.conv_size > 4:
            fail("conv_size", "must be from 1 to 4", self.conv_size)
        for name in ("heads", "hidden_dim"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.memory_layers is not None:
            if not isinstance(self.memory_layers, (list, tuple)):
                fail("memory_layers", "must be None or a sequence of layer indices", repr(self.memory_layers))
            object.__setattr__(self, "memory_layers", tuple(self.memory_layers))
            for index in self.memory_layers:
                check_int("memory_layers", index, 0)
            if len(set(self.memory_layers)) != len(self.memory_layers):
                fail("memory_layers", "must name each layer once", list(self.memory_layers))
        check_choice("sink_positions", self.sink_positions, ("clamped", "absolute"))
        check_choice("norm", self.norm, ("pre_write", "post_write", "none"))
        check_choice("gate", self.gate, ("head", "channel", "none"))
        check_choice("conv_init", self.conv_init, ("uniform", "zero_sum", "token", "token_zero_sum"))
        check_choice("qk_norm", self.qk_norm, ("rms+l2", "rms", "l2", "none"))
        check_choice("qk_activation", self.qk_activation, ("silu", "none"))
        check_choice("qk_init", self.qk_init, ("independent", "tied", "shifted"))
        check_choice("projection_init", self.projection_init, ("random", "values", "attention"))
        if self.qk_init == "shifted" and self.conv_size < 2:
            fail("conv_size", "must be at least 2 with qk_init='shifted'", self.conv_size)
        check_choice("feature_init", self.feature_init, ("independent", "equal"))
        check_choice("impl", self.impl, IMPLS)
        for name in ("residual", "readout_norm"):
            check_bool(name, getattr(self, name))
        for name in ("weight_norm_eps", "norm_eps", "l2_eps"):
            check_float(name, getattr(self, name), minimum=0.0)
        for name in ("eta_init", "w_init_scale", "alpha_lr_scale"):
            check_float(name, getattr(self, name), above=0.0)
        if self.grad_clip is not None:
            check_float("grad_clip", self.grad_clip, above=0.0)
        for name in ("mu_init", "gate_init"):
            check_float(name, getattr(self, name), above=0.0)
            if getattr(self, name) >= 1:
                fail(name, "must be below 1", getattr(self, name))

    @property
    def hidden(self) -> int:
        """The hidden width h: `hidden_dim`, or 2*d."""
        return 2 * self.head_dim if self.hidden_dim is None else self.hidden_dim

    def replace(self, **changes: Any) -> "AllMemConfig":
        """A copy with some fields changed, validated anew; an unknown field is a TypeError."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AllMemConfig":
        """The config of `to_dict`.

        Raises:
            ValueError: a field that this version does not know, or a value out of range.
        """
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            fail("values", f"must hold fields of AllMemConfig ({', '.join(f.name for f in dataclasses.fields(cls))})", unknown)
        return cls(**values)

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "AllMemConfig":
        """The config of `to_json`."""
        return cls.from_dict(json.loads(text))
