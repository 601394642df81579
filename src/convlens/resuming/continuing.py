"""Whether a run can go on, and what is to be said if something isn't as it was when it began.

Another recipe is another run, in a folder of its own. Other images end it. Another machine, another
version or another number of processes may go on, but then the bits aren't those that an
uninterrupted run would have ended with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from convlens.data import Data
from convlens.errors import DataError, ModelFileError, ResourceError
from convlens.recipe import Recipe
from convlens.run import RunFolder
from convlens.system.console import print_status

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
