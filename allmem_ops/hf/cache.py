"""`AllMemCache`: windows, sinks and memories of all layers, in constant memory. The one file that knows transformers' Cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from allmem_ops._validation import check_int, fail
from allmem_ops.hf.runtime import runtime_of
from allmem_ops.layers.memory import MemoryBranchState
from allmem_ops.ops.swa.cache import WindowCache


@dataclass
class AllMemCacheLayer:
    """One layer's window with sinks, and its memory where the layer has one."""

    window: WindowCache
    memory: MemoryBranchState | None
    seen: int = 0  # tokens given to the layer, padding included; known on the host

    def index_select(self, rows: Tensor | Sequence[int]) -> "AllMemCacheLayer":
        memory = None if self.memory is None else self.memory.index_select(rows)
        return AllMemCacheLayer(self.window.index_select(rows), memory, self.seen)

    def copy_(self, rows: Tensor | Sequence[int], other: "AllMemCacheLayer", other_rows: Tensor | Sequence[int]) -> None:
        self.window.copy_(rows, other.window, other_rows)
        if self.memory is not None:
            self.memory.copy_(rows, other.memory, other_rows)
        self.seen = max(self.seen, other.seen)  # no row stands beyond it

    def reset(self, rows: Tensor | Sequence[int] | None) -> None:
        self.window.reset(rows)
        if self.memory is not None:
            self.memory.reset(rows)
        if rows is None:
            self.seen = 0

    @property
    def nbytes(self) -> int:
        return self.window.nbytes + (0 if self.memory is None else self.memory.nbytes)


class AllMemCache(Cache):
    """The cache of a converted model: every byte is allocated at the start and none is added later.

    Pass it as `past_key_values`, segment by segment; `model.generate` and a plain `model(ids)` make one by themselves.
    It is updated in place. Tokens can't be taken back out of a memory, so `crop` and assisted decoding are refused.
    `save_cache` and `load_cache` keep it in a file.

    **Rows** stand for sequences, each at its own position: `fork` copies each one (several questions about one document), `evict`
    empties one and `admit` puts another cache's sequence in its place, both without an allocation that stays. A row that a step
    leaves out (`allmem_active`, bool [B], in the model's call; a 0 in a step's `attention_mask`; in `generate` and `Decoder` a
    sequence that has ended) keeps every bit.

    Args:
        model: a converted model; gives window, sinks, chunk size, dtype and devices of this moment.
        batch_size: number of sequences.

    Attributes:
        layers: one `AllMemCacheLayer` a layer.
        aligned: every sequence has seen the same number of real tokens (known on the host); false after padding.

    Raises:
        ValueError: `model` is not converted, or `batch_size` is not a positive int.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int = 1) -> None:
        check_int("batch_size", batch_size, 1)
        runtime = runtime_of(model)
        layers = []
        for index, attention in enumerate(runtime.attentions(model)):
            weight = attention.k_proj.weight
            window = WindowCache.empty(
                batch_size,
                weight.shape[0] // attention.head_dim,
                attention.head_dim,
                window=runtime.window(index),
                sinks=runtime.config.sinks,
                dtype=weight.dtype,
                device=weight.device,
            )
            branch = getattr(attention, "memory", None)
            layers.append(AllMemCacheLayer(window, None if branch is None else branch.initial_state(batch_size, weight.dtype)))
        self.layers = layers
        self.config = runtime.config
        self.aligned = True
        self.offloading = False
        self.layer_class_to_replicate = None

    @property
    def batch_size(self) -> int:
        """The number of sequences."""
        return self.layers[0].window.batch

    max_batch_size = batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of all layers: the same from the first token on."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def positions(self) -> Tensor:
        """int64 [batch_size]: real tokens that each sequence has seen."""
        return self.layers[0].window.positions

    def check_fits(self, runtime_config: object, layers: int, batch_size: int) -> None:
        """Raise a ValueError where this cache was made for another model, config or batch size."""
        if len(self.layers) != layers:
            fail("past_key_values", f"must have {layers} layers", len(self.layers))
        if self.config != runtime_config:
            fail("past_key_values", "must have been made with the model's present AllMemConfig", self.config)
        if self.batch_size != batch_size:
            fail("past_key_values", f"must hold {batch_size} sequences", self.batch_size)

    def advance(self, tokens: int) -> None:
        """Count tokens that a replayed graph has put in; may be negative, to take back what only its capture counted."""
        for layer in self.layers:
            layer.seen += tokens

    def align(self) -> None:
        """Note whether every sequence has seen the same tokens; reads the positions on the host. Segments then go the shorter way."""
        self.aligned = set(self.positions.tolist()) == {self.get_seq_length()}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Count the tokens and hand them on: the attention function puts them into the window itself."""
        self.layers[layer_idx].seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.layers[layer_idx].seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(tokens that a padding mask covers, 0)."""
        return self.layers[layer_idx].seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Forget everything; with `rows`, only those sequences."""
        for layer in self.layers:
            layer.reset(rows)
        self.aligned = rows is None

    def index_select(self, rows: Tensor | Sequence[int]) -> "AllMemCache":
        """A new cache whose sequence `i` is a copy of sequence `rows[i]`."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = [layer.index_select(rows) for layer in self.layers]
        return other

    def clone(self) -> "AllMemCache":
        """An independent copy."""
        return self.index_select(range(self.batch_size))

    def fork(self, copies: int) -> "AllMemCache":
        """A new cache with every sequence `copies` times, side by side."""
        check_int("copies", copies, 1)
        return self.index_select([row for row in range(self.batch_size) for _ in range(copies)])

    def copy_(self, rows: Tensor | Sequence[int], other: "AllMemCache", other_rows: Tensor | Sequence[int]) -> "AllMemCache":
        """Overwrite sequence `rows[i]` with sequence `other_rows[i]` of `other`, in place; `rows` are distinct, `other` may be `self`.

        Raises:
            ValueError: `other` was made for another model, config, dtype or device; or a row that does not exist.
        """
        if not isinstance(other, AllMemCache):
            fail("other", "must be an AllMemCache", type(other).__name__)
        other.check_fits(self.config, len(self.layers), other.batch_size)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.copy_(rows, theirs, other_rows)
        self.aligned = self.aligned and other.aligned and self.get_seq_length() == other.get_seq_length()
        return self

    def evict(self, row: int) -> None:
        """Forget sequence `row`, in place; its row is free for another. The others keep every bit."""
        self.reset([row])

    def admit(self, row: int, other: "AllMemCache", other_row: int = 0) -> None:
        """Put sequence `other_row` of `other`, a text that was read on its own, in the place of sequence `row`, in place."""
        self.copy_([row], other, [other_row])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence `i` goes on from sequence `beam_idx[i]`; in place where the batch size stays."""
        if beam_idx.shape[0] == self.batch_size:
            self.copy_(range(self.batch_size), self, beam_idx)
        else:
            self.layers = [layer.index_select(beam_idx) for layer in self.layers]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences `indices`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, *args: object, **kwargs: object) -> None:
        """Refused: a token can't be taken back out of the memory.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "an AllMemCache can't be cropped: the memory's weights have absorbed the tokens. Copy it first with `index_select`"
        )

    def activate_past_recording(self) -> None:
        """Refused, with the reason of `crop`.

        Raises:
            ValueError: always.
        """
        self.crop()

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    def __repr__(self) -> str:
        return f"AllMemCache(batch_size={self.batch_size}, seen={self.get_seq_length()}, nbytes={self.nbytes})"
