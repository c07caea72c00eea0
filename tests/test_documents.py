"""What the documents show runs: README's code blocks and the examples; README and the tree agree."""

import re
import runpy
from pathlib import Path

import pytest
import torch
import transformers

from tests.hf.tiny import tiny_model, tokens

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


class _Tokenizer:
    def __call__(self, text, return_tensors):
        return type("Encoding", (), {"input_ids": tokens(1, len(text.split()))})


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[0][:40])
def test_readme_blocks_run(block, monkeypatch, tmp_path):
    """The model comes from a tiny random one: the hub is not reached."""
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: tiny_model("qwen3"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: _Tokenizer())
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    if "y" in names:
        assert torch.equal(names["y"], names["attn"].flatten(2))
    else:
        assert names["out"].shape[1] == names["ids"].shape[1] + 20
        assert sorted(p.name for p in (tmp_path / "memory").iterdir()) == ["memory.json", "memory.safetensors"]
        assert torch.isfinite(names["teacher"]).all()


def test_there_are_two_readme_blocks():
    assert len(BLOCKS) == 2
    assert all(len([line for line in block.splitlines() if line]) <= 15 for block in BLOCKS)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    found = re.search(r"max difference ([\d.e+-]+)", capsys.readouterr().out)
    assert float(found.group(1)) < 1e-4


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target
