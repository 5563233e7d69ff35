"""From the spans of a step to what each block does: bytes above those that are accounted for elsewhere, and seconds.

Blocks add up: what one stores is what was alive when the next began, less what was alive when it began itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt_trainer.roofline import Device
from ckpt_trainer.spans import BEFORE, BEFORE_BACKWARD, HEAD, HEAD_BACKWARD, Span


@dataclass(frozen=True)
class BlockBytes:
    """What one block did.

    Args:
        stored: Held from its forward on.
        forward: The most in its forward above what was there before.
        backward: The most in its backward above what was there before its forward and the gradients that came since.
        gradients: Gradients that came into being in its backward.
        forward_seconds: Of its forward.
        backward_seconds: Of its backward, with what is computed again there.
    """

    stored: int
    forward: int
    backward: int
    gradients: int
    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True)
class StepBytes:
    """What one step did, in the words of `StepCosts`.

    Args:
        blocks: By name, in the order in which they ran.
        other_seconds: Of what is no block, forward and backward.
        start: Bytes that were there when it began.
        peak: The most bytes in it, these included.
    """

    blocks: Mapping[str, BlockBytes]
    before: int
    head: int
    head_backward: int
    head_gradients: int
    before_backward: int
    before_gradients: int
    start: int = 0
    peak: int = 0
    other_seconds: float = 0.0


def read_spans(spans: Sequence[Span], gradients: Mapping[str, int], device: Device | None = None) -> StepBytes:
    """What the spans of one step come to.

    Args:
        spans: As `measure_step` gives them.
        gradients: From `new_gradients`, of a step that began without any.
        device: Whose seconds; None: 0.
    """
    forward, backward = _by_block(spans)
    names = [name for name in forward if name not in (BEFORE, HEAD)]
    levels = {name: own[0].start for name, own in forward.items()}
    grown, so_far = {}, 0
    for name, own in backward.items():
        grown[name] = so_far
        so_far += sum(span.grown for span in own)
    blocks = {}
    for name, after in zip(names, [*names[1:], HEAD], strict=True):
        there, own = levels[name] + grown.get(name, 0), backward.get(name, [])
        blocks[name] = BlockBytes(
            stored=levels[after] - levels[name],
            forward=_peak(forward[name]) - levels[name],
            backward=_peak(own, there) - there,
            gradients=gradients.get(name, 0),
            forward_seconds=_seconds(forward[name], device),
            backward_seconds=_seconds(own, device),
        )
    first = levels[names[0]] if names else levels[HEAD]
    last = first + grown.get(BEFORE_BACKWARD, 0)
    return StepBytes(
        blocks,
        before=first - levels[BEFORE],
        head=_peak(forward[HEAD]) - levels[HEAD],
        head_backward=_peak(backward[HEAD_BACKWARD]) - levels[HEAD],
        head_gradients=gradients[HEAD_BACKWARD],
        before_backward=_peak(backward.get(BEFORE_BACKWARD, ()), last) - last,
        before_gradients=gradients.get(BEFORE_BACKWARD, 0),
        other_seconds=_seconds((span for span in spans if span.name not in blocks), device),
        start=levels[BEFORE],
        peak=max(span.peak for span in spans),
    )


def without_held(step: StepBytes, held: Mapping[str, int]) -> StepBytes:
    """The same step, had the inputs of some blocks been let go of with their own backward.

    Args:
        held: Name of a block -> bytes of its inputs that were held until the end of backward.
    """
    blocks, later = {}, 0
    for name, block in reversed(list(step.blocks.items())):
        blocks[name] = replace(block, backward=max(0, block.backward - later))
        later += held.get(name, 0)
    ordered = {name: blocks[name] for name in step.blocks}
    return replace(step, blocks=ordered, before_backward=max(0, step.before_backward - later))


def new_gradients(spans: Sequence[Span]) -> Mapping[str, int]:
    """Name of a span -> gradients that came into being in it."""
    grown = Counter[str]()
    for span in spans:
        grown[span.name] += span.grown if span.backward else 0
    return grown


def _by_block(spans: Sequence[Span]) -> tuple[dict[str, list[Span]], dict[str, list[Span]]]:
    """The spans of forward and of backward by name; what follows a block that is not the last is that block's."""
    forward: dict[str, list[Span]] = {}
    backward: dict[str, list[Span]] = {}
    ran = [span for span in spans if not span.backward]
    for before, span in zip([ran[0], *ran], ran, strict=False):
        is_between = span.name == HEAD and span is not ran[-1]
        forward.setdefault(before.name if is_between else span.name, []).append(span)
    forward.setdefault(HEAD, [ran[-1]])
    for span in spans:
        if span.backward:
            backward.setdefault(span.name, []).append(span)
    return forward, backward


def _peak(spans: Iterable[Span], least: int = 0) -> int:
    return max((span.peak for span in spans), default=least)


def _seconds(spans: Iterable[Span], device: Device | None) -> float:
    return sum((device.seconds(span.work) for span in spans), 0.0) if device is not None else 0.0
