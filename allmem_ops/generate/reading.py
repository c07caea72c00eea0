"""A text file of any length as segments of tokens: the file is never in memory as a whole, nor are its tokens."""

import codecs
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 18


class Segment(NamedTuple):
    """Tokens [1, T], and the bytes of the file that were taken in by the time it was full."""

    ids: Tensor
    consumed: int


def text_blocks(file: BinaryIO, block_bytes: int = BLOCK_BYTES) -> Iterator[str]:
    """UTF-8 text in blocks that end with a line; before a space or anywhere between two characters where no line or word ends.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
    """
    decoder, left = codecs.getincrementaldecoder("utf-8")(), ""
    while new := file.read(block_bytes):
        left += decoder.decode(new)
        end = left.rfind("\n") + 1
        if not end:
            space = left.rfind(" ")
            end = space if space > 0 else len(left)
        if end:
            yield left[:end]
        left = left[end:]
    left += decoder.decode(b"", final=True)
    if left:
        yield left


def segments(file: BinaryIO, tokenizer: Any, length: int, *, first: bool = True, block_bytes: int = BLOCK_BYTES) -> Iterator[Segment]:
    """The file's tokens, `length` at a time, the last ones fewer.

    The text is cut at line ends and each block tokenised on its own, so that a tokenizer that merges across lines may cut a few
    tokens in another way than in the whole text.

    Args:
        file: UTF-8 text.
        tokenizer: a Hugging Face tokenizer.
        length: tokens a segment.
        first: the text begins here: with the tokenizer's start token, where it has one.
    """
    held: list[int] = start_tokens(tokenizer) if first else []
    consumed = 0
    for text in text_blocks(file, block_bytes):
        held += tokenizer(text, add_special_tokens=False).input_ids
        consumed += len(text.encode())
        while len(held) >= length:
            yield Segment(torch.tensor([held[:length]]), consumed)
            held = held[length:]
    if held and consumed:
        yield Segment(torch.tensor([held]), consumed)


def start_tokens(tokenizer: Any) -> list[int]:
    """The start token, where the tokenizer puts one before a text."""
    return [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]
