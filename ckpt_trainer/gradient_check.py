"""After the first backward: has every trainable parameter of a recomputed block that took part a gradient?

The reentrant variant loses gradients without a word where a block passes tensors on by other ways than its return
value. Elsewhere a missing gradient is the model's own doing, and worth a word: adapters in a part whose result is not
used, or that runs under `no_grad`, never train.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from ckpt_trainer.blocks import Block


class GradientCheck:
    """Watch one forward and backward; enter before it, ask `missing` after it.

    Args:
        blocks: The blocks to watch.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._owners = [
            (f"{block.name}.{name}" if name else block.name, module)
            for block in blocks
            for name, module in block.module.named_modules()
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        ]
        self._watched = {module for _, module in self._owners}
        self._ran: set[nn.Module] = set()
        self._reached: set[nn.Parameter] = set()
        self._handles: list[RemovableHandle] = []
        self._bare: list[nn.Parameter] = []

    def __enter__(self) -> GradientCheck:
        # On all modules and not on these: a copy that is made of the model meanwhile shall not have them.
        self._handles.append(register_module_forward_pre_hook(self._note_run))
        for _, module in self._owners:
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and parameter.is_leaf:
                    if parameter._post_accumulate_grad_hooks is None:
                        self._bare.append(parameter)
                    # A hook and not a look at .grad afterwards: some optimizers step and clear it within backward.
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._reached.add))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._bare:
            if not parameter._post_accumulate_grad_hooks:
                # torch leaves an empty dict, and with it a call into Python for every gradient.
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]

    def _note_run(self, module: nn.Module, args: Any) -> None:
        if module in self._watched:
            self._ran.add(module)

    @property
    def has_gradients(self) -> bool:
        """Whether a backward came by."""
        return bool(self._reached)

    def missing(self) -> list[str]:
        """Names of trainable parameters whose module ran and that got no gradient.

        Empty where no parameter got one: then gradients are kept elsewhere (DeepSpeed) and nothing can be said.
        """
        entries = [
            (f"{name}.{key}", parameter)
            for name, module in self._owners
            if module in self._ran
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        ]
        lost = [name for name, parameter in entries if parameter not in self._reached and parameter.grad is None]
        return lost if len(lost) < len(entries) else []
