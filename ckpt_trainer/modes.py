"""Dispatch modes that stay on from a forward to the end of its step, beside those that others enter and leave meanwhile.

torch's modes are a stack, and each takes off what lies on top when it ends. What is private to torch about that is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.utils import _python_dispatch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode_temporarily,
)


def modes_on() -> list[TorchDispatchMode]:
    """The modes that are on, the outermost first."""
    return _get_current_dispatch_mode_stack()


@contextmanager
def beneath(known: Sequence[TorchDispatchMode]) -> Iterator[None]:
    """What is entered within goes beneath the modes that came on since those known: they end earlier than it does."""
    stack = modes_on()
    with ExitStack() as later:
        while stack and not any(stack[-1] is mode for mode in known):
            later.enter_context(_pop_mode_temporarily())
            stack.pop()
        yield


def leave(*contexts: Any) -> None:
    """Leave modes and other contexts, in whichever order modes of others were entered and left meanwhile.

    Modes that were entered within backward are gone once that is over: autograd puts the modes back that it began with.
    """
    for context in contexts:
        stack = modes_on()
        places = [place for place, mode in enumerate(stack) if mode is context]
        with ExitStack() as later:
            for _ in stack[places[-1] + 1 :] if places else ():
                later.enter_context(_pop_mode_temporarily())
            if places or not isinstance(context, TorchDispatchMode):
                context.__exit__(None, None, None)
    _set_flags()


def _set_flags() -> None:
    """A mode gives back the flags that it found, which are wrong where it did not end in its turn."""
    stack = modes_on()
    compiles = any(not mode.ignore_compile_internals() for mode in stack)
    flags = {
        "_is_in_torch_dispatch_mode": bool(stack),
        "_is_in_non_infra_torch_dispatch_mode": any(not mode.is_infra_mode() for mode in stack),
        "_is_in_any_mode_without_ignore_compile_internals": compiles,
    }
    vars(_python_dispatch).update({name: value for name, value in flags.items() if hasattr(_python_dispatch, name)})
    tell_compiler = getattr(_python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None)
    if tell_compiler is not None:
        tell_compiler(compiles)
