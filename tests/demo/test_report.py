"""The report from fixed numbers: every figure stands where it belongs."""

import pytest

from allmem_ops.cost import MixerShape, cache_bytes, decode_flops
from allmem_ops.demo.report import Report, cost_table, picture, quality_table, text, verdict
from allmem_ops.demo.stream import Segment
from allmem_ops.evaluation.arms import ALLMEM, FULL, NO_WRITES, WINDOW
from allmem_ops.evaluation.scoring import Score
from allmem_ops.evaluation.table import table
from allmem_ops.training import Step

SHAPE = MixerShape(
    d_model=576, n_heads=9, n_kv_heads=3, head_dim=64, layers=30, window=128, sinks=4, chunk_size=64,
    memory_heads=3, memory_dim=64, memory_hidden=128, element_size=4,
)  # fmt: skip


@pytest.fixture
def report():
    before = {FULL: Score(0.0, 2.0), WINDOW: Score(0.5, 2.5), ALLMEM: Score(0.5, 2.5)}
    after = {FULL: Score(0.0, 2.0), WINDOW: Score(0.5, 2.5), ALLMEM: Score(0.3, 2.25), NO_WRITES: Score(0.35, 2.3)}
    steps = [Step(i, 0.5 - 0.1 * i, 1e-3, 1.0, 1024, 0.1, skipped=i == 2) for i in range(3)]
    segments = [Segment(512, 7_000_000, 2.0), Segment(1024, 7_000_000, 1.9)]
    return Report(before, after, 0.0123, SHAPE, 15_800_000, 134_500_000, steps, segments, 128, 1024, 234.0)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_quality_table(report):
    lines = quality_table(report).splitlines()
    assert cells(lines[2]) == ["full attention", "0.0000", "0.0000", "7.389", "7.389", "0"]
    assert cells(lines[4]) == ["AllMem", "0.5000", "0.3000", "12.182", "9.488", "15.8 M (11.7 %)"]
    assert cells(lines[5]) == ["AllMem, writes off", "-", "0.3500", "-", "9.974", "15.8 M (11.7 %)"]


def test_verdict_splits_the_gain(report):
    gain, writes, share, skipped = verdict(report)
    assert gain.startswith("AllMem takes away 40.0 % of the KL") and "3 steps" in gain and "3072 tokens" in gain
    assert writes.startswith("Of that gain 25.0 % goes when the writes are switched off")
    assert "1.23 %" in share and skipped.startswith("1 steps were skipped")


def test_verdict_admits_that_there_is_no_gain(report):
    report.after[ALLMEM] = Score(0.6, 2.6)
    assert verdict(report)[0].startswith("AllMem's KL is not below the window's")


def test_cost_table_holds_the_cost_models_numbers():
    lines = cost_table(SHAPE).splitlines()
    assert cells(lines[0])[1:] == [f"{what} at {n}" for what in ("cache", "FLOPs/token") for n in ("8k", "32k", "128k")]
    full, window, allmem = (cells(line)[1:] for line in lines[2:])
    assert full[0] == f"{cache_bytes(SHAPE, 8192, 'full') / 1e6:.1f} MB" and full[5] == f"{decode_flops(SHAPE, 131072, 'full') / 1e6:.0f} M"
    assert allmem[0] == allmem[2] and window[0] == window[2] and full[0] != full[2]
    assert allmem[3] == f"{decode_flops(SHAPE, 8192, 'allmem') / 1e6:.0f} M"


def test_table_is_aligned():
    lines = table(["", "x"], [["long name", "1"], ["s", "1000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_whole_report_and_picture(report, tmp_path):
    words = text(report)
    assert quality_table(report) in words and cost_table(SHAPE) in words and "Streamed 1024 tokens: cache 7.00 MB" in words
    assert "Loss by quarter: 2.00, 1.90 nats" in words
    image = picture(report, tmp_path / "demo.png")
    assert image.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and image.stat().st_size > 20_000
