"""Pinned configs of the backward kernels of `ttt_mlp`; shape classes as in configs.py."""

from allmem_ops.ops.kernels.configs import Config, Table


def _tile(BT: int, BH: int, warps: int, stages: int) -> list[Config]:
    """BT tokens a tile, BH hidden units at a time."""
    return [Config({"BT": BT, "BH": BH}, warps, stages)]


DQ: Table = {}
DREAD: Table = {}
CHAIN: Table = {}
TOKENS: Table = {}
for _hid in (16, 32, 64, 128, 256, 512):
    # d up to 16: what the interpreter's tests run, several tiles of everything
    for _dtype in ("bfloat16", "float16", "float32"):
        for _table in (DQ, DREAD, CHAIN, TOKENS):
            _table["sm80", (16, _hid, _dtype)] = _tile(16, 16, 4, 1)
    _half, _some = min(32, _hid), min(16, _hid)
    for _bd in (32, 64, 128):
        DQ["sm80", (_bd, _hid, "bfloat16")] = _tile(64, _half, 4, 2)
        DREAD["sm80", (_bd, _hid, "bfloat16")] = _tile(64, _half, 4, 2)
        CHAIN["sm80", (_bd, _hid, "bfloat16")] = _tile(64, _half, 4, 2) if _bd < 128 else _tile(128, _half, 8, 2)
        TOKENS["sm80", (_bd, _hid, "bfloat16")] = _tile(64, _half if _bd < 128 else _some, 4, 2)
        for _dtype in ("float16", "float32"):
            for _table in (DQ, DREAD, CHAIN, TOKENS):
                _table["sm80", (_bd, _hid, _dtype)] = _tile(32, _some, 4, 1)
