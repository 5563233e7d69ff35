"""Carry out a plan on a model, and undo it.

`Installed` gives each block that is to be replayed a `forward` of its own, on the instance, for as long as it is
entered. Nothing else of the module changes: not its class, its hooks, its parameters or its name. Hooks on a block,
those of FSDP included, stay outside of what is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType, TracebackType
from typing import Any

from torch import nn

from ckpt_trainer.block_state import BlockState
from ckpt_trainer.blocks import Block
from ckpt_trainer.plan import Plan, Settings
from ckpt_trainer.recompute import Replayable, Tally, Variant


class Installed:
    """A plan in force on a model between enter and exit; may be entered again and again.

    Args:
        blocks: The blocks of the model.
        plan: An action for each of them.
        settings: How to carry the plan out.
        tally: Where calls and replays are counted.
    """

    def __init__(self, blocks: Sequence[Block], plan: Plan, settings: Settings, tally: Tally) -> None:
        replayed = [block for block in blocks if plan[block.name].kind == "recompute"]
        first_of_stack = {block.stack: block.name for block in reversed(blocks)}
        self._forwards = [
            _Forward(block.module, _replayable(block, settings, first_of_stack, tally)) for block in replayed
        ]

    def __enter__(self) -> Installed:
        for forward in self._forwards:
            forward.put()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for forward in self._forwards:
            forward.take_back()


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

    def __init__(self, module: nn.Module, block: Replayable) -> None:
        self._module = module
        self._block = block
        self._original: Callable[..., Any] = module.forward
        self._theirs: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._block.run(self._original, args, kwargs)

    def put(self) -> None:
        # Asked for now and not kept: accelerate and others may have put a forward of their own on the instance.
        self._theirs = vars(self._module).get("forward")
        self._original = self._module.forward
        vars(self._module)["forward"] = self

    def take_back(self) -> None:
        if self._theirs is None:
            vars(self._module).pop("forward", None)
        else:
            vars(self._module)["forward"] = self._theirs

    def __reduce__(self) -> Any:
        # A copy of the model that is made within a step is not under the plan.
        return _forward_of, (self._module, self._theirs)


def _forward_of(module: nn.Module, theirs: Callable[..., Any] | None) -> Callable[..., Any]:
    return theirs if theirs is not None else MethodType(type(module).forward, module)
