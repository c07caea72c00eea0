"""Pinned configs of the backward kernels of `ttt_mlp`; shape classes as in configs.py.

A loop whose tiles come from memory needs num_stages=3: with 2 Triton 3.6 puts the next tile's load at the end of the body and the wait
for it at its top, and nothing overlaps. Where three stages do not fit into shared memory, AHEAD brings the next tile into the L2 cache.
"""

from allmem_ops.ops.kernels.configs import Config, Table


def _tile(BT: int, BH: int, warps: int, stages: int, registers: int | None = None, **more: int) -> list[Config]:
    """BT tokens a tile, BH hidden units at a time."""
    return [Config({"BT": BT, "BH": BH, **more}, warps, stages, registers)]


DQ: Table = {}
DREAD: Table = {}
CHAIN: Table = {}  # RESIDENT: programs that an SM holds at a time, by their registers and shared memory; the persistent form counts on it
LAST: Table = {}
# Chains whose programs take all of a chunk's tokens: only where it was measured to be faster.
OWNED: Table = {("sm90", (64, 128, "bfloat16")): _tile(256, 8, 8, 3)}
for _hid in (16, 32, 64, 128, 256, 512):
    _half, _some = min(32, _hid), min(16, _hid)
    for _bd in (16, 32, 64, 128):
        for _dtype in ("bfloat16", "float16", "float32"):
            _class = _bd, _hid, _dtype
            # d up to 16: what the interpreter's tests run, several tiles of everything
            BT, BH, stages = (16, 16, 1) if _bd == 16 else (64, _half, 2) if _dtype == "bfloat16" else (32, _some, 1)
            DQ["sm80", _class] = _tile(BT, BH, 4, stages)
            DREAD["sm80", _class] = _tile(BT, BH, 4, stages, AHEAD=0)
            CHAIN["sm80", _class] = _tile(BT, BH, 4, stages, AHEAD=0, RESIDENT=1)
            LAST["sm80", _class] = _tile(BT, BH if _bd < 128 else _some, 4, stages)
    for _bd in (32, 64):
        _class = _bd, _hid, "bfloat16"
        # limits on registers that cost no spills: four programs an SM instead of three, and three instead of two
        DQ["sm90", _class] = _tile(64, _half, 4, 3, 128)
        DREAD["sm90", _class] = _tile(64, _half, 4, 3, 168, AHEAD=0)
        CHAIN["sm90", _class] = _tile(64, _half, 4, 3, AHEAD=0, RESIDENT=2)
        LAST["sm90", _class] = _tile(64, _half, 4, 3)
    _class = 128, _hid, "bfloat16"
    DQ["sm90", _class] = _tile(64, _half, 4, 3)
    DREAD["sm90", _class] = _tile(64, _half, 4, 2, AHEAD=1)
    # with 4 warps 200 bytes of spills in the token loop, with 8 none
    CHAIN["sm90", _class] = _tile(128, _half, 8, 2, AHEAD=1, RESIDENT=1)
    LAST["sm90", _class] = _tile(64, _some, 4, 3)
    # There Triton cannot pipeline a loop with a prefetch in it, and 128 tokens of the chain take 272 of the 227 KB of shared memory.
    DREAD["sm100", _class] = _tile(64, _half, 4, 2, AHEAD=0)
    CHAIN["sm100", _class] = _tile(64, _half, 4, 2, AHEAD=0, RESIDENT=1)
