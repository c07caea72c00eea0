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
for _hid in (16, 32, 64, 128, 256, 512):
    # d up to 16: what the interpreter's tests run, several tiles of everything
    for _dtype in ("bfloat16", "float16", "float32"):
        CHAIN["sm80", (16, _hid, _dtype)] = _chain(16, 16, 4, 1)
        READ["sm80", (16, _hid, _dtype)] = _read(16, 16, 4, 1)
    for _bd in (32, 64, 128):
        for _dtype in ("bfloat16", "float16"):
            CHAIN["sm80", (_bd, _hid, _dtype)] = _chain(min(32, _hid), 64, 4, 2)
            READ["sm80", (_bd, _hid, _dtype)] = _read(64, min(64, _hid), 4, 2)
        CHAIN["sm80", (_bd, _hid, "float32")] = _chain(min(16, _hid), 32, 4, 1)
        READ["sm80", (_bd, _hid, "float32")] = _read(32, min(32, _hid), 4, 1)

    # An H100 has room for one program an SM, as the persistent chain needs, and for three or four tiles of tokens on their way: with two
    # stages Triton asks for a tile where it waits for it (3.3 us a tile at d = 64, of which 1.2 are work; measured and estimated).
    for _bd, _stages in ((32, 4), (64, 4), (128, 3)):
        CHAIN["sm90", (_bd, _hid, "bfloat16")] = _chain(min(32, _hid), 128, 8, _stages)
        CHAIN["sm90", (_bd, _hid, "float16")] = _chain(min(32, _hid), 64, 8, 3)
    for _dtype in ("bfloat16", "float16"):
        for _bd in (32, 64):
            READ["sm90", (_bd, _hid, _dtype)] = _read(64, min(64, _hid), 4, 3)
        READ["sm90", (128, _hid, _dtype)] = _read(128, min(64, _hid), 8, 3)
