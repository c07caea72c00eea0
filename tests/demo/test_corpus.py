"""The corpus: disjoint, the same on every call, free of near-duplicates, cut into exact rows."""

import pytest
import torch

from allmem_ops.demo import corpus as corpus_module
from allmem_ops.demo.corpus import longest_file, near_duplicates, packed_rows, standard_library, whole_rows


class Tokens:
    """A tokenizer of one token a character."""

    eos_token_id = 7

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

    def convert_tokens_to_ids(self, token):
        return None


def body(seed, lines=12):
    return "".join(f"value_{seed}_{i} = {seed * 100 + i}\n" for i in range(lines))


@pytest.fixture
def library(tmp_path):
    for i in range(60):
        (tmp_path / f"module_{i}.py").write_text(body(i))
    for folder in ("test", "site-packages", "package/tests", "__pycache__", "encodings"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "left_out.py").write_text(body(999))
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\n" + body(777).encode())
    return tmp_path


def test_split_is_disjoint_and_complete(library):
    corpus = standard_library(library)
    assert not set(corpus.train) & set(corpus.held_out) and not corpus.dropped
    assert len(corpus.train) + len(corpus.held_out) == 61 and corpus.held_out
    assert not any("left_out" in f.name or f.name == "empty.py" for f in (*corpus.train, *corpus.held_out))


def test_same_library_gives_the_same_corpus(library):
    assert standard_library(library) == standard_library(library)


def test_the_split_depends_on_a_files_path_alone(library):
    before = standard_library(library)
    (library / "one_more.py").write_text(body(500))
    after = standard_library(library)
    assert set(before.held_out) <= set(after.held_out) and set(before.train) <= set(after.train)


def test_a_training_file_that_repeats_a_held_out_one_is_dropped(library):
    corpus = standard_library(library)
    copied, victim = corpus.held_out[0], corpus.train[0]
    (library / victim).write_text(body(400) + corpus.read(copied))
    again = standard_library(library)
    assert victim in again.dropped and victim not in again.train
    assert not near_duplicates({victim: body(400)}, [corpus.read(copied)])


def test_source_encoding_is_honoured(library):
    corpus = standard_library(library)
    latin = next(f for f in (*corpus.train, *corpus.held_out) if f.name == "latin.py")
    assert "é" in corpus.read(latin)


def test_real_library_has_enough_text():
    corpus = standard_library()
    assert len(corpus.train) > 300 and len(corpus.held_out) > 30
    assert not set(corpus.train) & set(corpus.held_out)
    assert (corpus.root / longest_file(corpus, corpus.held_out)).stat().st_size > 50_000


def test_packed_rows_hold_the_files_in_order_with_separators(library):
    corpus = standard_library(library)
    files = corpus.train[:3]
    expected = [t for f in files for t in [*map(ord, corpus.read(f)), Tokens.eos_token_id]]
    rows = packed_rows(corpus, files, Tokens(), length=32)
    assert rows.dtype == torch.int64 and rows.flatten().tolist() == expected[: rows.numel()]
    assert len(expected) - rows.numel() < 32
    assert torch.equal(packed_rows(corpus, files, Tokens(), length=32, rows=2), rows[:2])


def test_whole_rows_never_cross_a_file(library):
    corpus = standard_library(library)
    rows = whole_rows(corpus, corpus.train[:4], Tokens(), length=50)
    texts = [corpus.read(f) for f in corpus.train[:4]]
    pieces = [text[i : i + 50] for text in texts for i in range(0, len(text) - 49, 50)]
    assert ["".join(map(chr, row)) for row in rows.tolist()] == pieces
    starts = whole_rows(corpus, corpus.train[:4], Tokens(), length=50, per_file=1)
    assert ["".join(map(chr, row)) for row in starts.tolist()] == [text[:50] for text in texts]


def test_errors_name_the_argument(library, tmp_path_factory):
    corpus = standard_library(library)
    with pytest.raises(ValueError, match="`rows` must be at most"):
        packed_rows(corpus, corpus.train[:1], Tokens(), length=32, rows=10_000)
    with pytest.raises(ValueError, match="`length` must be at least 1; got 0"):
        whole_rows(corpus, corpus.train, Tokens(), length=0)
    with pytest.raises(ValueError, match="`root` must be a directory with Python source files"):
        standard_library(tmp_path_factory.mktemp("nothing"))


def test_every_split_test_can_fail(library, monkeypatch):
    monkeypatch.setattr(corpus_module, "HELD_OUT_ONE_IN", 1)
    assert not standard_library(library).train
