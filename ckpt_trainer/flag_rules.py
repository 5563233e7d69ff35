"""What flags mean together: what cannot be combined, and which of them nothing follows from.

Each is checked by itself in `flag_values`; these functions see the settings that came of them, before a model is known.
A user's own policy is not known here either: what its answers cannot be combined with is said by `policies`.
"""

from __future__ import annotations

from collections.abc import Collection

from ckpt_trainer.plan import KEEP, RECOMPUTE, TIERS, Action, Part, Settings, offload_action


def refuse_combinations(settings: Settings, kwargs: str) -> None:
    """Raise ValueError where settings exclude each other. `kwargs`: the name of HF's kwargs, if they were given."""
    refused = [key for key in ("context_fn", "debug") if settings.checkpoint_options.get(key)]
    if settings.use_reentrant and refused:
        raise ValueError(
            f"{kwargs}: use_reentrant=True cannot be combined with {', '.join(refused)}. Remove one of them."
        )
    selective = _who_says_selective(settings)
    segment = f"checkpointing_segment={settings.segment!r}" if settings.segment != 1 else None
    needing = selective or segment
    if settings.use_reentrant and needing:
        raise ValueError(
            f"{needing} needs the non-reentrant variant of torch's checkpoint. Remove use_reentrant=True (in "
            f"checkpointing_use_reentrant or {kwargs or 'activation_checkpointing_kwargs'}), or {needing}."
        )
    if selective and "context_fn" in refused:
        raise ValueError(f"{kwargs}['context_fn'] and {selective} are two selections of what is stored. Remove one.")
    disk = "checkpointing_offload_to='disk'" if settings.offload_to == "disk" else None
    if settings.plan is not None and any(action.place == "disk" for action in settings.plan.actions.values()):
        disk = "a block at 'disk' in checkpointing_plan"
    if disk and settings.offload_dir is None:
        raise ValueError(
            f"{disk} needs a folder for its file. Set checkpointing_offload_dir to one on a fast local disk."
        )


def says_full(settings: Settings) -> bool:
    """Whether flags of mode `full` are set: with them and without a mode, that mode is meant."""
    own = settings.every_n != 1 or settings.segment != 1 or bool(settings.checkpoint_options.get("context_fn"))
    return settings.mode == "auto" and (own or settings.use_reentrant)


def _who_says_selective(settings: Settings) -> str | None:
    if settings.plan is not None:
        return "a selective block in checkpointing_plan" if settings.plan.count("selective") else None
    if settings.mode in ("selective", "auto"):
        return f"checkpointing_mode={settings.mode!r}"
    if settings.mode == "offload" and settings.offload_save in TIERS:
        return f"checkpointing_offload_save={settings.offload_save!r}"
    for part in settings.modules:
        if part.mode == "auto":
            return f"'auto' in checkpointing_modules[{part.name!r}]"
        if _action(part, settings).kind == "selective":
            said = "selective" if part.mode == "selective" else f"offload:{part.offload_save}"
            return f"{said!r} in checkpointing_modules[{part.name!r}]"
    return None


def _action(part: Part, settings: Settings) -> Action:
    if part.mode == "offload":
        return offload_action(part.offload_save, settings.offload_place)
    by_mode = {"none": KEEP, "selective": Action("selective", save=part.save), "full": RECOMPUTE, "auto": RECOMPUTE}
    return by_mode[part.mode]


def without_effect(settings: Settings, said: Collection[str], kwargs: str) -> list[str]:
    """The flags that nothing follows from, each with what it is for where the name does not tell.

    Args:
        said: Flags that have another value than their default.
        kwargs: The name of HF's kwargs, if the user gave some.
    """
    if settings.plan is None:
        parts = [Part("*", settings.mode, settings.save, settings.offload_save), *settings.modules]
        actions = [_action(part, settings) for part in parts]
    else:
        parts, actions = [], list(settings.plan.actions.values())
    modes = {part.mode for part in parts}
    is_auto = "auto" in modes or (settings.plan is not None and bool(settings.plan.sizes))
    idle = [f"{flag} (of mode 'auto')" for flag in _OF_AUTO if flag in said and not is_auto]
    if all(action.does_nothing for action in actions):
        every = ("checkpointing_every_n", "checkpointing_modules")
        idle += [name for name in (kwargs, *every) if name and name in (kwargs, *said)]
    elif "checkpointing_every_n" in said and modes and modes <= {"auto", "none"}:
        idle.append("checkpointing_every_n (of modes that are not 'auto')")
    if "checkpointing_save" in said and not any(p.mode == "selective" and p.save == settings.save for p in parts):
        idle.append("checkpointing_save (of mode 'selective')")
    kinds = (
        {_action(part, settings).kind for part in parts if part.mode != "auto"} if parts else {a.kind for a in actions}
    )
    if "checkpointing_segment" in said and "auto" in modes and "recompute" in kinds:
        idle.append("checkpointing_segment (beside mode 'auto')")
    elif "checkpointing_segment" in said and "recompute" not in kinds:
        idle.append("checkpointing_segment (of mode 'full', or 'offload' with inputs)")
    elif "checkpointing_segment" in said and settings.every_n != 1 and settings.plan is None:
        idle.append("checkpointing_segment (with every_n there are no recomputed blocks in a row)")
    return idle + _without_effect_on_offload(settings, said, parts, {action.place for action in actions})


def _without_effect_on_offload(
    settings: Settings, said: Collection[str], parts: Collection[Part], places: Collection[str]
) -> list[str]:
    if any(part.mode == "auto" for part in parts):  # what it moves, and whether, it decides itself
        used = any(part.mode == "offload" and part.offload_save == settings.offload_save for part in parts)
        idle_save = "checkpointing_offload_save" in said and not used
        return ["checkpointing_offload_save (of mode 'offload')"] if idle_save else []
    if not set(places) - {"device"}:
        return [f"{flag} (of mode 'offload', or a policy's)" for flag in _OF_OFFLOAD if flag in said]
    idle = {
        "checkpointing_offload_save (each part says its own)": not any(
            part.mode == "offload" and part.offload_save == settings.offload_save for part in parts
        ),
        "checkpointing_offload_to (the plan says where)": settings.offload_to == "disk" and "disk" not in places,
        # Without a plan, a policy may offload to disk.
        "checkpointing_offload_dir (of offload to 'disk')": settings.plan is not None and "disk" not in places,
    }
    return [text for text, is_idle in idle.items() if is_idle and text.partition(" ")[0] in said]


_OF_AUTO = ("checkpointing_budget", "checkpointing_oom_retries")

_OF_OFFLOAD = (
    "checkpointing_offload_save",
    "checkpointing_offload_to",
    "checkpointing_offload_dir",
    "checkpointing_host_budget",
    "checkpointing_prefetch",
)
