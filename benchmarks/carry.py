"""Take a folder to another machine in small files: pack it here, unpack it there.

    python -m benchmarks.carry pack OUT/allmem-seed0 PARTS [--part-mib 15] [--moments bfloat16] [--memory bfloat16]
    python -m benchmarks.carry unpack PARTS OUT/allmem-seed0

A run of 15.8 M parameters: memory 60.4 MiB, AdamW's two moments 120.7 MiB, all float32 and exact. `--moments bfloat16` halves the
moments (a resumed run then differs by their rounding, 0.4 %); `--memory bfloat16` halves the memory: for evaluation, not for going on.
"""

import argparse
import io
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save


def content(path: Path, options: argparse.Namespace) -> bytes:
    cast = (path.name.startswith("optimizer-") and options.moments) or (path.name == "memory.safetensors" and options.memory)
    if not cast:
        return path.read_bytes()
    dtype = getattr(torch, cast)
    return save({name: x.to(dtype) if x.dim() else x for name, x in load_file(path).items()})


def pack(options: argparse.Namespace) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(p for p in options.source.rglob("*") if p.is_file()):
            data = content(path, options)
            entry = tarfile.TarInfo(path.relative_to(options.source).as_posix())
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    options.target.mkdir(parents=True, exist_ok=True)
    size, whole = int(options.part_mib * 2**20), buffer.getvalue()
    for index, start in enumerate(range(0, len(whole), size)):
        (options.target / f"part-{index:03d}").write_bytes(whole[start : start + size])
    print(f"{options.target}: {-(-len(whole) // size)} files, {len(whole) / 2**20:.1f} MiB")


def unpack(options: argparse.Namespace) -> None:
    whole = b"".join(path.read_bytes() for path in sorted(options.source.glob("part-*")))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        archive.extractall(options.target, filter="data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--part-mib", type=float, default=15.0)
    parser.add_argument("--moments", choices=("bfloat16",))
    parser.add_argument("--memory", choices=("bfloat16",))
    options = parser.parse_args()
    (pack if options.action == "pack" else unpack)(options)


if __name__ == "__main__":
    main()
