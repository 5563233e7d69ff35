"""Hooks on a user's model while it trains: in a copy of the model, or in a file of it, they do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """Calls something; copied or pickled, it calls nothing, so that what it holds is not copied with a model."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._call(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return do_nothing

    def __reduce__(self) -> Any:
        return _inert, ()


def _inert() -> Callable[..., None]:
    return do_nothing


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """What is left of a hook."""
