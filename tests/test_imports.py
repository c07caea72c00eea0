"""What importing the package does and does not do, in fresh processes; and who may import whom, read from the source."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import allmem_ops

PACKAGE = Path(allmem_ops.__file__).parent

_BLOCK = """
import sys
for name in ("triton", "transformers", "einops"):
    sys.modules[name] = None  # importing it raises
"""


def _fresh(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_triton_nor_transformers_nor_an_operator():
    loaded = _fresh("import allmem_ops, sys; print(*sys.modules)").split()
    assert "allmem_ops" in loaded
    foreign = [m for m in loaded if m.partition(".")[0] in ("triton", "transformers", "torch")]
    assert not foreign
    assert [m for m in loaded if m.startswith("allmem_ops.")] == []


def test_operators_and_layers_work_where_triton_and_transformers_are_missing():
    _fresh(
        _BLOCK
        + """
import torch
from allmem_ops import *
import allmem_ops.cost, allmem_ops.testing
x = torch.randn(1, 9, 2, 8)
assert swa(x, x, x, window=4, sinks=1).shape == x.shape
w = torch.randn(3, 2, 8, 8)
o, state = ttt_mlp(x, x, x, *w.unbind(0), torch.rand(1, 9, 2, 3), torch.rand(1, 9, 2), chunk_size=4, output_final_state=True)
assert o.shape == x.shape
y = gated_fusion(x.flatten(2), o, torch.zeros(16), gate=torch.zeros(1, 9, 2), norm_weight=torch.ones(8))
assert torch.equal(y, x.flatten(2))
h = torch.randn(1, 9, 16)
assert MemoryBranch(16, AllMemConfig(heads=2, head_dim=8, chunk_size=4))(h, h).shape == h.shape
"""
    )


def test_import_adds_little_time_to_torch():
    code = """
import time, torch
start = time.perf_counter(); import allmem_ops
bare = time.perf_counter() - start
for name in allmem_ops.__all__: getattr(allmem_ops, name)
print(bare, time.perf_counter() - start)
"""
    runs = [[float(t) for t in _fresh(code).split()] for _ in range(3)]
    bare, all_names = (min(times) for times in zip(*runs, strict=True))
    assert bare <= 0.3, f"import allmem_ops: {bare:.2f} s after torch"
    assert all_names <= 1.5, f"import of every public name: {all_names:.2f} s after torch"


def test_public_names_are_those_of_the_list_and_exist():
    names = json.loads(_fresh("import allmem_ops, json; print(json.dumps([allmem_ops.__all__, dir(allmem_ops)]))"))
    assert names[0] == sorted(allmem_ops.__all__)
    assert set(names[0]) <= set(names[1])
    for name in allmem_ops.__all__:
        assert getattr(allmem_ops, name).__name__ == name
    operators = {"swa", "swa_step", "WindowCache", "ttt_mlp", "ttt_mlp_step", "MemoryState", "gated_fusion"}
    assert operators | {"MemoryBranch", "AllMemConfig"} <= set(allmem_ops.__all__)


def test_the_type_checkers_imports_are_the_list():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == allmem_ops._HOME


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'allmem_ops' has no attribute 'flash'"):
        _ = allmem_ops.flash
    with pytest.raises(ImportError):
        exec("from allmem_ops import flash")


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def _under(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


# What a part of the package may not import: the parts above it.
_ABOVE = {
    "allmem_ops.ops": [
        "allmem_ops.layers",
        "allmem_ops.hf",
        "allmem_ops.training",
        "allmem_ops.demo",
        "allmem_ops.cost",
        "allmem_ops.inference",
    ],
    "allmem_ops.layers": ["allmem_ops.hf", "allmem_ops.training", "allmem_ops.demo", "allmem_ops.inference"],
    "allmem_ops.cost": ["allmem_ops.layers", "allmem_ops.hf", "allmem_ops.training", "allmem_ops.demo", "allmem_ops.inference"],
    "allmem_ops.training": ["allmem_ops.evaluation", "allmem_ops.demo"],
    "allmem_ops.evaluation": ["allmem_ops.evaluate", "allmem_ops.demo"],
    "allmem_ops.hf": ["allmem_ops.demo", "allmem_ops.inference"],
    "allmem_ops.inference": ["allmem_ops.generate", "allmem_ops.training", "allmem_ops.demo"],
    "allmem_ops.testing": ["allmem_ops.layers", "allmem_ops.hf", "allmem_ops.training", "allmem_ops.demo", "allmem_ops.inference"],
}
# Inside an operator: api -> registration -> chunk and kernels, never back.
_BELOW_API = ["reference", "chunk", "registration", "kernels", "geometry", "layout", "chain", "state", "cache"]


def _violations() -> list[str]:
    bad = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module, imported = _name(path), _imports(path)
        for part, above in _ABOVE.items():
            if _under(module, part):
                bad += [f"{module} imports {m}" for m in imported if _under(m, *above)]
        if module.count(".") >= 3 and _under(module, "allmem_ops.ops"):
            op, own = module.split(".")[2:4]
            home = f"allmem_ops.ops.{op}"
            if own in _BELOW_API:
                bad += [f"{module} imports {m}" for m in imported if _under(m, f"{home}.api")]
            if own in ("reference", "chunk", "kernels", "geometry"):
                bad += [f"{module} imports {m}" for m in imported if _under(m, f"{home}.registration")]
            others = {p.name for p in (PACKAGE / "ops").iterdir() if p.is_dir() and p.name not in (op, "kernels", "__pycache__")}
            bad += [f"{module} imports {m}" for m in imported if _under(m, *(f"allmem_ops.ops.{o}" for o in others))]
        if not _under(module, "allmem_ops.hf", "allmem_ops.demo", "allmem_ops.evaluate", "allmem_ops.generate"):
            bad += [f"{module} imports {m}" for m in imported if _under(m, "transformers")]
        runs_kernels = any(part == "kernels" or part.startswith("launch") for part in module.split("."))
        if not runs_kernels and module != "allmem_ops.testing.aot":
            bad += [f"{module} imports {m}" for m in imported if _under(m, "triton")]
    return bad


def test_imports_go_down_only():
    assert _violations() == []


def test_layers_use_operators_through_their_public_files_only():
    operators = {p.name for p in (PACKAGE / "ops").iterdir() if p.is_dir()}
    for path in sorted((PACKAGE / "layers").glob("*.py")) + sorted((PACKAGE / "hf").glob("*.py")):
        for module in _imports(path):
            parts = module.split(".")
            if parts[:2] == ["allmem_ops", "ops"] and len(parts) > 3 and parts[2] in operators:
                # What joins operators into one node of autograd launches their kernels itself.
                inner = ("launch", "launch_bwd", "reference", "slots") if path == PACKAGE / "layers" / "branch.py" else ()
                assert parts[3] in ("api", "state", "cache", "geometry", *inner), f"{_name(path)} imports {module}"


def test_the_layering_check_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, line in {
        "ops/swa/chunk.py": "from allmem_ops.ops.swa.api import swa",
        "ops/fusion/reference.py": "def f():\n    import allmem_ops.layers.memory",
        "layers/memory.py": "from allmem_ops import hf",
        "cost.py": "from transformers import AutoConfig",
    }.items():
        file = tmp_path / "allmem_ops" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "allmem_ops")
    assert len({v.split(" imports ")[0] for v in _violations()}) == 4
