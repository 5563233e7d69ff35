"""Carry out a plan on a model, and undo it.

`Installed` gives each block that is not kept a `forward` of its own, on the instance, for as long as it is
entered. Nothing else of the module changes: not its class, its hooks, its parameters or its name. Hooks on a block,
those of FSDP included, stay outside of what is replayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MethodType, TracebackType
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ckpt_trainer.block_state import BlockState
from ckpt_trainer.blocks import Block
from ckpt_trainer.compiled import MARKED, NOT_COMPILED, Compiled, Told, told
from ckpt_trainer.host_memory import available_bytes, host_cap
from ckpt_trainer.log import logger
from ckpt_trainer.memory import format_bytes
from ckpt_trainer.offload import Offloading
from ckpt_trainer.ops import WORDS
from ckpt_trainer.plan import Action, Plan, Settings
from ckpt_trainer.rebuild import Rebuilding
from ckpt_trainer.recompute import Elsewhere, Movable, Rebuildable, Replayable, Tally, Variant
from ckpt_trainer.segments import Segments, segment_length
from ckpt_trainer.stored_modules import StoredModules
from ckpt_trainer.stored_results import StoredResults

Run = Rebuildable | Replayable | Movable


class Runners:
    """What carries out each action on each block: made when it is first asked for, and shared by all plans of a model.

    Args:
        blocks: The blocks of the model.
        settings: How to carry plans out.
        tally: Where calls and replays are counted.
        offloading: Moves what is stored of blocks whose place is not the device; needed where there are such.

    Attributes:
        rebuilding: What blocks that store what is expensive rebuild.
    """

    def __init__(
        self, blocks: Sequence[Block], settings: Settings, tally: Tally, offloading: Offloading | None = None
    ) -> None:
        modules = [module for block in blocks for module in block.module.modules()]
        self.rebuilding = Rebuilding(modules, from_parameters=not any(map(is_sharded, modules)))
        self.offloading = offloading
        self._first_of_stack = {block.stack: block.name for block in reversed(blocks)}
        self._settings, self._tally = settings, tally
        self._selections: dict[tuple[str, tuple[str, ...]], Selection] = {}
        self._replayables: dict[str, Replayable] = {}

    @property
    def is_counting(self) -> bool:
        """Whether FLOPs of a forward are counted just now."""
        return self._tally.counter is not None

    @property
    def num_calls(self) -> int:
        """Calls of blocks so far that an action did something to."""
        return self._tally.calls.total()

    def selection(self, block: Block, action: Action) -> Selection | None:
        """What of a block is stored besides its inputs; None where an action does not choose."""
        if action.kind != "selective" or action.save == EXPENSIVE:
            return None
        key = block.name, action.save
        if key not in self._selections:
            self._selections[key] = Selection(block, action.save)
        return self._selections[key]

    def share_lessons(self, names: Sequence[str], blocks: Mapping[str, Block], action: Action) -> None:
        """What the first of some equal blocks learns of the results that no replay asks for holds for all of them."""
        selections = [self.selection(blocks[name], action) for name in names]
        for selection in selections[1:]:
            if selection is not None and selections[0] is not None:
                selection.learn_with(selections[0])

    def run_of(self, block: Block, action: Action, segments: Segments | None = None, told: Told = MARKED) -> Run | None:
        """What runs a block in place of its forward; None where an action does nothing."""
        if action.does_nothing:
            return None
        parameters, elsewhere = tuple(block.module.parameters()), _elsewhere(block, action, self.offloading)
        if action.kind == "keep":
            assert elsewhere is not None
            return Movable(parameters, elsewhere, self._tally)
        if action.save == EXPENSIVE:
            return Rebuildable(parameters, self.rebuilding, self._tally, elsewhere, told)
        selection = self.selection(block, action)
        return replace(
            self._replayable(block),
            storing=selection.storing if selection is not None else (),
            segments=segments if action.kind == "recompute" else None,
            elsewhere=elsewhere,
            told=told,
        )

    def _replayable(self, block: Block) -> Replayable:
        # One for all actions: what it has seen of a block's random numbers and buffers holds under each.
        if block.name not in self._replayables:
            self._replayables[block.name] = _replayable(block, self._settings, self._first_of_stack, self._tally)
        return self._replayables[block.name]


class Installed:
    """A plan in force on a model between enter and exit; may be entered again and again.

    Args:
        blocks: The blocks of the model.
        plan: An action for each of them.
        settings: How to carry the plan out.
        runners: What carries out its actions.
        compiled: What of the model is compiled.
        left: Called with the name of a block that should be compiled and runs without.

    Attributes:
        rebuilding: What blocks that store what is expensive rebuild.
        stored: Block name -> what is stored of its modules and its ops, where it is replayed selectively.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        plan: Plan,
        settings: Settings,
        runners: Runners,
        compiled: Compiled = NOT_COMPILED,
        left: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.rebuilding = runners.rebuilding
        chosen = {block.name: runners.selection(block, plan[block.name]) for block in blocks}
        self.stored = {name: selection for name, selection in chosen.items() if selection is not None}
        segments = _segments(blocks, plan, settings)
        tell = partial(told, plan, settings, compiled, left)
        self._offloading, self._forwards = runners.offloading, list[_Forward]()
        for block in blocks:
            run = runners.run_of(block, plan[block.name], segments.get(block.stack), tell(block.name))
            if run is not None:
                self._forwards.append(_Forward(block.module, run))

    def unmatched(self) -> list[str]:
        """Names of ops and modules to be stored that meant nothing, in the blocks that ran."""
        ran = [selection for selection in self.stored.values() if selection.has_run]
        # Of modules it is known before they run, and some blocks may never do so with a graph.
        matched = {entry for selection in self.stored.values() for entry in selection.matched}
        asked = dict.fromkeys(entry for selection in ran for entry in selection.save if entry not in WORDS)
        return [entry for entry in asked if entry not in matched]

    def __enter__(self) -> Installed:
        for forward in self._forwards:
            forward.put()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for forward in self._forwards:
            forward.take_back()
        if self._offloading is not None:
            self._offloading.end_of_step()


def offloading_of(settings: Settings) -> Offloading:
    """What moves the stored tensors of a model off its device."""
    return Offloading(
        partial(_cap, settings.host_budget), settings.prefetch, settings.offload_to != "pageable", settings.offload_dir
    )


def _cap(budget: float | int) -> int:
    cap, available = host_cap(budget), available_bytes()
    if 0 < available < cap:
        logger.warning(
            f"checkpointing_host_budget of {format_bytes(cap)} is more than the {format_bytes(available)} of host memory "
            "that are available. A process that takes more than there is gets killed."
        )
    return cap


def _elsewhere(block: Block, action: Action, offloading: Offloading | None) -> Elsewhere | None:
    if action.place == "device":
        return None
    assert offloading is not None
    return Elsewhere(offloading, (*block.module.parameters(), *block.module.buffers()), action.place == "disk")


EXPENSIVE = ("expensive",)


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of a module are whole only while it runs: under FSDP2 and DeepSpeed ZeRO-3."""
    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in module.parameters(recurse=False))


class Selection:
    """What of one block is stored besides its inputs.

    Args:
        block: The block.
        save: Names of modules and ops, or a tier, as in `Action`.
    """

    def __init__(self, block: Block, save: Sequence[str]) -> None:
        self.save = save
        self.modules = StoredModules(block.module, block.name, save)
        ops = [entry for entry in save if entry not in self.modules.matched or entry in WORDS]
        # Without names of ops there is no dispatch mode.
        self.ops = StoredResults(block.module, block.name, ops) if ops else None

    @property
    def storing(self) -> tuple[StoredModules | StoredResults, ...]:
        modules = (self.modules,) if self.modules.chosen else ()
        return (*modules, self.ops) if self.ops is not None else modules

    def learn_with(self, other: Selection) -> None:
        """Share what is learnt from replays with an equal block."""
        if self.ops is not None and other.ops is not None:
            self.ops.learn_with(other.ops)

    @property
    def has_run(self) -> bool:
        """Whether it is known which ops there are."""
        return self.ops is None or self.ops.watched

    @property
    def not_stored(self) -> list[str]:
        """What was chosen and could not be stored, and why."""
        skipped = self.modules.skipped.items()
        found = [f"result of {name!r} in {self.modules.name!r} is computed again, since {why}" for name, why in skipped]
        return found + ([self.ops.fallback] if self.ops is not None and self.ops.fallback else [])

    @property
    def matched(self) -> set[str]:
        """What of `save` meant something so far."""
        return self.modules.matched | (self.ops.matched if self.ops is not None else set())


def _segments(blocks: Sequence[Block], plan: Plan, settings: Settings) -> dict[str, Segments]:
    """Stack -> its segments, where more than one block share a stored input."""
    if settings.plan is None and "auto" in (settings.mode, *(part.mode for part in settings.modules)):
        return {}  # what a block stores must not depend on the plan of the one before it
    numbers = Counter(block.stack for block in blocks if plan[block.name].kind == "recompute")
    lengths = {stack: segment_length(settings.segment, number) for stack, number in numbers.items()}
    return {stack: Segments(length) for stack, length in lengths.items() if length > 1}


# (setting, is first of its stack) -> whether an input is made to require grad, see `Variant`.
_INPUT_GRADS = {
    ("always", True): True,
    ("always", False): None,
    ("auto", True): None,
    ("auto", False): None,
    ("never", True): False,
    ("never", False): False,
}


def _replayable(block: Block, settings: Settings, first_of_stack: dict[str, str], tally: Tally) -> Replayable:
    variant = Variant(
        use_reentrant=settings.use_reentrant,
        require_input_grad=_INPUT_GRADS[settings.input_grads, first_of_stack[block.stack] == block.name],
        options=settings.checkpoint_options,
    )
    state = BlockState(block.module, settings.preserve_rng_state)
    return Replayable(block.name, tuple(block.module.parameters()), state, variant, tally)


class _Forward:
    """The `forward` of one block while a plan is in force."""

    def __init__(
        self,
        module: nn.Module,
        block: Replayable | Rebuildable | Movable | None,
        theirs: Callable[..., Any] | None = None,
    ) -> None:
        self._module = module
        self._block = block
        self._theirs = theirs
        self._original: Callable[..., Any] = theirs or MethodType(type(module).forward, module)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self._block is None:
            return self._original(*args, **kwargs)
        return self._block.run(self._original, args, kwargs)

    def put(self) -> None:
        # Asked for now and not kept: accelerate and others may have put a forward of their own on the instance.
        self._theirs = vars(self._module).get("forward")
        self._original = self._module.forward
        # A method: of one, compilers look at the code and not at which it is, so that they need not compile anew for
        # each plan and for each block.
        vars(self._module)["forward"] = self.run

    def take_back(self) -> None:
        if self._theirs is None:
            vars(self._module).pop("forward", None)
        else:
            vars(self._module)["forward"] = self._theirs

    def __reduce__(self) -> Any:
        # A copy of the model that is made within a step is not under the plan.
        return _Forward, (self._module, None, self._theirs)
