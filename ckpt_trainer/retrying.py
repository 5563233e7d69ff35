"""Ops that run out of memory are run again, one by one, where a whole step cannot be: once weights may have changed.

NOTE on what a failed op leaves behind. An op takes the memory for its result, or for a copy in another dtype, before it
writes; one that failed to get it has done nothing. Ops that write a list of tensors in place are the exception: where
they have no kernel for the whole list they go through it tensor by tensor, and a later one that needs a copy in another
dtype may fail when the first ones are written. On an accelerator such ops cast within the kernel and take no memory; on
a CPU they do. So of these, lists of one dtype are run again, and lists of mixed dtypes are not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_iter

from ckpt_trainer.out_of_memory import is_out_of_memory


class Retrying(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, an op that runs out of memory is run again after memory was released.

    Compiled functions run as without it. Of errors that remain the op's own is raised.

    Args:
        retries: How often at most, for each op.
        release: Called before each of them with the name of the op and which of the retries it is.

    Attributes:
        num_ops: How many ops ran.
    """

    def __init__(self, retries: int, release: Callable[[str, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._retries = retries
        self._release = release
        self.num_ops = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __exit__(self, *error: Any) -> None:
        # An optimizer that fails calls no hook at its end, so that modes which one entered at its beginning are still on.
        while (last := _get_current_dispatch_mode()) is not None and last is not self:
            last.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.num_ops += 1
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error) or may_be_half_done(func, args):
                raise
        # Not in the `except` block, where the error would keep what its frames hold.
        return self._again(func, args, kwargs)

    def _again(self, func: Any, args: Any, kwargs: Any) -> Any:
        for number in range(1, self._retries + 1):
            self._release(str(func), number)
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if number == self._retries or not is_out_of_memory(error):
                    raise
        raise AssertionError("a mode without retries is not entered")


def may_be_half_done(func: Any, args: Any) -> bool:
    """Whether an op that ran out of memory may have written some of the tensors that it writes in place."""
    if not _writes_list(func):
        return False
    # Numbers in tensors do not make a copy of the others.
    kinds = {(leaf.dtype, leaf.device) for leaf in tree_iter(args) if isinstance(leaf, Tensor) and leaf.dim()}
    return len(kinds) > 1


@cache
def _writes_list(func: Any) -> bool:
    return any(
        argument.alias_info is not None and argument.alias_info.is_write and isinstance(argument.type, torch.ListType)
        for argument in func._schema.arguments
    )
