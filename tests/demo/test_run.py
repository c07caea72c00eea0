"""The whole demo on a tiny random model and a tokenizer of one token a byte."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allmem_ops import AllMemConfig
from allmem_ops.demo.corpus import standard_library
from allmem_ops.demo.run import run
from allmem_ops.demo.settings import Settings
from allmem_ops.demo.stream import stream
from allmem_ops.evaluation.arms import ALLMEM, FULL, NO_WRITES, WINDOW
from allmem_ops.evaluation.scoring import evaluate, teacher_hidden, written_share
from allmem_ops.hf import convert, full_attention, load_memory, memory_mode, memory_parameters

SETTINGS = Settings(
    window=16, sinks=2, chunk_size=8, length=64, steps=6, held_out_rows=2, lr=5e-3, eta_init=0.05, stream_tokens=100, segment=24
)


class Bytes:
    """A tokenizer of one token a byte, folded into 64 ids."""

    eos_token_id = 0

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [b % 64 for b in text.encode()]})

    def convert_tokens_to_ids(self, token):
        return None


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2, max_position_embeddings=80,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    for i in range(60):
        (folder / f"module_{i}.py").write_text("".join(f"value_{i}_{j} = {i * j}\n" for j in range(20)))
    return standard_library(folder)


def test_the_whole_run(library, tmp_path):
    lines = []
    model = make_model()
    report = run(model, Bytes(), library, SETTINGS, tmp_path, say=lines.append)
    assert report.before[WINDOW] == report.before[ALLMEM] and report.before[FULL].kl == 0 and report.before[WINDOW].kl > 0
    assert set(report.after) == {FULL, WINDOW, ALLMEM, NO_WRITES} and report.after[ALLMEM] != report.before[ALLMEM]
    assert report.after[NO_WRITES] != report.after[ALLMEM] and report.share > 0
    assert len(report.steps) == 6 and report.segments[-1].tokens == 100 and len({s.cache_bytes for s in report.segments}) == 1
    assert (tmp_path / "demo.png").stat().st_size > 20_000
    assert (tmp_path / "report.md").read_text().strip() in "\n".join(lines)
    assert json.loads((tmp_path / "memory" / "memory.json").read_text())["config"]["window"] == 16
    fresh = load_memory(make_model(), tmp_path / "memory")
    ids = torch.arange(50)[None]
    assert torch.equal(fresh(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.fixture
def trained():
    torch.manual_seed(1)
    model = convert(make_model(), AllMemConfig(window=16, sinks=2, chunk_size=8, head_dim=16, eta_init=0.1))
    for branch_name, p in memory_parameters(model).items():
        if branch_name.endswith("alpha"):
            p.data.normal_()
    return model


def test_arms_are_what_their_names_say(trained):
    rows = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    scores = evaluate(trained, rows, teacher_hidden(trained, rows), first_position=16, chunk_size=5)
    with torch.no_grad():
        with full_attention(trained):
            teacher = trained(rows, use_cache=False).logits.log_softmax(-1)
        for name, mode in ((WINDOW, "off"), (ALLMEM, "on"), (NO_WRITES, "no_writes"), (FULL, None)):
            with memory_mode(trained, mode) if mode else full_attention(trained):
                logs = trained(rows, use_cache=False).logits.log_softmax(-1)
            kl = (teacher.exp() * (teacher - logs)).sum(-1)[:, 16:-1].mean()
            loss = -logs[:, 16:-1].gather(-1, rows[:, 17:, None]).mean()
            assert scores[name].kl == pytest.approx(kl.item(), abs=1e-5) and scores[name].loss == pytest.approx(loss.item(), rel=1e-5)
    assert len({score.loss for score in scores.values()}) == 4


def test_written_share_counts_the_writes_alone(trained):
    row = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    share = written_share(trained, row, first_position=16)
    assert 0.001 < share < 2
    for branch in (m for m in trained.modules() if type(m).__name__ == "MemoryBranch"):
        assert branch.writes and not branch._forward_pre_hooks
        branch.head_bias.data[: branch.splits[1]] = -30.0
    assert written_share(trained, row, first_position=16) < 1e-4


def test_streamed_losses_equal_one_pass(trained):
    ids = torch.randint(0, 64, (1, 70), generator=torch.Generator().manual_seed(0))
    segments = stream(trained, ids, segment=24)
    with torch.no_grad():
        logits = trained(ids, use_cache=False).logits[0]
    whole = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    assert [s.tokens for s in segments] == [24, 48, 70]
    assert [s.loss for s in segments] == pytest.approx([part.mean().item() for part in whole.split([24, 24, 21])], rel=1e-4)
    assert len({s.cache_bytes for s in segments}) == 1
