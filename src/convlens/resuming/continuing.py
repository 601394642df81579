"""Whether a run can go on, and what is to be said if something isn't as it was when it began.

Another recipe is another run, in a folder of its own. Other images end it. Another machine, another
version or another number of processes may go on, but then the bits aren't those that an
uninterrupted run would have ended with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape

from convlens import run
from convlens.data import Data
from convlens.errors import ConvlensError, DataError, ModelFileError, ResourceError
from convlens.recipe import Recipe
from convlens.run import RunFolder
from convlens.system.console import print_status

_LOOKED_AT = 10  # runs of the same name, the latest
_SHOWN = 3
# What decides about last digits, of what `device.describe` says.
_HARDWARE = ("device", "gpu", "cpu", "cpu_capability", "threads", "torch")


def check(place: RunFolder, facts: Mapping[str, Any], recipe: Recipe, data: Data) -> None:
    """Refuses to go on with another recipe or other images than the run began with.

    Raises:
        ResourceError: another recipe; DataError: other images, with what differs; ModelFileError:
            what `run.json` says can't be used.
    """
    if not facts:
        return
    if recipe.digest() not in facts.get("digests", []):
        raise ResourceError(
            f"another process has just taken the name {place.name!r} for another recipe",
            where=str(place.path),
            fix="run the same command again, or give this run another name with --name",
        )
    began = facts.get("data")
    if not isinstance(began, Mapping) or "fingerprint" not in began:
        raise ModelFileError(
            "run.json doesn't say on which images this run began",
            where=str(place.path),
            fix="restore it from a copy, or train anew with --fresh",
        )
    if began["fingerprint"] != data.fingerprint:
        changed = data.listing.changed(place.path) if data.listing else ""
        raise DataError(
            f"the images of {data.name!r} are not those that run {place.name!r} began with"
            + (f": {changed}" if changed else ""),
            where=str(place.path),
            fix="--fresh trains anew on the present images; or restore the files",
        )


def tell_new(place: RunFolder, called: str, asked: Recipe) -> None:
    """Says of a new run which one of the same name is most like it, and in what it differs."""
    if place.facts():
        return
    best: tuple[RunFolder, list[str]] | None = None
    for other in run.runs_named(called)[-_LOOKED_AT:]:
        try:
            theirs = other.recipe()
        except ConvlensError:
            continue  # damaged or edited; it isn't this one's business
        differing = list(_differences(theirs, asked))
        if differing and (best is None or len(differing) < len(best[1])):
            best = other, differing
    if best is not None:
        other, differing = best
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        print_status(
            f"a new run, [bold]{escape(place.name)}[/]: {escape(other.name)} has another recipe "
            f"({escape(', '.join(differing[:_SHOWN]))}{more})"
        )


def _differences(theirs: Recipe, asked: Recipe) -> Iterator[str]:
    """What a run's resolved recipe says otherwise than one that may still have `auto` in it."""
    before, now = _flat(theirs), _flat(asked)
    for key in dict.fromkeys([*before, *now]):
        if now.get(key) != before.get(key) and now.get(key) != "auto":
            yield f"{key}={before.get(key)}, not {now.get(key)}"


def _flat(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json", exclude={"name", "about"})
    flat = {"augment": tree.pop("augment")}
    return flat | {f"{section}.{k}": v for section, keys in tree.items() for k, v in keys.items()}


def tell_changed(place: RunFolder, facts: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Says and notes what is no more as it was when the run began.

    Args:
        facts: of the run; none if it is new.
        now: `convlens`, `world_size` and `hardware` as they would be noted of a new run.
    """
    if not facts:
        return
    before, present = _bits(facts), _bits(now)
    changed = {k: [v, present[k]] for k, v in before.items() if k in present and v != present[k]}
    if not changed:
        return
    told = ", ".join(f"{key} {old}, now {new}" for key, (old, new) in changed.items())
    print_status(
        f"[bold]{escape(place.name)}[/] began elsewise ({escape(told)}): it goes on, but will not "
        "end with the bits of an uninterrupted run"
    )
    place.note({**now, "changed": [*facts.get("changed", []), changed]})


def _bits(facts: Mapping[str, Any]) -> dict[str, Any]:
    hardware = facts.get("hardware")
    hardware = hardware if isinstance(hardware, Mapping) else {}
    named = {key: hardware[key] for key in _HARDWARE if key in hardware}
    if "device" in named:  # which of several GPUs it is decides nothing
        named["device"] = str(named["device"]).partition(":")[0]
    if "convlens" in facts:
        named["convlens"] = facts["convlens"]
    if "trunk_cached" in facts:
        named["trunk_cached"] = facts["trunk_cached"]
    return named | {"processes": facts.get("world_size", 1)}
