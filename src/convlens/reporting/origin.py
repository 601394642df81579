"""Where a run comes from: its recipe, what it ran on, and the commands that make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from convlens import recipe as store
from convlens.recipe import Recipe
from convlens.reporting.contents import Contents
from convlens.reporting.page import render, seconds

AUTO = "auto"


def recipe(found: Contents) -> Markup | None:
    """The resolved recipe, and where it differs from the published one of its name."""
    if found.recipe is None:
        return None
    changed = differences(found.recipe)
    return render(
        "recipe.html", recipe=found.recipe, text=found.recipe.to_text(), changed=changed,
        published=found.recipe.name in store.names(),
    )  # fmt: skip


def differences(mine: Recipe) -> list[tuple[str, str, str]]:
    """`(key, here, published)` wherever a run's recipe isn't the published one of its name.

    What the published one leaves to `auto` is no difference.
    """
    if mine.name not in store.names():
        return []
    ours, theirs = (flat(r.model_dump(mode="json")) for r in (mine, store.load(mine.name)))
    found = []
    for key in ours | theirs:
        here, there = ours.get(key, "–"), theirs.get(key, "–")
        if here != there and there != AUTO and key not in ("name", "about"):
            found.append((key, here, there))
    return found


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Dotted keys and their values as text; lists count as values."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[f"{above}{key}"] = plain
    return found


def environment(found: Contents) -> Markup | None:
    """Versions, hardware and fingerprints."""
    facts, card = found.facts, found.card
    hardware = dict(facts.get("hardware", {}))
    plan = dict(facts.get("plan", {}))
    rows = {
        "convlens": facts.get("convlens", card.get("convlens")),
        "Python": hardware.pop("python", None),
        "torch": hardware.pop("torch", None),
        "system": hardware.pop("system", None),
        "processor": hardware.pop("cpu", None),
        **{key.replace("_", " "): value for key, value in hardware.items()},
        "precision": plan.get("precision"),
        "memory format": plan.get("memory_format"),
        "deterministic": plan.get("deterministic"),
        "trained": facts.get("created"),
        "training time": _seconds(facts.get("training_seconds")),
        "processor time": _seconds(facts.get("cpu_seconds")),
        "weights": _count(facts.get("parameters")),
        "weights trained": _count(facts.get("trainable_parameters")),
    }
    hashes = {
        "data (SHA-256)": (facts.get("data") or card.get("data") or {}).get("fingerprint"),
        "model file (SHA-256)": card.get("sha256"),
        "recipe as asked for": next(iter(facts.get("digests", [])), None),
    }
    rows = {key: str(value) for key, value in rows.items() if value is not None}
    hashes = {key: value for key, value in hashes.items() if value}
    return render("environment.html", rows=rows, hashes=hashes) if rows or hashes else None


def reproduce(found: Contents) -> Markup | None:
    """The commands that train the same again, test it and make this page."""
    if found.recipe is None:
        return None
    name = shlex.quote(found.name)
    version = found.facts.get("convlens", found.card.get("convlens"))
    published = found.recipe.name in store.names() and not differences(found.recipe)
    commands = [(f"pip install convlens=={version}", "the version that trained it")]
    if published:
        again = "trains the recipe; a finished run of it is found, not trained again"
        commands.append((f"convlens train {shlex.quote(found.recipe.name)}", again))
    commands.append(
        (f"convlens train recipe.yaml --name {shlex.quote(found.name + '-again')}",
         "trains anew; recipe.yaml is the text above, also in the run's folder")
    )  # fmt: skip
    commands += [
        (f"convlens evaluate {name} --split {found.split}", "the numbers of this page"),
        (f"convlens report {name}", "this page"),
    ]
    return render("reproduce.html", commands=commands)


def _seconds(value: float | None) -> str | None:
    return None if value is None else seconds(value)


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
