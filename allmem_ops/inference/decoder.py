"""`Decoder`: reads a text of any length in segments, then writes tokens, one CUDA graph replay each."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from allmem_ops._validation import check_dtype, check_int, check_shape, fail
from allmem_ops.hf import AllMemCache
from allmem_ops.hf.runtime import runtime_of
from allmem_ops.inference.packed import PackedStep, fits
from allmem_ops.inference.sampling import Sampling

StopCheck = Callable[[Tensor], bool]


class Decoder:
    """Reads and writes with one cache of constant size.

    On a GPU a step (all layers, the choice of the next token, the stop at an end token) is captured once in a CUDA graph and replayed for
    each token, with token, positions, active rows and results in static buffers: the host launches one graph a token and looks at the
    results every `check_every` tokens. Elsewhere the same step runs uncaptured. A sequence that has met an end token is inactive from
    then on: nothing more is written into its window, memory or convolution.

    Args:
        model: a converted model in evaluation mode; its memory mode and config at the first step stay in force.
        cache: of that model; changed in place. None: a new one for `batch_size` sequences.
        batch_size: without a `cache`.
        sampling: how tokens are chosen; greedy by default.
        eos_token_id: end token or tokens; None: those of the model's generation config; (): none.
        pad_token_id: written after a sequence's end; None: the model's, else the first end token, else 0.
        seed: of the draws; None: torch's seed of this moment.
        check_every: tokens between two looks at the results.
        graph: capture the step; None: on a GPU.
        packed: take `PackedStep`, which holds copies of the projections, and not the model's own forward; None: on a GPU, where it fits.
            Or the `PackedStep` to take, of this model.

    Attributes:
        logits: [B, V] after the last token read, or None before the first.
        active: bool [B], on the device: sequences that go on.

    Raises:
        ValueError: a model that is not converted, a cache of another model, config or device, or a value out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from allmem_ops import AllMemConfig
        >>> from allmem_ops.hf import convert
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                                      num_attention_heads=4, num_key_value_heads=2)).eval()
        >>> decoder = Decoder(convert(model, AllMemConfig(window=16, sinks=2, chunk_size=8, head_dim=16)), eos_token_id=())
        >>> ids = torch.arange(2, 40)[None]
        >>> decoder.read(ids, segment=16)
        >>> new = decoder.generate(8)
        >>> torch.equal(new, model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 38:])
        True
        >>> decoder.cache.get_seq_length()  # the last token has not been read
        45
    """

    def __init__(
        self,
        model: nn.Module,
        cache: AllMemCache | None = None,
        *,
        batch_size: int = 1,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        check_every: int = 8,
        graph: bool | None = None,
        packed: bool | PackedStep | None = None,
    ) -> None:
        runtime = runtime_of(model)
        check_int("check_every", check_every, 1)
        cache = AllMemCache(model, batch_size) if cache is None else cache
        cache.check_fits(runtime.config, len(runtime.own_windows), cache.batch_size)
        device = cache.positions.device
        cuda = device.type == "cuda"
        if graph and not cuda:
            fail("graph", "must be False without a CUDA device", device)
        if packed and not fits(model):
            fail("packed", "must be False for layers that are put together in another way", type(model).__name__)
        self.model, self.cache, self.check_every = model, cache, check_every
        self.sampling = Sampling() if sampling is None else sampling
        self.graph = cuda if graph is None else graph
        packed = cuda and fits(model) if packed is None else packed
        if isinstance(packed, PackedStep) and packed.model is not model:
            fail("packed", "must be a PackedStep of `model`", "another model's")
        self.packed = packed if isinstance(packed, PackedStep) else PackedStep(model) if packed else None
        ends = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        if pad_token_id is None:
            pad_token_id = model.generation_config.pad_token_id
        if pad_token_id is None:
            pad_token_id = ends[0] if ends else 0
        B = cache.batch_size
        self._ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self._pad = torch.tensor(pad_token_id, dtype=torch.int64, device=device)
        self._token = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self._block = torch.zeros(B, check_every, dtype=torch.int64, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.active = torch.ones(B, dtype=torch.bool, device=device)
        self.logits: Tensor | None = None
        self._generator = torch.Generator(device).manual_seed(torch.initial_seed() if seed is None else seed)
        self._replay: Callable[[], None] | None = None
        self._newcomers: set[int] = set()  # rows admitted since `stream` began

    @torch.no_grad()
    def read(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        segment: int = 4096,
        on_segment: Callable[[int], None] | None = None,
    ) -> None:
        """Read tokens into the cache, after what it has read already; keeps the logits after the last one.

        Args:
            ids: int64 [B, T] on any device; each segment alone is taken to the model's.
            attention_mask: [B, T], 1 for a token, 0 for padding on the left, or None.
            segment: tokens that go through the model at once. The result does not depend on it, peak memory does.
            on_segment: called after each with the number of tokens read so far.
        """
        check_shape("ids", ids, "B T", {"B": self.cache.batch_size})
        check_dtype("ids", ids, torch.int64)
        check_int("segment", segment, 1)
        if ids.shape[1] == 0:
            fail("ids", "must have at least one token", list(ids.shape))
        if attention_mask is not None:
            check_shape("attention_mask", attention_mask, "B T", {"B": ids.shape[0], "T": ids.shape[1]})
        past, device = self.cache.get_seq_length(), self.cache.positions.device
        for start in range(0, ids.shape[1], segment):
            piece = ids[:, start : start + segment].to(device)
            options = {}
            if attention_mask is not None:
                seen = attention_mask.new_ones(ids.shape[0], past)
                options["attention_mask"] = torch.cat([seen, attention_mask[:, : start + segment]], 1).to(device)
            out = self.model(piece, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **options)
            self.logits = out.logits[:, -1]
            if on_segment is not None:
                on_segment(start + piece.shape[1])
        self.active.fill_(True)

    @torch.no_grad()
    def admit(self, row: int, other: "Decoder") -> Tensor:
        """Put the text that `other`, a decoder of one sequence, has read in the place of sequence `row`, which then goes on writing.

        Between two blocks of `stream`, or before it. The other sequences do not notice.

        Returns:
            int64 [1]: the newcomer's first token. The row's next block goes on after it.

        Raises:
            ValueError: `other` has read nothing, or its cache does not fit.
        """
        if other.logits is None:
            fail("other", "must have read a text", "a decoder without logits")
        self.cache.admit(row, other.cache)
        token = self.sampling.choose(other.logits, self._generator)
        self._token[row] = token
        self.active[row] = ~(token == self._ends).any()
        self._newcomers.add(row)
        return token

    def generate(self, max_new_tokens: int, *, stop: StopCheck | None = None) -> Tensor:
        """Write up to `max_new_tokens` tokens a sequence.

        Args:
            max_new_tokens: at least 1.
            stop: called with all tokens so far [B, n] every `check_every` tokens; True ends the writing. The cache has then read the
                tokens up to that look.

        Returns:
            int64 [B, n] on the device, padded after a sequence's end. The last column has not been read into the cache: pass it on with
            the next text.

        Raises:
            ValueError: nothing was read before.
        """
        blocks = []
        for block in self.stream(max_new_tokens):
            blocks.append(block)
            if stop is not None and stop(torch.cat(blocks, 1)):
                break
        return torch.cat(blocks, 1)

    @torch.no_grad()
    def stream(self, max_new_tokens: int) -> Iterator[Tensor]:
        """`generate`, a block [B, up to `check_every`] at a time."""
        check_int("max_new_tokens", max_new_tokens, 1)
        if self.logits is None:
            fail("max_new_tokens", "needs a text to go on from (`read`)", "nothing read")
        self._slot.zero_()
        self._take(self.logits)
        self.logits = None
        held, left = 1, max_new_tokens - 1
        before, seen = self.cache.positions.tolist(), self.cache.get_seq_length()
        self._newcomers.clear()
        try:
            while True:
                steps = min(self.check_every - held, left)
                for _ in range(steps):
                    self._step()
                held, left = held + steps, left - steps
                going = bool(self.active.any())  # the one host read of a block
                block = self._block[:, :held].clone()
                self._slot.zero_()
                held = 0
                yield block if going or not len(self._ends) else self._until_the_end(block)
                if not going or not left:
                    return
        finally:
            after = self.cache.positions.tolist()
            moved = [seen + p - q for row, (p, q) in enumerate(zip(after, before, strict=True)) if row not in self._newcomers]
            self.cache.advance(max(*moved, *after) - self.cache.get_seq_length())
            self.cache.align()

    def _until_the_end(self, block: Tensor) -> Tensor:
        """Without the columns that come after every sequence's end."""
        ends = (block[:, :, None] == self._ends).any(-1)
        first = torch.where(ends.any(1), ends.int().argmax(1), 0)
        return block[:, : int(first.max()) + 1]

    def _step(self) -> None:
        """One token more: the graph, captured at the first, or the step itself."""
        if self.cache.batch_size != self.active.shape[0]:
            fail("cache", f"must hold the {self.active.shape[0]} sequences that it was given with", self.cache.batch_size)
        if not self.graph:
            self._forward_and_take()
            return
        if self._replay is None:
            self._replay = self._capture()
        self._replay()

    def _capture(self) -> Callable[[], None]:
        """The step as a graph. It warms up with no row active, so that the cache stays bit for bit what it was."""
        buffers = self._token, self._block, self._slot, self.active
        kept, draws = [b.clone() for b in buffers], self._generator.get_state()
        seen, aligned = self.cache.get_seq_length(), self.cache.aligned
        self.active.fill_(False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._slot.zero_()
                self._forward_and_take()
        torch.cuda.current_stream().wait_stream(stream)
        self._generator.set_state(draws)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph):
            self._forward_and_take()
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)
        self.cache.advance(seen - self.cache.get_seq_length())
        self.cache.aligned = aligned
        return graph.replay

    def _forward_and_take(self) -> None:
        self._take(self._logits())

    def _logits(self) -> Tensor:
        """Read the present tokens into the active rows of the cache; the logits [B, V] after them."""
        if self.packed is not None:
            return self.packed(self._token, self.active, self.cache)
        return self.model(self._token, past_key_values=self.cache, use_cache=True, allmem_active=self.active).logits[:, -1]

    def _take(self, logits: Tensor) -> None:
        """Choose the next tokens, note them, and end the sequences that have met an end token."""
        token = torch.where(self.active, self.sampling.choose(logits, self._generator), self._pad)
        self._block.scatter_(1, self._slot.expand(token.shape[0], 1), token[:, None])
        self._slot += 1
        self.active &= ~(token[:, None] == self._ends).any(-1)
        self._token.copy_(token[:, None])
