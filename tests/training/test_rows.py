"""Which rows a step reads: every row once an epoch, another order each, processes share one step; files and their errors."""

import numpy as np
import pytest
import torch

from allmem_ops.training import Batch, TokenRows, response_mask


def rows(count=10, length=3, **options):
    return TokenRows(np.arange(count * length, dtype=np.uint16).reshape(count, length), **options)


def test_every_row_once_an_epoch_in_another_order_each():
    source = rows()
    epochs = [torch.cat([source.batch(step, 2).ids for step in range(e * 5, e * 5 + 5)])[:, 0] // 3 for e in range(3)]
    assert all(sorted(e.tolist()) == list(range(10)) for e in epochs)
    assert len({tuple(e.tolist()) for e in epochs}) == 3
    assert epochs[0].tolist() != list(range(10)) and source.batch(0, 2).ids.dtype == torch.int64


def test_steps_may_be_read_in_any_order_and_cross_an_epoch():
    one, other = rows(seed=3), rows(seed=3)
    forward = [one.batch(step, 4).ids for step in range(6)]
    assert all(torch.equal(other.batch(step, 4).ids, forward[step]) for step in reversed(range(6)))
    assert not torch.equal(rows(seed=4).batch(0, 4).ids, forward[0])


def test_parts_are_the_whole():
    source = rows()
    parts = [source.batch(1, 6, part=i, parts=3).ids for i in range(3)]
    assert torch.equal(torch.cat(parts), source.batch(1, 6).ids)
    with pytest.raises(ValueError, match="`rows` must be a multiple of parts=3; got 4"):
        source.batch(0, 4, parts=3)


def test_files(tmp_path):
    ids = np.arange(30, dtype=np.uint16)
    np.save(tmp_path / "flat.npy", ids)
    np.save(tmp_path / "rows.npy", ids.reshape(3, 10))
    assert TokenRows.load(tmp_path / "flat.npy", length=7).ids.tolist() == ids[:28].reshape(4, 7).tolist()
    assert TokenRows.load(tmp_path / "rows.npy", length=4).ids.tolist() == ids.reshape(3, 10)[:, :8].reshape(6, 4).tolist()
    assert TokenRows.load(tmp_path / "rows.npy").length == 10
    mask = ids.reshape(3, 10) % 2 == 0
    np.savez(tmp_path / "answers.npz", ids=ids.reshape(3, 10), mask=mask)
    loaded = TokenRows.load(tmp_path / "answers.npz", length=4)
    assert loaded.ids.shape == (3, 4) and torch.equal(loaded.batch(0, 3).mask, loaded.batch(0, 3).ids % 2 == 0)


def test_errors(tmp_path):
    np.save(tmp_path / "flat.npy", np.arange(4))
    np.save(tmp_path / "real.npy", np.zeros((2, 2)))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    np.savez(tmp_path / "bare.npz", ids=np.zeros((2, 2), int))
    for name, message in {
        "missing.npy": "`path` must be a .npy or .npz file",
        "flat.npy": r"`ids` must be integers \[N, T\]; got int64 \[4\]",
        "real.npy": r"`ids` must be integers \[N, T\]; got float64",
        "broken.npy": "`path` must hold token ids",
        "bare.npz": "`path` must hold token ids",
    }.items():
        with pytest.raises(ValueError, match=message):
            TokenRows.load(tmp_path / name)
    with pytest.raises(ValueError, match="`length` must be at most 4, the tokens of a row"):
        TokenRows.load(tmp_path / "flat.npy", length=5)
    with pytest.raises(ValueError, match=r"`mask` must be bool \[2, 2\]"):
        TokenRows(np.zeros((2, 2), int), np.zeros((2, 2)))


def test_response_mask_counts_the_predictions_of_the_response():
    mask = response_mask(torch.tensor([3, 1]), torch.tensor([5, 2]), 6)
    assert mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]


def test_batches_are_checked():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    assert Batch.of(ids).mask is None and Batch.of((ids, ids == 0)).mask.all()
    with pytest.raises(ValueError, match="`mask` must have dtype bool"):
        Batch.of((ids, ids))
    with pytest.raises(ValueError, match=r"`batches` must have shape \[B, T\]; got \[4\]"):
        Batch.of(ids[0])
