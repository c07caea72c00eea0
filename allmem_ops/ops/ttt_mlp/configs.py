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

    for _bd in (32, 64, 128):
        # d = 64, h = 128 on an H100: one program an SM, as the persistent chain needs
        CHAIN["sm90", (_bd, _hid, "bfloat16")] = _chain(min(32, _hid), 128, 8, 2)
        CHAIN["sm90", (_bd, _hid, "float16")] = _chain(min(32, _hid), 64, 8, 2)
