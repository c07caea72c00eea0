"""The table of what one token mixer launches, from committed results: each kernel's time beside the least bytes it has to move.

python -m benchmarks.gpu.layer_table benchmarks/results/h100                          # prints Markdown
python -m benchmarks.gpu.layer_table benchmarks/results/h100 --write docs/kernels.md  # replaces the text between the two markers there
"""

import json
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.report import command

BEGIN, END = "<!-- layer: begin (python -m benchmarks.gpu.layer_table) -->", "<!-- layer: end -->"
SMALL_US = 8.0
# Of Qwen3-0.6B's mixer: d_model, channels of all query and of all key heads, of the memory's heads, columns of its projection.
M, Q, K, W, P = 1024, 16 * 128, 8 * 128, 512, 3 * 512 + 5 * 8
QKV, HQ, H, STATE = Q + 2 * K, 16, 8, 12 * 128 * 64 * 8 // 2048


class Step(NamedTuple):
    """A launch of more than 8 us: what it is, a part of its kernel's name, its least bytes a token, and FLOPs a token of a product."""

    what: str
    kernel: str
    moved: int
    flops: int = 0


def product(what: str, inputs: int, outputs: int, kernel: str = "nvjet", also: int = 0) -> Step:
    return Step(f"product: {what}", kernel, 2 * (inputs + outputs) + also, 2 * inputs * outputs)


FORWARD = (
    Step("RMSNorm of x", "layer_norm", 4 * M),
    product("q, k, v", M, QKV),
    Step("`rotary`", "rotary_fwd", 4 * (Q + K) + 512),
    Step("`swa`", "swa_fwd", 4 * Q + 4 * K + 4 * HQ),
    product("attention's output", Q, M),
    product("everything linear of the memory", M, P),
    Step("`memory_input`", "memory_input_fwd", 2 * P + 6 * W + 18 * H),
    Step("`ttt_mlp`: chain", "ttt_mlp_fwd", 4 * W + 16 * H + STATE),
    Step("`ttt_mlp`: read", "ttt_mlp_fwd_read", 4 * W + STATE),
    Step("`gated_fusion` of the readout", "gated_fusion_fwd", 4 * W + 2 * H),
)
FOLDED = (product("memory's output, times alpha, added", W, M, also=2 * M),)
BACKWARD = (
    product("memory's output", W, M),
    Step("`gated_fusion`: alpha and addition", "gated_fusion_fwd", 6 * M),
    Step("`gated_fusion` backward: alpha", "gated_fusion_bwd", 6 * M),
    product("gradient of the readout", M, W),
    product("gradient of the memory's output weight", W, M, "NTT"),
    Step("`gated_fusion` backward: readout", "gated_fusion_bwd", 6 * W + 4 * H),
    Step("`ttt_mlp` backward: weights' operands", "ttt_mlp_bwd_pack", 2 * STATE),
    Step("`ttt_mlp` backward: reads' weights", "ttt_mlp_bwd_dread", 4 * W + STATE),
    Step("`ttt_mlp` backward: dq", "ttt_mlp_bwd_dq", 6 * W + STATE),
    Step("`ttt_mlp` backward: chain", "ttt_mlp_bwd", 4 * W + 12 * H + 2 * STATE),
    Step("`ttt_mlp` backward: dk, dv, rates", "ttt_mlp_bwd_last", 8 * W + 28 * H),
    Step("`memory_input` backward", "memory_input_bwd", 4 * P + 6 * W + 18 * H),
    product("gradient of the memory's input", P, M),
    product("gradient of its projection's weight", M, P, "NTT"),
    product("gradient of attention's output weight", Q, M, "NTT"),
    product("gradient of attention's output", M, Q),
    Step("`swa` backward: rows", "swa_bwd_rows", 4 * Q + 16 * HQ),
    Step("`swa` backward", "swa_bwd_hopper", 8 * Q + 8 * K),
    Step("`swa` backward: dq rounded", "swa_bwd_out", 6 * Q),
    Step("`rotary` backward", "rotary_bwd", 2 * (Q + 2 * K) + 2 * (Q + K) + 2 * QKV + 512),
    product("gradient of q, k, v's weight", M, QKV, "NTT"),
    product("gradient of the normed x", QKV, M),
    Step("the two gradients of the normed x, added", "add", 6 * M),
    Step("RMSNorm backward: x", "layer_norm_grad", 6 * M),
    Step("RMSNorm backward: weight", "GammaBeta", 4 * M),
)


def rows(kernels: list[dict], steps: tuple[Step, ...]) -> tuple[list[tuple[Step, float]], float]:
    """Each step with its kernel's microseconds, in the order in which they run; and what the small ones take together."""
    found, small, expected = [], 0.0, iter(steps)
    for k in kernels:
        if k["us"] < SMALL_US or "splitKreduce" in k["kernel"]:
            small += k["us"]
            continue
        step = next(expected, None)
        if step is None or step.kernel not in k["kernel"]:
            raise ValueError(f"{k['kernel'][:60]} runs where {step and step.what} was expected")
        found.append((step, k["us"]))
    if (left := next(expected, None)) is not None:
        raise ValueError(f"no kernel runs for {left.what}")
    return found, small


def table(found: dict) -> str:
    """Forward without gradients, then what forward and backward launch after the forward's common part."""
    flops, copy, tokens = found["ceilings"]["flops"], found["ceilings"]["bytes"], found["tokens"]
    about = found["environment"]
    card = f"{about['device']}, PyTorch {about['torch']}; ceilings {flops / 1e12:.0f} TFLOP/s and {copy / 1e12:.2f} TB/s"
    text = [f"T = {tokens}, commit {about['commit']}: {card}."]
    for name, steps, skipped in (
        ("forward", FORWARD + FOLDED, 0),
        ("forward and backward", FORWARD + BACKWARD, len(FORWARD)),
    ):
        timed, small = rows(found[name], steps)
        head = "with gradients, after the readout" if skipped else name
        text += ["", f"| {head} | bytes a token, least | us | share of the ceiling |", "|---|---|---|---|"]
        for step, us in timed[skipped:]:
            share = f"{100 * step.moved * tokens / us * 1e6 / copy:.0f} % of copy"
            if step.flops:
                share = f"{100 * step.flops * tokens / us * 1e6 / flops:.0f} % of products; {share}"
            text.append(f"| {step.what} | {step.moved} | {us:.0f} | {share} |")
        total, least = sum(k["us"] for k in found[name]), sum(step.moved for step, _ in timed)
        whole = f"all of {name}, {small:.0f} us of it in kernels below {SMALL_US:.0f} us and sums of split products"
        text.append(f"| {whole} | {least} | {total:.0f} | {100 * least * tokens / total * 1e6 / copy:.0f} % of copy |")
    kept = {name: value for name, value in found.items() if name.startswith("kept")}
    text += ["", "; ".join(f"{name}: {value:.0f}" for name, value in kept.items()) + "."]
    return "\n".join(text)


def report(folder: Path) -> str:
    return table(json.loads((folder / "layer_kernels.json").read_text()))


if __name__ == "__main__":
    command(__doc__, report, BEGIN, END)
