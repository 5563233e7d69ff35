"""Where a model says that it draws random numbers: rates of its modules and in its configs.

A guess by names, which tells what to look at. Functions that draw do not show, so no answer is no promise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def drawing(model: nn.Module) -> list[str]:
    """Where a model says that it draws random numbers, one of each kind: `config.attention_dropout=0.1`."""
    seen: set[int] = set()
    found: dict[str, str] = {}
    rates = set()
    modules = [(path.replace("_orig_mod.", ""), module) for path, module in model.named_modules()]
    for _, module in modules:
        for name in _CONFIGS & vars(module).keys():
            for path, rate in _rates_of_config(name, vars(module)[name], seen):
                found.setdefault(path.rpartition(".")[2], f"{path}={rate:g}")
                rates.add(rate)
    for path, module in modules:
        for name, rate in _rates_of_module(module):
            if "lora_dropout" in path:
                found.setdefault("lora_dropout", f"LoraConfig(lora_dropout={rate:g})")
            # A rate that a config holds, too, comes from there.
            elif rate not in rates:
                kind = type(module).__name__ if name in _RATES else name
                found.setdefault(kind, f"{path}.{name}={rate:g}".lstrip("."))
    return list(found.values())


_CONFIGS = frozenset({"config", "cfg", "args"})
_RATES = frozenset({"p", "drop_prob", "prob", "rate", "upper"})


def _rates_of_config(path: str, config: Any, seen: set[int]) -> Iterator[tuple[str, float]]:
    if id(config) in seen or isinstance(config, (nn.Module, type)) or callable(config):
        return
    seen.add(id(config))
    entries = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in entries.items():
        if rate := _rate(str(name), value):
            yield f"{path}.{name}", rate
        yield from _rates_of_config(f"{path}.{name}", value, seen)


def _rates_of_module(module: nn.Module) -> Iterator[tuple[str, float]]:
    kind = type(module).__name__.lower()
    draws = isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)) or "drop" in kind or "stochastic" in kind
    for name, value in vars(module).items():
        if rate := _rate("drop" if draws and name in _RATES else name, value):
            yield name, rate


def _rate(name: str, value: Any) -> float:
    """How often or how strongly a model draws, by an entry of this name; 0 where it says nothing of that."""
    if isinstance(value, (tuple, list)):
        return max((_rate(name, item) for item in value), default=0)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0
    return max(value, 0) if any(word in name for word in ("drop", "jitter", "noise")) else 0
