"""The demo's steps on a given model, tokenizer and corpus."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from allmem_ops import AllMemConfig
from allmem_ops.cost import MixerShape, cache_bytes
from allmem_ops.demo import report as reporting
from allmem_ops.demo.corpus import Corpus, longest_file, packed_rows, whole_rows
from allmem_ops.demo.settings import Settings
from allmem_ops.demo.stream import Segment, stream
from allmem_ops.evaluation.arms import ALLMEM, FULL, LABELS, NO_WRITES, WINDOW
from allmem_ops.evaluation.scoring import Score, evaluate, teacher_hidden, written_share
from allmem_ops.hf import convert, load_memory, memory_parameters, reconfigure, save_memory
from allmem_ops.training import Step, fine_tune


def run(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    settings: Settings,
    output: Path,
    *,
    say: Callable[[str], None],
    started: float | None = None,
) -> reporting.Report:
    """Convert `model` in place, compare, fine-tune, compare again, stream a long file; write everything to `output`.

    Args:
        model: a loaded Hugging Face causal LM of a supported family, not converted, in evaluation mode.
        tokenizer: its tokenizer.
        corpus: the text.
        settings: the sizes.
        output: an existing directory: receives `report.md`, `demo.png` and `memory/`.
        say: prints one line.
        started: `time.perf_counter()` at the start of the whole run. Default: now.

    Returns:
        The numbers.
    """
    started = time.perf_counter() if started is None else started
    device = model.get_output_embeddings().weight.device
    held_out = whole_rows(corpus, corpus.held_out, tokenizer, length=settings.length, rows=settings.held_out_rows, per_file=1).to(device)
    train = packed_rows(corpus, corpus.train, tokenizer, length=settings.length, rows=settings.steps).to(device)
    base = sum(p.numel() for p in model.parameters())

    say("Convert: windowed attention on the model's own weights, a memory beside it in every layer")
    difference = _convert(model, settings, held_out[:1, : settings.length // 2])
    added = sum(p.numel() for p in memory_parameters(model).values())
    say(f"  alpha = 0 and a window over the whole text: logits differ from the original's by at most {difference:.1e}")
    say(f"  {added / 1e6:.1f} M parameters added to {base / 1e6:.1f} M ({100 * added / base:.1f} %); only they will train")

    say("Teacher: the same weights with full attention, on held-out files")
    with _bar(len(held_out), "teacher") as bar:
        teacher = teacher_hidden(model, held_out, on_pass=bar.update)
    before = _compare(model, held_out, teacher, settings, (FULL, WINDOW, ALLMEM), "Compare on these files, before training", say)

    say(f"Fine-tune: {settings.steps} steps of {settings.length} tokens by forward KL to the same weights with full attention")
    with _bar(settings.steps, "fine-tune") as bar:

        def show(step: Step) -> None:
            bar.set_postfix_str(f"KL {step.kl:.4f}" + (" (skipped)" if step.skipped else ""))
            bar.update()

        model.train()
        result = fine_tune(
            model,
            train.split(1),
            steps=settings.steps,
            lr=settings.lr,
            warmup=min(3, settings.steps // 3),
            decay=settings.steps // 2,
            chunk_size=256,
            on_step=show,
        )
        model.eval()

    title = "Compare on the same files, after training (the frozen model's own two arms stay as they were)"
    after = {name: before[name] for name in (FULL, WINDOW)}
    after |= _compare(model, held_out, teacher, settings, (ALLMEM, NO_WRITES), title, say)
    share = written_share(model, held_out[:1], first_position=settings.window)

    shape = MixerShape.from_config(model.config, reconfigure(model), element_size=model.dtype.itemsize)
    segments = _stream(model, tokenizer, corpus, settings, shape, say)

    memory = save_memory(model, output / "memory")
    _check_saved(model, memory)
    seconds = time.perf_counter() - started
    report = reporting.Report(before, after, share, shape, added, base, result.steps, segments, settings.window, settings.length, seconds)
    (output / "report.md").write_text(reporting.text(report) + "\n", encoding="utf-8")
    image = reporting.picture(report, output / "demo.png")
    say("")
    say(reporting.text(report))
    say("")
    say(f"Saved: {image}, {output / 'report.md'}, {memory} (loaded back with load_memory: equal)")
    return report


@torch.no_grad()
def _convert(model: Any, settings: Settings, ids: torch.Tensor) -> float:
    """Convert in place; the largest difference of a logit at alpha = 0 while the window covers all of `ids`."""
    original = model(ids, use_cache=False).logits
    torch.manual_seed(settings.seed)
    config = AllMemConfig(
        window=ids.shape[1],
        sinks=settings.sinks,
        chunk_size=settings.chunk_size,
        eta_init=settings.eta_init,
        alpha_lr_scale=settings.alpha_lr_scale,
    )
    convert(model, config)
    difference = (model(ids, use_cache=False).logits - original).abs().max().item()
    reconfigure(model, window=settings.window)
    return difference


def _compare(
    model: Any,
    rows: torch.Tensor,
    teacher: torch.Tensor,
    settings: Settings,
    arms: tuple[str, ...],
    title: str,
    say: Callable[[str], None],
) -> dict[str, Score]:
    say(title)
    with _bar(len(rows) * sum(name != FULL for name in arms), "compare") as bar:
        scores = evaluate(model, rows, teacher, first_position=settings.window, arms=arms, on_pass=bar.update)
    for name, score in scores.items():
        say(f"  {LABELS[name]:<19} KL {score.kl:.4f}  perplexity {score.perplexity:.3f}")
    return scores


def _stream(model: Any, tokenizer: Any, corpus: Corpus, settings: Settings, shape: MixerShape, say: Callable[[str], None]) -> list[Segment]:
    file = longest_file(corpus, corpus.held_out)
    ids = torch.tensor([tokenizer(corpus.read(file)).input_ids[: settings.stream_tokens]], device=model.device)
    say(f"Stream: {ids.shape[1]} tokens of {file.as_posix()}, {settings.segment} at a time, through one cache of constant size")
    with _bar(ids.shape[1], "stream") as bar:

        def show(segment: Segment) -> None:
            full = cache_bytes(shape, segment.tokens, "full")
            bar.set_postfix_str(f"cache {segment.cache_bytes / 1e6:.2f} MB, full attention {full / 1e6:.1f} MB")
            bar.update(segment.tokens - bar.n)

        return stream(model, ids, segment=settings.segment, on_segment=show)


@torch.no_grad()
def _check_saved(model: Any, directory: Path) -> None:
    """Wipe the memory, load it back, and compare."""
    parameters = memory_parameters(model)
    trained = {name: p.clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.zero_()
    load_memory(model, directory)
    different = [name for name, p in parameters.items() if not torch.equal(p, trained[name])]
    if different:
        raise RuntimeError(f"the saved memory differs from the trained one in {different[0]}")


def _bar(total: int, title: str) -> tqdm:
    return tqdm(total=total, desc=f"  {title}", dynamic_ncols=True, leave=True)
