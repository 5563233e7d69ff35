"""Memory against time: what each kind of checkpointing stores of one model, and how long a step takes with it.

    python examples/benchmarks/frontier.py --output examples/benchmarks/frontier.md

Everything this package offers beside what transformers offers, in one run: each round is a step of every variant, and a
time is compared with that of plain training in the same round. A step is forward and backward, without the optimizer.
Bytes and FLOPs are counted, each in a step of its own. Ends with an error if a loss or a gradient is not that of plain
training, bit for bit; what the times should be is printed, since they depend on the machine.

The model is made from scratch, from a configuration of transformers:

    python examples/benchmarks/frontier.py --model Qwen3 --layers 4 --hidden 256 --tokens 128 --config head_dim=32
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from ckpt_trainer.engine import Checkpointing
from ckpt_trainer.flops import FlopCounter
from ckpt_trainer.memory import LiveBytes, current_bytes, peak_bytes, reset_peak
from ckpt_trainer.plan import TIERS
from ckpt_trainer.training_args import settings_of_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import (
    MIB,
    Batch,
    circumstances,
    digest_gradients,
    make_repeatable,
    markdown_table,
    seconds_of,
    time_in_turns,
)
from models import add_options, build

# What the tier `expensive` must keep to: bytes stored and time, over those of plain training.
MAX_STORED, MAX_TIME = 0.62, 1.03
SCRIPT = "examples/benchmarks/frontier.py"

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Variant:
    """One way to run a step.

    Args:
        name: For the table.
        side: Whose it is: `plain`, `ours`, `HF` or `torch`.
        step: Around forward and backward, and timed with them.
        setting: Around that, not timed: what is turned on once for a whole training.
    """

    name: str
    side: str
    step: Context = nullcontext
    setting: Context = nullcontext


@dataclass
class Point:
    """What was measured of one variant, against plain training.

    Args:
        stored: Bytes that the end of forward leaves for backward.
        peak: Most bytes at once in a step: activations, gradients and temporaries.
        recomputed: FLOPs beyond those of plain training / FLOPs of a forward.
        is_exact: Loss and gradients are those of plain training, bit for bit.
        seconds: Of its steps, one per round.
        ratios: Of these to those of plain training in the same round.
    """

    name: str
    side: str
    stored: int
    peak: int
    recomputed: float
    is_exact: bool
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def time(self) -> float:
        return median(self.ratios)


def all_variants(model: nn.Module) -> list[Variant]:
    """Plain training first, twice, so that its difference from itself tells how much the others' mean."""
    return [
        Variant("plain", "plain"),
        Variant("plain, again", "plain"),
        *(ours(model, tier, mode="selective", save=tier) for tier in TIERS),
        ours(model, "full", mode="full"),
        ours(model, "full, segment=sqrt", mode="full", segment="sqrt"),
        ours(model, "full, every_n=2", mode="full", every_n=2),
        *hf_variants(model, (2, 3, 4)),
    ]


def ours(model: nn.Module, name: str, **flags: Any) -> Variant:
    """A variant of this package; `flags` as those of `checkpointing`."""
    # Not `checkpointing` itself, which begins anew each time it is entered. This is what the trainer holds.
    state = Checkpointing(model, settings_of_flags(flags), log_from=logging.CRITICAL + 1)
    return Variant(name, "ours", step=state.step)


def hf_variants(model: nn.Module, numbers: Sequence[int]) -> list[Variant]:
    """Those of transformers: every layer, and every n-th where it has that."""
    variants = [Variant("HF full", "HF", setting=partial(hf_enabled, model))]
    if "every_n_layers" in inspect.signature(_hf_switch(model, "enable")).parameters:
        settings = ((n, partial(hf_enabled, model, every_n_layers=n)) for n in numbers)
        variants += [Variant(f"HF every_n_layers={n}", "HF", setting=setting) for n, setting in settings]
    return variants


def torch_variant(model: nn.Module) -> Variant:
    """torch's own selection of ops, with matmuls and attention stored, the way transformers can be told to use it."""
    names = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    ops = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    ops += [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]
    select = partial(create_selective_checkpoint_contexts, ops)
    return Variant("torch, mm and sdpa", "torch", setting=partial(hf_enabled, model, {"context_fn": select}))


@contextmanager
def hf_enabled(model: Any, options: Mapping[str, Any] | None = None, **flags: Any) -> Iterator[None]:
    """The checkpointing of transformers; `options` for torch's checkpoint."""
    _hf_switch(model, "enable")({"use_reentrant": False, **(options or {})}, **flags)
    try:
        yield
    finally:
        _hf_switch(model, "disable")()
        if hasattr(model, "_require_grads_hook"):
            model.disable_input_require_grads()


def _hf_switch(model: Any, what: str) -> Callable[..., None]:
    # transformers 5 renamed them.
    new: Callable[..., None] | None = getattr(model, f"activation_checkpointing_{what}", None)
    return new or getattr(model, f"gradient_checkpointing_{what}")


def measure(model: nn.Module, batch: Batch, variants: Sequence[Variant], rounds: int) -> list[Point]:
    """Count what the variants need, then time them; the first is what the others are compared with."""
    points: list[Point] = []
    for number, variant in enumerate(variants, 1):
        print(f"\r  counting {number} of {len(variants)}: {variant.name:24}", end="", flush=True)
        run = partial(_run, model, batch, variant)
        run()  # what is learned in a first step is used from the second on
        torch.manual_seed(0)  # for dropout
        digest = run(), digest_gradients(model)
        stored, peak, flops, forward = _count(model, run)
        if not points:
            plain_digest, plain_flops, plain_forward = digest, flops, forward
        recomputed = (flops - plain_flops) / plain_forward
        points.append(Point(variant.name, variant.side, stored, peak, recomputed, digest == plain_digest))
    print()
    seconds = time_in_turns([partial(_seconds, model, batch, variant) for variant in variants], rounds, num_warmup=0)
    for point, own in zip(points, seconds):
        point.seconds = own
        point.ratios = [mine / plain for mine, plain in zip(own, seconds[0])]
    return points


def _run(model: nn.Module, batch: Batch, variant: Variant, after_forward: Callable[[], Any] | None = None) -> float:
    """One step from no gradients; `after_forward` sees the loss and nothing else of the forward alive."""
    model.zero_grad()
    with variant.setting(), variant.step():
        loss = model(**batch)["loss"]
        if after_forward is not None:
            after_forward()
        loss.backward()
    return float(loss.detach())


def _seconds(model: nn.Module, batch: Batch, variant: Variant) -> float:
    model.zero_grad()
    with variant.setting():
        return seconds_of(partial(_step, model, batch, variant))


def _step(model: nn.Module, batch: Batch, variant: Variant) -> None:
    with variant.step():
        model(**batch)["loss"].backward()


def _count(model: nn.Module, run: Callable[..., float]) -> tuple[int, int, int, int]:
    """Bytes at the end of forward and at most, beyond what was there; FLOPs of the step and of its forward.

    Bytes are those of the allocator; where it counts nothing (a CPU), every op is followed.
    """
    model.zero_grad()
    device = next(model.parameters()).device
    before, found = current_bytes(device), []
    reset_peak(device)
    with LiveBytes() if before is None else nullcontext() as live, FlopCounter() as counter:
        run(lambda: found.append((live.current if live else (current_bytes(device) or 0) - before, counter.total)))
    (stored, forward), *_ = found
    return stored, live.peak if live else (peak_bytes(device) or 0) - before, counter.total, forward


def dominated(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Our points beside those of others that need no more bytes and no more time, and less of one of them."""
    mine_and_theirs = ((mine, other) for mine in points if mine.side == "ours" for other in points if _is_theirs(other))
    return [(mine, other) for mine, other in mine_and_theirs if _is_better(other, mine)]


def _is_better(a: Point, b: Point) -> bool:
    return a.stored <= b.stored and a.time <= b.time and (a.stored, a.time) != (b.stored, b.time)


def slower_in_most_rounds(mine: Point, other: Point) -> bool:
    """Whether a point was the slower one in at least three of four rounds, which noise hardly does."""
    return sum(a > b for a, b in zip(mine.seconds, other.seconds)) >= 0.75 * len(mine.seconds)


def time_on_line(points: Sequence[Point], stored: int) -> float | None:
    """The time that mixing plain training and the points of HF takes at this many bytes; None where they need more."""
    line = sorted({(point.stored, point.time) for point in points if _is_theirs(point)})
    for (left, start), (right, end) in pairwise(line):
        if left <= stored <= right and left < right:
            return start + (end - start) * (stored - left) / (right - left)
    return line[-1][1] if stored > line[-1][0] else None


def _is_theirs(point: Point) -> bool:
    return point.side == "HF" or point.name == "plain"


def claims(points: Sequence[Point]) -> dict[str, bool]:
    """What is claimed of the points -> whether it holds."""
    by_name = {point.name: point for point in points}
    first = by_name[TIERS[0]]
    stored = first.stored / points[0].stored
    found = {
        "losses and gradients of all are those of plain training": all(point.is_exact for point in points),
        f"expensive stores {stored:.3f} of plain, at most {MAX_STORED}": stored <= MAX_STORED,
        f"expensive takes {first.time:.3f} of the time, at most {MAX_TIME}": first.time <= MAX_TIME,
    }
    for tier in TIERS:
        line = time_on_line(points, by_name[tier].stored)
        known = f"HF's line is at {line:.3f}" if line is not None else "no point of HF stores as little"
        found[f"{tier} takes {by_name[tier].time:.3f}: {known}"] = line is None or by_name[tier].time <= line
    for mine, other in (pairs := dominated(points)):
        gap = median(b / a - 1 for a, b in zip(mine.seconds, other.seconds))
        sure = slower_in_most_rounds(mine, other)
        how = f"{100 * gap:+.1f} % time, {(other.stored - mine.stored) / MIB:+.2f} MiB"
        found[f"{other.name} does not dominate {mine.name} ({how}{'' if sure else ', within noise'})"] = not sure
    return found if pairs else {**found, "no point of HF dominates one of ours": True}


def points_table(points: Sequence[Point]) -> str:
    """The points as a markdown table."""
    header = ("variant", "stored MiB", "of plain", "peak MiB", "of plain", "recomputed", "time", "quartiles", "exact")
    rows = []
    for point in points:
        low, middle, high = quantiles(point.ratios, n=4)
        bytes_ = [(n, n / whole) for n, whole in ((point.stored, points[0].stored), (point.peak, points[0].peak))]
        cells = [cell for n, share in bytes_ for cell in (f"{n / MIB:.1f}", f"{share:.3f}")]
        times = (f"{middle:.3f}", f"{low:.3f} - {high:.3f}")
        rows.append((point.name, *cells, f"{100 * point.recomputed:.0f} %", *times, "yes" if point.is_exact else "NO"))
    return markdown_table(header, rows)


def overhead_table(layers: int, rounds: int) -> str:
    """Time of each variant on a model with next to nothing to compute, per block and step."""
    options = argparse.Namespace(model="Llama", layers=layers, hidden=64, tokens=8, batch=2, config=[])
    model, batch = build(options, torch.float32)
    tiers = [ours(model, tier, mode="selective", save=tier) for tier in TIERS]
    full, hf = ours(model, "full", mode="full"), hf_variants(model, ())
    variants = [Variant("plain", "plain"), Variant("plain, again", "plain"), *tiers, full, *hf, torch_variant(model)]
    points = measure(model, batch, variants, rounds)
    whole = next(point for point in points if point.name == "HF full")
    rows = []
    for point in points:
        extra = median(a - b for a, b in zip(point.seconds, points[0].seconds))
        beyond = median(a - b for a, b in zip(point.seconds, whole.seconds))
        times = (f"{1e6 * seconds / layers:+.0f}" for seconds in (extra, beyond))
        rows.append((point.name, f"{1e6 * median(point.seconds) / layers:.0f}", *times))
    return markdown_table(("us per block and step", "all", "beyond plain", "beyond HF full"), rows)


def plot(panels: Mapping[str, Sequence[Point]], title: str, path: Path) -> None:
    """Stored bytes to the right, time up; one panel for each entry, HF's points joined by a line."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(7.2 * len(panels), 5.6), squeeze=False)
    for axes, (name, points) in zip(all_axes[0], panels.items()):
        shown = [point for point in points if point.name != "plain, again"]
        theirs = sorted((p for p in shown if _is_theirs(p)), key=lambda p: p.stored)
        mine = [point for point in shown if point.side == "ours"]
        at = {point.name: (point.stored / points[0].stored, point.time) for point in shown}
        axes.plot(
            *zip(*(at[p.name] for p in theirs)), "s--", color="#c44e52", linewidth=1, label="transformers", zorder=2
        )
        axes.plot(*zip(*(at[p.name] for p in mine)), "o", color="#4c72b0", label="ckpt_trainer", zorder=3)
        for point in shown:
            _label(axes, point, at[point.name])
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("bytes stored at the end of forward (ratio to plain training)")
        axes.set_ylabel("time of forward and backward (ratio to plain training)")
        axes.set_xlim(-0.16, 1.12)
        axes.margins(y=0.12)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper right", frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _label(axes: Any, point: Point, at: tuple[float, float]) -> None:
    # Ours to the left and HF's to the right: the same plan has a point of each at the same place.
    place, look = (-6, 0), {"ha": "right", "va": "center", "color": "#2f4b7c"}
    if _is_theirs(point):
        place, look = (4, 6), {"rotation": 30, "color": "#a03035"}
    text = point.name.replace("every_n_layers", "every").replace("full, every_n", "every_n")
    look["weight"] = "bold" if point.name in TIERS else "normal"
    axes.annotate(text, at, place, textcoords="offset points", fontsize=8, **look)


NOTES = """\
Written by `frontier.py`, which also draws `frontier.png`. A step is forward and backward. *Stored* are the bytes that the
end of forward leaves for backward, all of them, loss and logits included. *Peak* is the most at any time of a step, with
gradients. *Recomputed* are FLOPs beyond those of plain training, of those of a forward. *Time* is the median over rounds of
the ratio to plain training in the same round, a round being one step of every variant; on a CPU it is the processor time
of the process, with one thread, since the machine did other work too. *plain, again* is plain training a second time: how
far it is from 1 is how little a difference means. *Exact*: loss and gradients are those of plain training, bit for bit.

"HF's line" joins plain training and the points of transformers: what mixing them over a training would give."""

OVERHEAD_NOTES = """\
The same on {layers} blocks of width 64 and 2 rows of 8 tokens in fp32, where hardly anything but Python runs, over {rounds}
rounds. *HF full* is what a replay costs when nothing is chosen; *torch, mm and sdpa* are the contexts of
`torch.utils.checkpoint.create_selective_checkpoint_contexts`, which torch offers for the same choice as `matmul`."""


def main() -> None:
    options = read_options()
    make_repeatable()
    transformers.utils.logging.set_verbosity_error()
    sections, panels, exact = [f"# Memory against time\n\n{NOTES}\n\n{circumstances(SCRIPT)}"], {}, True
    size = (
        f"{options.model}, {options.layers} layers, width {options.hidden}, {options.batch} x {options.tokens} tokens"
    )
    for dtype in options.dtype:
        print(f"{size}, {dtype}")
        model, batch = build(options, getattr(torch, dtype))
        points = panels[dtype] = measure(model, batch, all_variants(model), options.rounds)
        held = "\n".join(f"- {'yes' if holds else 'NO'}: {claim}" for claim, holds in claims(points).items())
        sections.append(f"## {size}, {dtype}\n\n{points_table(points)}\n\n{options.rounds} rounds:\n\n{held}")
        print(f"\n{sections[-1]}\n", flush=True)
        exact &= all(point.is_exact for point in points)
        del model, batch
    if options.overhead_rounds:
        notes = OVERHEAD_NOTES.format(layers=8, rounds=options.overhead_rounds)
        sections.append(f"## Bookkeeping alone\n\n{notes}\n\n{overhead_table(8, options.overhead_rounds)}")
        print(f"\n{sections[-1]}\n")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n\n".join(sections) + "\n")
        plot(panels, size, options.output.with_suffix(".png"))
    if not exact:
        sys.exit("losses or gradients differ from those of plain training")


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, layers=12, hidden=512, tokens=512, batch=2)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each variant (default: 7)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="(default: float32 bfloat16)")
    parser.add_argument("--overhead-rounds", type=int, default=200, help="rounds on the tiny model (default: 200)")
    parser.add_argument("--output", type=Path, help="markdown file to write; the picture goes beside it")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.overhead_rounds) < 2:
        parser.error("quartiles need 2 rounds or more")
    return options


if __name__ == "__main__":
    main()
