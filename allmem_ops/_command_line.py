"""What the command lines share: every foreseeable error is one sentence, found before a model is loaded where it can be."""

import argparse
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from allmem_ops.demo import smollm2

MEMORY_FILES = ("memory.safetensors", "memory.json")


class Problem(Exception):
    """What stands in the way, as one sentence."""


def check_installed(needed: Iterable[str], what: str, install: str) -> None:
    """Raise `Problem` where one of the modules `needed` is not installed."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise Problem(f"{what} needs {', '.join(missing)}: {install}")


def check_device(name: str) -> torch.device:
    """The device that `--device` names; `Problem` where it is none, or not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Problem(f"--device must be cpu or cuda; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise Problem(f"--device must be cpu or cuda; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Problem(f"--device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def check_memory(flag: str, folder: Path) -> None:
    """Raise `Problem` where `folder` is not what `allmem_ops.hf.save_memory` wrote."""
    absent = [file for file in MEMORY_FILES if not (folder / file).is_file()]
    if absent:
        raise Problem(f"--{flag} {folder} holds no {absent[0]}: it must be a folder that allmem_ops.hf.save_memory wrote")


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The base model that `--model`, `--dtype` and `--device` name, not converted, and its tokenizer."""
    try:
        return smollm2.load_by_name(options.model, dtype=getattr(torch, options.dtype), device=options.device)
    except smollm2.ModelUnavailable as error:
        raise Problem(f"--model {options.model} can't be loaded: {error}") from error
