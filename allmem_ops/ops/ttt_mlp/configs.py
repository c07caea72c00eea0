"""Pinned configs of the kernels of `ttt_mlp`.

A shape class is (BD, HID, dtype of q): BD is d padded to a power of two; HID is h padded to a power of two.
"""

from allmem_ops.ops.kernels.configs import Config, Table


def _chain(HS: int, BT: int, warps: int, stages: int) -> list[Config]:
    """HS hidden units a program; BT tokens a tile."""
    return [Config({"HS": HS, "BT": BT}, warps, stages)]


def _read(BT: int, BH: int, warps: int, stages: int) -> list[Config]:
    """BT tokens a tile, BH hidden units at a time."""
    return [Config({"BT": BT, "BH": BH}, warps, stages)]


CHAIN: Table = {}
READ: Table = {}
# Chains whose programs take all of a chunk's tokens: only where it was measured to be faster.
OWNED: Table = {("sm90", (64, 128, "bfloat16")): _chain(8, 256, 8, 3)}
for _hid in (16, 32, 64, 128, 256, 512):
    _hs, _bh = min(32, _hid), min(64, _hid)
    # d up to 16: what the interpreter's tests run, several tiles of everything
    for _dtype in ("bfloat16", "float16", "float32"):
        CHAIN["sm80", (16, _hid, _dtype)] = _chain(16, 16, 4, 1)
        READ["sm80", (16, _hid, _dtype)] = _read(16, 16, 4, 1)
    # A persistent chain has one program an SM, so tiles of tokens have to be on their way while it works: with two stages Triton asks for
    # a tile where it waits for it. On an H100 at d = 64 that took 3.3 us a tile of 128 tokens (measured), of which about 1.2 are work.
    for _bd in (32, 64, 128):
        for _dtype in ("bfloat16", "float16"):
            CHAIN["sm80", (_bd, _hid, _dtype)] = _chain(_hs, 64, 8, 3)
            CHAIN["sm90", (_bd, _hid, _dtype)] = _chain(_hs, 64, 8, 3)
            # float16: the pipeliner of Triton 3.6 stops at an assertion with more than one stage
            CHAIN["sm100", (_bd, _hid, _dtype)] = _chain(_hs, 64, 8, 1 if _dtype == "float16" else 2 if _bd == 128 else 3)
            READ["sm80", (_bd, _hid, _dtype)] = _read(64, _bh, 4, 2)
            READ["sm90", (_bd, _hid, _dtype)] = _read(128, _bh, 8, 3) if _bd == 128 else _read(64, _bh, 4, 3)
            READ["sm100", (_bd, _hid, _dtype)] = _read(64, _bh, 4, 2)
        CHAIN["sm90", (_bd, _hid, "bfloat16")] = _chain(_hs, 128, 8, 3 if _bd == 128 else 4)
        # FMA on registers: small tiles do not spill
        CHAIN["sm80", (_bd, _hid, "float32")] = _chain(min(16, _hid), 32, 4, 1)
        READ["sm80", (_bd, _hid, "float32")] = _read(16, 16, 8, 1) if _bd == 128 else _read(32, 16, 4, 1)
