"""A cache in a file: it goes on as if it had never been away, and whatever is wrong with the file or the model is refused whole."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from allmem_ops.hf import AllMemCache, convert, load_cache, memory_parameters, reconfigure, save_cache
from allmem_ops.hf.state_file import _tensors
from tests.hf.tiny import awaken, tiny_config, tiny_model, tokens

CLOSE = {"atol": 2e-4, "rtol": 0}


@torch.no_grad()
def read(model, cache, ids):
    return model(ids, past_key_values=cache).logits


def written(model, path, length=30, batch=1):
    cache = AllMemCache(model, batch)
    read(model, cache, tokens(batch, length))
    return cache, save_cache(model, cache, path)


def same(one, other):
    mine, theirs = _tensors(one), _tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in mine.items())


def test_a_loaded_cache_is_the_saved_one_and_goes_on(live, tmp_path):
    cache, path = written(live, tmp_path / "book.safetensors", batch=2)
    again = load_cache(live, path)
    assert same(cache, again)
    assert again.get_seq_length() == 30 and again.aligned
    assert torch.equal(read(live, again, tokens(2, 9, seed=3)), read(live, cache, tokens(2, 9, seed=3)))
    assert torch.equal(read(live, again, tokens(2, 1)), read(live, cache, tokens(2, 1)))


def test_a_document_is_asked_several_times(live, tmp_path):
    """One reading, a file, two questions: each as if the document had been read before it."""
    _, path = written(live, tmp_path / "book", length=50)
    for seed in (1, 2):
        question = tokens(1, 8, seed=seed)
        with torch.no_grad():
            whole = live(torch.cat([tokens(1, 50), question], 1), use_cache=False).logits[:, -8:]
        torch.testing.assert_close(read(live, load_cache(live, path), question), whole, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_layers_without_a_memory(tmp_path, dtype):
    model = awaken(convert(tiny_model("qwen3").to(dtype), tiny_config(memory_layers=(0, 2), sinks=0)))
    cache, path = written(model, tmp_path / "book")
    again = load_cache(model, path)
    assert same(cache, again)
    for one, other in zip(cache.layers, again.layers, strict=True):
        if one.memory is not None:
            assert all(torch.equal(x, y) for x, y in zip(one.memory.memory.rounded, other.memory.memory.rounded, strict=True))
    assert torch.equal(read(model, again, tokens(1, 5)), read(model, cache, tokens(1, 5)))


def test_the_file_has_one_size(live, tmp_path):
    sizes = {written(live, tmp_path / "book", length=n)[1].stat().st_size for n in (1, 9, 10, 101)}
    assert len(sizes) == 1


def test_into_a_cache_that_is_there(live, tmp_path):
    cache, path = written(live, tmp_path / "book")
    into = AllMemCache(live, 1)
    read(live, into, tokens(1, 40, seed=7))
    places = {name: t.data_ptr() for name, t in _tensors(into).items()}
    assert load_cache(live, path, into) is into
    assert same(into, cache)
    assert places == {name: t.data_ptr() for name, t in _tensors(into).items()}
    assert into.get_seq_length() == 30


def refused(model, path, message, cache=None):
    """The reason is given, and neither a cache that is there nor the model has changed."""
    into = AllMemCache(model, 1) if cache is None else cache
    read(model, into, tokens(into.batch_size, 12, seed=5))
    before = into.clone()
    for target in (None, into):
        with pytest.raises(ValueError, match=message):
            load_cache(model, path, target)
    assert same(into, before)
    assert into.get_seq_length() == 12


def test_a_file_cut_at_every_tenth_is_refused(live, tmp_path):
    _, path = written(live, tmp_path / "book")
    whole = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        refused(live, path, "must be an undamaged file that `save_cache` wrote")
    path.write_bytes(whole[:-1])
    refused(live, path, "must be an undamaged file")


def test_a_single_wrong_byte_is_refused(live, tmp_path):
    _, path = written(live, tmp_path / "book")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [2, 40, header // 2, *range(header, len(whole), (len(whole) - header) // 7), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        refused(live, path, "`path` must")


def test_foreign_files_are_refused(live, tmp_path):
    refused(live, tmp_path / "nothing", "which is not there")
    save_file({"x": torch.zeros(3)}, tmp_path / "other")
    refused(live, tmp_path / "other", "a safetensors file of something else")
    (tmp_path / "text").write_text("not a cache, but long enough to be read as one")
    refused(live, tmp_path / "text", "must be an undamaged file")


def test_foreign_models_are_refused(live, tmp_path):
    _, path = written(live, tmp_path / "book")
    refused(awaken(convert(tiny_model("mistral"), tiny_config())), path, "with model_type='llama'; got 'mistral'")
    refused(awaken(convert(tiny_model(num_hidden_layers=2), tiny_config())), path, "with num_hidden_layers=3; got 2")
    other = awaken(convert(tiny_model(), tiny_config()))
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.neg_()
    refused(other, path, "must have the base weights")
    trained = awaken(convert(tiny_model(), tiny_config()))
    with torch.no_grad():
        next(iter(memory_parameters(trained).values())).mul_(1.0001)
    refused(trained, path, "must have the memory that the file was written with")
    refused(awaken(convert(tiny_model().to(torch.bfloat16), tiny_config())), path, "shape and dtype of the model's cache")


def test_another_config_or_batch_size_is_refused(live, tmp_path):
    _, path = written(live, tmp_path / "book")
    with pytest.raises(ValueError, match="`path` must hold 2 sequences, as `cache` does; got 1"):
        load_cache(live, path, AllMemCache(live, 2))
    old = AllMemCache(live, 1)
    reconfigure(live, chunk_size=5)
    refused(live, path, r"must have the config that the file was written with \(\{'chunk_size': 7\}\); got \{'chunk_size': 5\}")
    with pytest.raises(ValueError, match="must have been made with the model's present AllMemConfig"):
        save_cache(live, old, path)
    with pytest.raises(ValueError, match="`model` must be a converted model"):
        save_cache(tiny_model(), old, path)


def test_the_implementation_may_differ(live, tmp_path):
    cache, path = written(live, tmp_path / "book")
    other = awaken(convert(tiny_model(), tiny_config(impl="reference")))
    assert same(load_cache(other, path), cache)


def test_illegal_counters_are_refused(live, tmp_path):
    """A file made on purpose, with a right checksum: a kernel must never get a place outside its buffers."""
    from allmem_ops.hf.state_file import _digest

    _, path = written(live, tmp_path / "book")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        description = file.metadata()["allmem_cache"]
    for name, value in (("memory.count", 7), ("memory.tail", 64), ("window.positions", -1)):
        changed = tensors | {f"layers.1.{name}": torch.tensor([value])}
        save_file(changed, path, metadata={"allmem_cache": description, "sha256": _digest(description, changed)})
        refused(live, path, f"`{name.partition('.')[2]}` must")
    newer = json.dumps(json.loads(description) | {"format": 2}, sort_keys=True)
    save_file(tensors, path, metadata={"allmem_cache": newer, "sha256": _digest(newer, tensors)})
    refused(live, path, "`path` must be of format 1; got 2")


_KILLED = """
import os, signal, sys
import allmem_ops.hf.state_file as state_file
from tests.hf.test_state_file import written
from tests.hf.conftest import *
from tests.hf.tiny import *
model = awaken(convert(tiny_model(), tiny_config()))
save = state_file.save_file
def half(tensors, path, metadata):
    save(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
state_file.save_file = half
written(model, sys.argv[1], length=44)
"""


def test_killed_while_saving_the_old_file_stays_whole(live, tmp_path):
    cache, path = written(live, tmp_path / "book")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "book.part").exists()
    assert same(load_cache(live, path), cache)
    written(live, path, length=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book"]
