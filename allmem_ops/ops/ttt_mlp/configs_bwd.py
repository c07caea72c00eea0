"""Pinned configs of the backward kernels of `ttt_mlp`; shape classes as in configs.py."""

from allmem_ops.ops.kernels.configs import Config, Table


def _tile(BT: int, BH: int, warps: int, stages: int) -> list[Config]:
    """BT tokens a tile, BH hidden units at a time."""
    return [Config({"BT": BT, "BH": BH}, warps, stages)]


def _chain(BT: int, BH: int, warps: int, stages: int, resident: int) -> list[Config]:
    """RESIDENT: programs that an SM holds at a time, by their registers and shared memory; the persistent form counts on it."""
    return [Config({"BT": BT, "BH": BH, "RESIDENT": resident}, warps, stages)]


DQ: Table = {}
DREAD: Table = {}
CHAIN: Table = {}
TOKENS: Table = {}
for _hid in (16, 32, 64, 128, 256, 512):
    # d up to 16: what the interpreter's tests run, several tiles of everything
    for _dtype in ("bfloat16", "float16", "float32"):
        CHAIN["sm80", (16, _hid, _dtype)] = _chain(16, 16, 4, 1, 1)
        for _table in (DQ, DREAD, TOKENS):
            _table["sm80", (16, _hid, _dtype)] = _tile(16, 16, 4, 1)
    _half, _some = min(32, _hid), min(16, _hid)
    for _bd in (32, 64, 128):
        DQ["sm80", (_bd, _hid, "bfloat16")] = _tile(64, _half, 4, 2)
        DREAD["sm80", (_bd, _hid, "bfloat16")] = _tile(64, _half, 4, 2)
        # d = 128: with 4 warps 200 bytes of spills in the token loop, with 8 none
        CHAIN["sm80", (_bd, _hid, "bfloat16")] = _chain(64, _half, 4, 2, 2) if _bd < 128 else _chain(128, _half, 8, 2, 1)
        TOKENS["sm80", (_bd, _hid, "bfloat16")] = _tile(64, _half if _bd < 128 else _some, 4, 2)
        for _dtype in ("float16", "float32"):
            CHAIN["sm80", (_bd, _hid, _dtype)] = _chain(32, _some, 4, 1, 1)
            for _table in (DQ, DREAD, TOKENS):
                _table["sm80", (_bd, _hid, _dtype)] = _tile(32, _some, 4, 1)
