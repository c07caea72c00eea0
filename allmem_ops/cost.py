"""What a token costs: FLOPs and cache bytes of full attention, of the window alone and of AllMem.

The counts are those of the token mixers of all layers: what stands in attention's place, with its projections. MLPs, embeddings and the
vocabulary are the same for every mixer and left out. A multiplication with its addition is 2 FLOPs; elementwise work (softmax, norms,
activations, RoPE) is not counted, as `torch.utils.flop_counter` does not count it.

    >>> qwen3 = MixerShape(d_model=1024, n_heads=16, n_kv_heads=8, head_dim=128, layers=28,
    ...                    window=4096, sinks=128, chunk_size=2048, memory_heads=8, memory_dim=64, memory_hidden=128)
    >>> full, allmem = (prefill_flops(qwen3, 131072, mixer) for mixer in ("full", "allmem"))
    >>> f"{full / allmem:.1f}"
    '10.5'

"About 1/9" of full attention's compute at 128k (arXiv 2602.13680; window 4096, chunk 2048, here with 128 sinks) in this count:

| | exact mean of a prefill | every token sees a full window |
|---|---|---|
| Qwen3-0.6B | 10.5 | 10.4 |
| Qwen3-1.7B | 8.2 | 8.1 |

The right column charges `window + sinks` keys to each token, also to the first ones; full attention is the exact mean in both.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

from allmem_ops._validation import check_choice, check_int, fail
from allmem_ops.ops.swa.geometry import visible_pairs
from allmem_ops.ops.ttt_mlp.tail import TAIL_TOKENS

Mixer = Literal["full", "swa", "allmem"]

_MIXERS = ("full", "swa", "allmem")


@dataclass(frozen=True)
class MixerShape:
    """The sizes that the counts need, as plain ints.

    Args:
        d_model, n_heads, n_kv_heads, head_dim, layers: of the model.
        window, sinks, chunk_size: of AllMem.
        memory_heads, memory_dim, memory_hidden: H, d and h of a layer's memory.
        memory_layers: layers that have a memory; None: all.
        gates: gate logits a token and layer; None: one a head.
        norms: RMSNorm weights [d] of a memory (q, k, readout).
        conv_size: taps of the causal convolution.
        element_size: bytes of a key, a value or an activation; 2 for bfloat16.

    Raises:
        ValueError: a size out of range, or `n_heads` not a multiple of `n_kv_heads`.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    layers: int
    window: int
    sinks: int
    chunk_size: int
    memory_heads: int
    memory_dim: int
    memory_hidden: int
    memory_layers: int | None = None
    gates: int | None = None
    norms: int = 3
    conv_size: int = 4
    element_size: int = 2

    def __post_init__(self) -> None:
        if self.memory_layers is None:
            object.__setattr__(self, "memory_layers", self.layers)
        if self.gates is None:
            object.__setattr__(self, "gates", self.memory_heads)
        for name in self.__dataclass_fields__:
            check_int(name, getattr(self, name), 0 if name in ("sinks", "memory_layers", "gates", "norms") else 1)
        if self.n_heads % self.n_kv_heads:
            fail("n_heads", f"must be a multiple of n_kv_heads={self.n_kv_heads}", self.n_heads)
        if self.memory_layers > self.layers:
            fail("memory_layers", f"must be at most layers={self.layers}", self.memory_layers)

    @classmethod
    def from_config(cls, model_config: Any, config: Any, *, element_size: int = 2) -> Self:
        """The shape of a converted model.

        Args:
            model_config: the model's config: any object with `hidden_size`, `num_attention_heads` and `num_hidden_layers`;
                `num_key_value_heads` and `head_dim` are derived where they are absent or None.
            config: an `AllMemConfig`.
            element_size: bytes of a key or a value.

        Raises:
            ValueError: a size missing from `model_config`, or out of range.
        """
        sizes = {}
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            sizes[name] = getattr(model_config, name, None)
            if sizes[name] is None:
                fail("model_config", f"must have the attribute {name}", type(model_config).__name__)
        heads = sizes["num_attention_heads"]
        n_kv = getattr(model_config, "num_key_value_heads", None) or heads
        memory_heads = config.heads or n_kv
        return cls(
            d_model=sizes["hidden_size"],
            n_heads=heads,
            n_kv_heads=n_kv,
            head_dim=getattr(model_config, "head_dim", None) or sizes["hidden_size"] // heads,
            layers=sizes["num_hidden_layers"],
            window=config.window,
            sinks=config.sinks,
            chunk_size=config.chunk_size,
            memory_heads=memory_heads,
            memory_dim=config.head_dim,
            memory_hidden=config.hidden,
            memory_layers=sizes["num_hidden_layers"] if config.memory_layers is None else len(config.memory_layers),
            gates={"head": memory_heads, "channel": memory_heads * config.head_dim, "none": 0}[config.gate],
            norms=2 * (config.qk_norm in ("rms+l2", "rms")) + config.readout_norm,
            conv_size=config.conv_size,
            element_size=element_size,
        )


def projection_flops(shape: MixerShape) -> int:
    """Query, key, value and output projections of one layer and token.

    2 FLOPs for each weight: q and o have d_model * n_heads * head_dim of them, k and v have d_model * n_kv_heads * head_dim.
    """
    return 2 * shape.d_model * 2 * (shape.n_heads + shape.n_kv_heads) * shape.head_dim


def attention_flops(shape: MixerShape, pairs: float) -> float:
    """Attention of one layer over `pairs` pairs of query and key.

    A pair is an inner product (2 head_dim) and a weighted sum (2 head_dim) in each of the n_heads heads.
    """
    return 4 * shape.n_heads * shape.head_dim * pairs


def memory_flops(shape: MixerShape) -> int:
    """The memory branch of one layer and token: projections, convolution and the memory itself.

    Projections: q, k, v and output have d_model * H * d weights each, the heads for eta (3 H), mu (H) and the gate d_model weights a
    logit. Convolution: conv_size taps for each of the 3 H d channels. Memory, for each head: a product of a token with a [h, d] matrix
    is 2dh FLOPs. The read makes 3 of them (gate, up, down), the write 3 for its activations (gate, up, and v with down) and 3 outer
    products for the gradients: 9 * 2dh = 18dh. A pass that keeps no state may
    skip the write (12dh) of a partial last chunk.
    """
    width = shape.memory_heads * shape.memory_dim
    projections = 2 * shape.d_model * (4 * width + 4 * shape.memory_heads + shape.gates)
    return projections + 2 * shape.conv_size * 3 * width + 18 * shape.memory_dim * shape.memory_hidden * shape.memory_heads


def prefill_flops(shape: MixerShape, length: int, mixer: Mixer) -> float:
    """FLOPs a token of all layers' token mixers, the mean over a sequence of `length` tokens.

    layers * (projections + attention over pairs / length)  +  memory_layers * memory branch (`"allmem"` only)

    The pairs of query and key are those of `visible_pairs`: length * (length + 1) / 2 for full attention; with a window, query i sees
    min(i + 1, window) keys in it and min(sinks, i + 1 - window) sinks that have left it.
    """
    check_int("length", length, 1)
    check_choice("mixer", mixer, _MIXERS)
    window, sinks = (length, 0) if mixer == "full" else (shape.window, shape.sinks)
    pairs = visible_pairs(length, length, window, sinks)
    return _all_layers(shape, pairs / length, mixer)


def decode_flops(shape: MixerShape, length: int, mixer: Mixer) -> float:
    """FLOPs of all layers' token mixers for one token that is the `length`-th of its sequence.

    As `prefill_flops` with the keys that this token sees: `length`, or min(length, window + sinks) with a window. The memory folds its
    writes in once for many tokens; the mean of a token is counted.
    """
    check_int("length", length, 1)
    check_choice("mixer", mixer, _MIXERS)
    return _all_layers(shape, length if mixer == "full" else min(length, shape.window + shape.sinks), mixer)


def cache_bytes(shape: MixerShape, length: int, mixer: Mixer) -> int:
    """Bytes that a sequence of `length` tokens occupies between two steps, all layers.

    `"full"`: keys and values, 2 * n_kv_heads * head_dim * element_size a token and layer. `"swa"`: those of `WindowCache`, window + sinks
    tokens from the start on, and an int64 position. `"allmem"`: also `memory_state_bytes`. Only `"full"` depends on `length`.
    """
    check_int("length", length, 0)
    check_choice("mixer", mixer, _MIXERS)
    token = 2 * shape.n_kv_heads * shape.head_dim * shape.element_size
    if mixer == "full":
        return shape.layers * token * length
    window = shape.layers * (token * (shape.window + shape.sinks) + 8)
    return window + (shape.memory_layers * memory_state_bytes(shape) if mixer == "allmem" else 0)


def memory_state_bytes(shape: MixerShape) -> int:
    """Bytes of one layer's memory branch between two steps of a sequence: `MemoryState` and the convolution's tail.

    float32 for each head: weights, momentum and the open chunk's gradient sums, 3 times 3 d h; row norms of the initial weights,
    h + h + d; the sum of mu, 1; the rates of a tail of 64 tokens, whose keys and values are in the activations' dtype. Three
    int64 counters. With half-precision activations also the weights in their dtype, 3 d h. The convolution keeps conv_size - 1 inputs
    of 3 H d channels in the activations' dtype.
    """
    d, h = shape.memory_dim, shape.memory_hidden
    tail = TAIL_TOKENS * (2 * d * shape.element_size + 3 * 4)
    rounded = 3 * d * h * shape.element_size if shape.element_size == 2 else 0
    state = shape.memory_heads * (4 * (9 * d * h + 2 * h + d + 1) + tail + rounded) + 3 * 8
    return state + (shape.conv_size - 1) * 3 * shape.memory_heads * d * shape.element_size


def memory_parameters(shape: MixerShape) -> int:
    """Parameters that the memory branches add, all layers.

    A layer: projections d_model * (4 H d + 4 H + gates) and biases 4 H + gates, convolution 3 H d * conv_size, `norms` vectors of d,
    initial weights 3 H d h, alpha d_model.
    """
    width, logits = shape.memory_heads * shape.memory_dim, 4 * shape.memory_heads + shape.gates
    layer = shape.d_model * (4 * width + logits) + logits + 3 * width * shape.conv_size + shape.norms * shape.memory_dim
    return shape.memory_layers * (layer + 3 * width * shape.memory_hidden + shape.d_model)


def _all_layers(shape: MixerShape, pairs: float, mixer: Mixer) -> float:
    flops = shape.layers * (projection_flops(shape) + attention_flops(shape, pairs))
    return flops + (shape.memory_layers * memory_flops(shape) if mixer == "allmem" else 0)
