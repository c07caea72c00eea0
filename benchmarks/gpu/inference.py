"""Decoding and reading in constant memory: contests of one step against full attention with a static cache, and streams of a long text."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from allmem_ops import AllMemConfig
from allmem_ops.cost import MixerShape, cache_bytes
from allmem_ops.demo import smollm2
from allmem_ops.demo.corpus import standard_library
from allmem_ops.hf import AllMemCache, convert, memory_parameters
from allmem_ops.inference import Decoder
from allmem_ops.inference.packed import PackedStep
from benchmarks.gpu.contest import OURS, Contest, Gate
from benchmarks.gpu.timing import Call
from benchmarks.peers.static_cache import Attention, FullAttentionStep, StaticCache, flex, sdpa

H100 = "NVIDIA H100"
SDPA, FLEX = "full attention, SDPA, static cache", "full attention, FlexAttention, static cache"
LONG = 131072  # the context of the gates
NEVER = (1_000_000_000,)  # an end token that no model writes
KERNELS, LIBRARY = "ours, products by our own kernels", "ours, products by the library"  # what `PackedStep` does not choose by itself
AT_8K = "ours after 8,192 tokens"
CONFIG = AllMemConfig(window=4096, sinks=128, chunk_size=2048, head_dim=64, hidden_dim=128)

# Random weights in these shapes; the numbers are those of the published configs.
SHAPES: dict[str, PreTrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, max_position_embeddings=40960, rope_theta=1e6, tie_word_embeddings=True,
    ),
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True,
    ),
}  # fmt: skip


def build_model(shape: PreTrainedConfig, config: AllMemConfig = CONFIG, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
    """A converted model with random weights, whose memory speaks."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shape).eval()
    finally:
        torch.set_default_dtype(default)
    return _awake(convert(model, config))


@functools.cache
def _model(name: str) -> Any:
    """Of a shape, in bfloat16; SmolLM2 with its own weights where the demo has put them on this machine."""
    weights = smollm2.cache_directory() / smollm2.GGUF
    if name == "SmolLM2-135M" and weights.is_file():
        model = smollm2.load_model(weights, dtype=torch.bfloat16, device="cuda")
        return _awake(convert(model, CONFIG))
    return build_model(SHAPES[name])


def _awake(model: Any) -> Any:
    """The memory's parameters away from their start, so that it speaks."""
    with torch.no_grad():
        for p in memory_parameters(model).values():
            p.add_(0.02 * torch.randn_like(p))
    return model


def shape_of(name: str) -> MixerShape:
    return MixerShape.from_config(SHAPES[name], CONFIG)


def step_bytes(name: str, batch: int) -> int:
    """The least that a step has to read: every weight once, and of each sequence the window with its sinks, and the memory's weights."""
    c, s = SHAPES[name], shape_of(name)
    width = s.memory_heads * s.memory_dim
    attention = (2 * s.n_heads + 2 * s.n_kv_heads) * s.head_dim
    columns = 4 * width + 4 * s.memory_heads + s.gates  # the memory's projections in and out
    weights = s.layers * s.d_model * (attention + columns + 3 * c.intermediate_size) + c.vocab_size * s.d_model
    rounded = s.layers * 3 * s.memory_heads * s.memory_dim * s.memory_hidden
    return 2 * weights + batch * (cache_bytes(s, 1, "swa") + 2 * rounded)


def step_call(decoder: Decoder) -> Call:
    """The decode step, results into the first slot."""

    def call() -> None:
        decoder._slot.zero_()
        decoder._forward_and_take()

    return call


def decoder_at(model: Any, batch: int, position: int, packed: PackedStep) -> Decoder:
    """A decoder whose sequences have seen `position` tokens: the buffers are full of noise, and its size and cost are those of any text."""
    decoder = Decoder(model, AllMemCache(model, batch), eos_token_id=NEVER, graph=False, packed=packed)
    for layer in decoder.cache.layers:
        for name, tensor in layer.window.tensors().items():
            tensor.fill_(position) if name == "positions" else tensor.normal_()
        layer.memory.memory.position.fill_(position)
    decoder.cache.advance(position)
    return decoder


def full_decoder(model: Any, cache: StaticCache, attention: Attention) -> Decoder:
    """The same loop around full attention."""
    decoder = Decoder(model, batch_size=cache.positions.shape[0], eos_token_id=NEVER, graph=False, packed=False)
    decoder.cache, decoder.packed = cache, FullAttentionStep(model, attention)
    return decoder


def _steps(name: str, batch: int, context: int, full: bool, constant: bool) -> dict[str, dict[str, Call]]:
    model = _model(name)
    packed = PackedStep(model)
    calls = {OURS: step_call(decoder_at(model, batch, 1_000_000, packed))}
    if batch <= 4:
        other = PackedStep(model, kernels=batch > 1)
        calls[KERNELS if batch > 1 else LIBRARY] = step_call(decoder_at(model, batch, 1_000_000, other))
    if constant:
        calls[AT_8K] = step_call(decoder_at(model, batch, 8192, packed))
    if full:
        cache = StaticCache(model, batch, context)
        for layer in cache.layers:
            for t in layer.window:
                t.normal_()
        peers = ((SDPA, sdpa), (FLEX, flex)) if context == LONG else ((SDPA, sdpa),)  # every context is one more compilation of flex
        for peer, attention in peers:
            calls[peer] = step_call(full_decoder(model, cache, attention))
    return {"step": calls}


def _decode(name: str, batch: int, context: int, *gates: Gate, full: bool = True) -> Contest:
    constant = batch <= 8  # at batch 32 two of our states beside the full cache are too much for the card
    gates = (Gate(1 / 1.02, 1 / 1.02, AT_8K), *gates) if constant else gates
    return Contest(
        "decode", f"{name}-B{batch}-{context}", functools.partial(_steps, name, batch, context, full, constant),
        work={"step": (batch * step_bytes(name, 0), step_bytes(name, batch))},
        gates={H100: {"step": list(gates)}} if gates else {}, graph=frozenset({"step"}),
    )  # fmt: skip


def _faster(gate: float) -> tuple[Gate, Gate]:
    return Gate(gate, gate, SDPA), Gate(gate, gate, FLEX)


# At batch 8 the full cache at 128k, 120 GB, is larger than the card. Contexts are those of full attention; ours is at 1M tokens.
CONTESTS = (
    _decode("Qwen3-0.6B", 1, LONG, *_faster(4.0), Gate(40.0, 65.0, unit="% of copy")),
    _decode("Qwen3-0.6B", 4, LONG, *_faster(8.0)),
    _decode("Qwen3-0.6B", 8, LONG, full=False),
    _decode("Qwen3-0.6B", 1, 4096),
    _decode("Qwen3-0.6B", 1, 32768),
    _decode("Qwen3-0.6B", 8, 4096),
    _decode("Qwen3-0.6B", 8, 32768),
    _decode("Qwen3-0.6B", 32, 4096),
    _decode("Qwen3-0.6B", 32, 8192),
    _decode("SmolLM2-135M", 1, LONG),
)


@dataclass(frozen=True)
class Stream:
    """One text read segment by segment at batch 1.

    Args:
        shape: of `SHAPES`.
        tokens, segment: of the text, and read at a time.
        least: tokens a second that the stream must reach on an H100; None: no gate.
        evenly: the last tenth's tokens a second over the first tenth's, at least.
        slack: bytes that the allocator's high-water mark may rise by after the first segment.
    """

    shape: str
    tokens: int = 1_048_576
    segment: int = 8192
    least: float | None = None
    evenly: float = 0.95
    slack: int = 1_000_000

    def __str__(self) -> str:
        return f"stream-{self.shape}-{self.tokens}"


STREAMS = (Stream("Qwen3-0.6B", least=80_000.0), Stream("SmolLM2-135M"))


@functools.cache
def library_bytes(count: int) -> Tensor:
    """Real text: the sources of Python's standard library, a byte a token, over and over up to `count` tokens; [1, count]."""
    corpus, text = standard_library(), bytearray()
    for path in corpus.train:
        text += (corpus.root / path).read_bytes()
        if len(text) >= count:
            break
    ids = torch.frombuffer(text, dtype=torch.uint8)
    return ids.repeat(-(-count // len(text)))[:count].long()[None]


def read_stream(model: Any, ids: Tensor, segment: int) -> dict[str, Any]:
    """Tokens a second by tenth, cache bytes, and on a GPU the allocator's high-water mark after the first segment and after the last."""
    cuda = model.device.type == "cuda"
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    decoder = Decoder(model, eos_token_id=(), packed=False)
    decoder.read(ids[:, : 2 * segment], segment=segment)  # compiles
    decoder.cache.reset()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    marks: list[tuple[int, float, int]] = []

    def mark(tokens: int) -> None:
        synchronize()
        marks.append((tokens, time.perf_counter(), torch.cuda.max_memory_allocated() if cuda else 0))
        if 10 * tokens // ids.shape[1] > 10 * marks[len(marks) - 2][0] // ids.shape[1]:
            print(f"{tokens} tokens, {tokens / (marks[-1][1] - marks[0][1]):.0f} a second, peak {marks[-1][2]} bytes", flush=True)

    mark(0)
    decoder.read(ids, segment=segment, on_segment=mark)
    tenths = [_speed(marks, part / 10, (part + 1) / 10) for part in range(10)]
    return {
        "tokens": ids.shape[1],
        "segment": segment,
        "tokens_per_s": _speed(marks, 0, 1),
        "tokens_per_s_by_tenth": tenths,
        "cache_bytes": decoder.cache.nbytes,
        "peak_bytes_first": marks[1][2],
        "peak_bytes_last": marks[-1][2],
        "peak_bytes_by_tokens": {str(n): peak for n, _, peak in marks[1:] if n & (n - 1) == 0},
    }


def _speed(marks: list[tuple[int, float, int]], start: float, end: float) -> float:
    """Tokens a second between two parts of the text, by the marks nearest to them."""
    (n0, t0, _), (n1, t1, _) = (marks[round(part * (len(marks) - 1))] for part in (start, end))
    return (n1 - n0) / (t1 - t0)


def run_stream(stream: Stream) -> dict[str, Any]:
    """Read it on the GPU."""
    model = _model(stream.shape)
    weights = "published" if model.config.name_or_path else "random"
    found = {"op": "stream", "name": str(stream), "weights": weights}
    return found | read_stream(model, library_bytes(stream.tokens), stream.segment)


def judge_stream(stream: Stream, found: dict[str, Any], card: str) -> list[dict[str, Any]]:
    """The stream's gates: {gate, figure, mark, passed}."""
    tenths = found["tokens_per_s_by_tenth"]
    gates = [
        ("high-water mark after the first segment, bytes more", found["peak_bytes_last"] - found["peak_bytes_first"], stream.slack, False),
        ("last tenth over first tenth", tenths[-1] / tenths[0], stream.evenly, True),
    ]
    if stream.least is not None and card.startswith(H100):
        gates.append(("tokens/s", found["tokens_per_s"], stream.least, True))
    return [
        {"gate": name, "figure": figure, "mark": mark, "passed": figure >= mark if least else figure <= mark}
        for name, figure, mark, least in gates
    ]


def greedy_against_one_pass(model: Any, ids: Tensor, count: int, eager_seconds: float = 30.0) -> dict[str, Any]:
    """Greedy tokens of the graph against one forward pass over text and tokens: where the likeliest token is another, and by how much;
    and against the model's own forward, uncaptured, for as many tokens as it writes in `eager_seconds`."""
    decoder = Decoder(model, eos_token_id=())
    decoder.read(ids)
    tokens = decoder.generate(count)
    print(f"graph: {tokens.shape[1]} tokens", flush=True)
    with torch.no_grad():
        hidden = model.base_model(torch.cat([ids, tokens], 1), use_cache=False).last_hidden_state[:, ids.shape[1] - 1 : -1]
        logits = torch.cat([model.get_output_embeddings()(part).float() for part in hidden.split(256, 1)], 1)
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    behind = logits.amax(-1) - chosen  # 0 where the pass takes the same token
    other = (behind > 0).nonzero()[:, 1]
    print(f"one pass: {len(other)} tokens are not its likeliest", flush=True)
    eager = _eager_tokens(model, ids, count, eager_seconds)
    apart = (eager != tokens[:, : eager.shape[1]]).nonzero()[:, 1]
    at = int(apart[0]) if len(apart) else None
    return {
        "dtype": str(model.dtype),
        "tokens": count,
        "first_divergence": int(other[0]) if len(other) else None,
        "divergences": len(other),
        "largest_gap": float(behind.max()),
        "logits_rms": float(logits.square().mean().sqrt()),
        "distinct_tokens": len(tokens.unique()),
        "eager_tokens": eager.shape[1],
        "eager_first_difference": at,
        # up to there both have read the same: how far their two tokens are apart in the pass
        "eager_gap": 0.0 if at is None else abs(float(logits[0, at, eager[0, at]] - chosen[0, at])),
    }


def _eager_tokens(model: Any, ids: Tensor, count: int, seconds: float) -> Tensor:
    """[1, n] greedy tokens of the model's own forward: `count`, or as many as it has written after `seconds`."""
    decoder = Decoder(model, eos_token_id=(), graph=False, packed=False)
    decoder.read(ids)
    blocks, start = [], time.monotonic()
    for block in decoder.stream(count):
        blocks.append(block)
        if len(blocks) % 32 == 0:
            print(f"eager: {8 * len(blocks)} tokens, {time.monotonic() - start:.1f} s", flush=True)
        if time.monotonic() - start > seconds:
            break
    return torch.cat(blocks, 1)
