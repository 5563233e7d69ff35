"""What a step costs, as plain data: bytes and seconds of each block under each action, and of all that is not a block.

`costs` measures it, `solver` chooses by it. What a choice comes to, the peak and the extra time, is counted here and
nowhere else. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckpt_trainer.plan import Action

# Where the peak of a step can be, and what lowers it there.
PHASES = {
    "forward": "a smaller micro-batch or a shorter sequence",
    "head and loss": "a smaller micro-batch, a shorter sequence, or a loss that is computed in chunks",
    "backward": "a smaller micro-batch, a shorter sequence, or more host memory to offload to",
    "embeddings": "frozen embeddings, or gradients that are sharded",
    "optimizer": "an optimizer with less state, fewer trainable weights (LoRA), or a state that is sharded",
}


@dataclass(frozen=True)
class Option:
    """One action for one block, and what it costs. Bytes are on the device where nothing else is said.

    Args:
        action: What is done to the block.
        stored_bytes: Held from the end of its forward until its backward is done.
        forward_bytes: The most in its forward above what was held before it, what it stores included.
        backward_bytes: The most in its backward above what the blocks before it hold: what it stored, what is rebuilt,
            temporaries, and its own new gradients.
        seconds: Time that it takes more than `keep`, copies excepted.
        host_bytes: Host memory that it takes until its backward.
        link_bytes: Copied off the device once, and back once.
    """

    action: Action
    stored_bytes: int
    forward_bytes: int
    backward_bytes: int
    seconds: float = 0.0
    host_bytes: int = 0
    link_bytes: int = 0


@dataclass(frozen=True)
class BlockCost:
    """What one block costs. Blocks of one class share the same tuple of options.

    Args:
        name: As in the plan.
        options: One or more; `keep` is the first.
        gradient_bytes: Gradients of its weights that come into being in its backward and stay.
        forward_seconds: Time of its forward, which copies can hide behind.
        backward_seconds: Time of its backward under `keep`.

    Raises:
        ValueError: There is no option, or the first one moves something off the device.
    """

    name: str
    options: tuple[Option, ...]
    gradient_bytes: int = 0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.options or self.options[0].link_bytes or self.options[0].host_bytes:
            raise ValueError(
                f"block {self.name!r} needs a first option that stays on the device (keep); found {self.options[:1]}."
            )


@dataclass(frozen=True)
class StepCosts:
    """What one step costs: its micro-batch and its optimizer step.

    Args:
        blocks: In forward order.
        resident_bytes: There all the time: weights, buffers, optimizer state; not the gradients.
        before_bytes: Stored by what runs before the blocks (embeddings) until the end of backward.
        head_forward_bytes: The most in head and loss, above all that the blocks stored.
        head_backward_bytes: The same in their backward, their new gradients included.
        head_gradient_bytes: Gradients of the head that come into being there and stay.
        before_backward_bytes: The most in the backward of what runs before the blocks, beyond `before_bytes`.
        before_gradient_bytes: Gradients that come into being there and stay.
        optimizer_bytes: Temporaries of the optimizer step.
        staging_bytes: What copies in flight hold on the device, in a step that has any.
        gradients_are_there: Every gradient exists from the start, as from the second micro-batch of a step on. Else they
            grow from the last block to the first.
        host_budget_bytes: Host memory that all blocks together may take.
        link_bytes_per_second: Of the link to the host, in each direction. 0: there is no link.
        other_seconds: Time of what is no block: embeddings, head and loss, forward and backward.
    """

    blocks: tuple[BlockCost, ...]
    resident_bytes: int = 0
    before_bytes: int = 0
    head_forward_bytes: int = 0
    head_backward_bytes: int = 0
    head_gradient_bytes: int = 0
    before_backward_bytes: int = 0
    before_gradient_bytes: int = 0
    optimizer_bytes: int = 0
    staging_bytes: int = 0
    gradients_are_there: bool = False
    host_budget_bytes: int = 0
    link_bytes_per_second: float = 0.0
    other_seconds: float = 0.0

    @property
    def gradient_bytes(self) -> int:
        """All gradients."""
        of_blocks = sum(block.gradient_bytes for block in self.blocks)
        return self.head_gradient_bytes + of_blocks + self.before_gradient_bytes

    @property
    def base_bytes(self) -> int:
        """Held during the whole forward and backward, whatever is chosen."""
        return self.resident_bytes + self.before_bytes + (self.gradient_bytes if self.gradients_are_there else 0)

    @property
    def head_bytes(self) -> int:
        """The most in head and loss, forward or backward, above all that the blocks stored."""
        return max(self.head_forward_bytes, self.head_backward_bytes)

    def grown_bytes(self) -> list[int]:
        """For each block the gradients that came into being before its backward; nothing where all were there."""
        if self.gradients_are_there:
            return [0] * len(self.blocks)
        grown, so_far = [], self.head_gradient_bytes
        for block in reversed(self.blocks):
            grown.append(so_far)
            so_far += block.gradient_bytes
        return grown[::-1]

    def hiding_seconds(self) -> tuple[float, float]:
        """The compute that copies can hide behind, out in forward and in in backward: all blocks but the first.

        What block i stores leaves while later blocks run, and comes back while they run backward. How the copies follow
        one another within that time is not modelled.
        """
        later = self.blocks[1:]
        return sum(block.forward_seconds for block in later), sum(block.backward_seconds for block in later)

    def exposed_seconds(self, link_seconds: float) -> float:
        """Time that the step waits for copies that take `link_seconds` in each direction."""
        return sum(max(0.0, link_seconds - hiding) for hiding in self.hiding_seconds())


@dataclass(frozen=True)
class Peak:
    """The most bytes that a step has on the device, and where.

    Args:
        bytes: How many.
        phase: One of `PHASES`.
        block: The name of the block in `forward` and `backward`, else empty.
    """

    bytes: int
    phase: str
    block: str = ""

    @property
    def where(self) -> str:
        """For a line of text."""
        return f"{self.phase} of {self.block}" if self.block else self.phase


class BudgetTooSmall(ValueError):
    """No choice of actions fits.

    Args:
        budget_bytes: What was asked for.
        least: The peak of the leanest choice, and where it is.
    """

    def __init__(self, budget_bytes: int, least: Peak) -> None:
        self.budget_bytes, self.least = budget_bytes, least
        super().__init__(
            f"a budget of {_size(budget_bytes)} was asked for. The leanest plan needs {_size(least.bytes)}, and its peak "
            f"is in: {least.where}. "
            f"What lowers it there: {PHASES[least.phase]}."
        )


def _size(n: int) -> str:
    return f"{n / 2**30:.3f} GiB" if n >= 2**30 else f"{n / 2**20:.3f} MiB"


def peak_of(costs: StepCosts, chosen: Sequence[Option]) -> Peak:
    """The peak of a step in which each block has the option chosen for it; the first phase of several equal ones."""
    return max(_phases(costs, chosen), key=lambda peak: peak.bytes)


def constant_peak(costs: StepCosts) -> Peak:
    """The peak of those phases that no choice changes."""
    return max(_constant_phases(costs), key=lambda peak: peak.bytes)


def phase_peaks(costs: StepCosts, chosen: Sequence[Option]) -> dict[str, Peak]:
    """Phase -> its peak in a step in which each block has the option chosen for it, in the order of `PHASES`."""
    found: dict[str, Peak] = {}
    for peak in _phases(costs, chosen):
        if peak.phase not in found or peak.bytes > found[peak.phase].bytes:
            found[peak.phase] = peak
    return {phase: found[phase] for phase in PHASES if phase in found}


def extra_seconds(costs: StepCosts, chosen: Sequence[Option]) -> float:
    """Time that the step takes more than one in which all blocks are kept."""
    link_bytes = sum(option.link_bytes for option in chosen)
    waiting = costs.exposed_seconds(link_bytes / costs.link_bytes_per_second) if link_bytes else 0.0
    return sum(option.seconds for option in chosen) + waiting


def _phases(costs: StepCosts, chosen: Sequence[Option]) -> Iterator[Peak]:
    held = costs.base_bytes + (costs.staging_bytes if any(option.link_bytes for option in chosen) else 0)
    for block, option, grown in zip(costs.blocks, chosen, costs.grown_bytes(), strict=True):
        yield Peak(held + option.forward_bytes, "forward", block.name)
        yield Peak(held + grown + option.backward_bytes, "backward", block.name)
        held += option.stored_bytes
    yield Peak(held + costs.head_bytes, "head and loss")
    yield from _constant_phases(costs)


def _constant_phases(costs: StepCosts) -> tuple[Peak, Peak]:
    gradients = costs.gradient_bytes
    there = gradients if costs.gradients_are_there else gradients - costs.before_gradient_bytes
    embeddings = costs.resident_bytes + costs.before_bytes + there + costs.before_backward_bytes
    optimizer = costs.resident_bytes + gradients + costs.optimizer_bytes
    return Peak(optimizer, "optimizer"), Peak(embeddings, "embeddings")
