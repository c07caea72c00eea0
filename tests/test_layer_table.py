"""The table of what a layer launches: each kernel finds its line, and one that is not expected is not passed over."""

from pathlib import Path

import pytest

from benchmarks.gpu.layer_table import BACKWARD, FOLDED, FORWARD, SMALL_US, report, rows, table

ROOT = Path(__file__).parents[1]


def kernels(steps: tuple, us: float = 20.0) -> list[dict]:
    """As a profile lists them, with small ones between."""
    small = {"kernel": "memset", "us": SMALL_US - 1}
    return [k for step in steps for k in (small, {"kernel": f"a_{step.kernel}_kernel", "us": us})]


def test_every_kernel_has_its_line():
    found, small = rows(kernels(FORWARD + BACKWARD), FORWARD + BACKWARD)
    assert [step for step, _ in found] == [*FORWARD, *BACKWARD]
    assert small == len(found) * (SMALL_US - 1)


@pytest.mark.parametrize(
    "wrong",
    [kernels(FORWARD[1:]), kernels(FORWARD[:-1]), [*kernels(FORWARD), {"kernel": "copy", "us": 9.0}]],
    ids=["first", "last", "more"],
)
def test_what_is_not_expected_is_an_error(wrong: list[dict]):
    with pytest.raises(ValueError, match=r"expected|no kernel"):
        rows(wrong, FORWARD)


def test_shares_are_of_the_cards_ceilings():
    about = {"commit": "c", "device": "d", "torch": "t"}
    found = {"ceilings": {"flops": 1e12, "bytes": 1e12}, "tokens": 1000, "environment": about, "kept, bytes a token": 7.0}
    found |= {"forward": kernels(FORWARD + FOLDED), "forward and backward": kernels(FORWARD + BACKWARD)}
    text = table(found)
    assert "| RMSNorm of x | 4096 | 20 | 20 % of copy |" in text  # 4096 bytes of 1000 tokens in 20 us: 0.2 TB/s
    assert text.endswith("kept, bytes a token: 7.")
    assert text.count("\n| product: ") == 4 + 9


def test_the_document_shows_the_committed_results():
    assert report(ROOT / "benchmarks" / "results" / "h100") in (ROOT / "docs" / "kernels.md").read_text()
