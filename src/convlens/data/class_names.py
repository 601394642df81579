"""Names of classes that people write in several forms: `Cat` and `cat`, `12` and `00012`."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from convlens.data.layout import MAX_EXAMPLES, Problem, list_examples
from convlens.data.types import DataSource, Part
from convlens.errors import DataError, UsageError, close_matches, closest_match, did_you_mean

# Zero-width space, word joiner, byte order mark, direction marks. The joiners U+200C and U+200D
# are letters' neighbors in some scripts and are removed at the ends only.
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u2060\ufeff]|^[\u200c\u200d\\s]+|[\u200c\u200d\\s]+$")
# Cyrillic and Greek letters that look like Latin ones.
_LOOK_ALIKES = {
    "а": "a",
    "е": "e",
    "о": "o",
    "р": "p",
    "с": "c",
    "у": "y",
    "х": "x",
    "і": "i",
    "ј": "j",
    "ѕ": "s",
    "ԁ": "d",
    "һ": "h",
    "ѵ": "v",
    "ԛ": "q",
    "ԝ": "w",
    "в": "b",
    "к": "k",
    "м": "m",
    "н": "h",
    "т": "t",
    "α": "a",
    "ο": "o",
    "ρ": "p",
    "ι": "i",
    "ν": "v",
    "τ": "t",
    "υ": "u",
    "χ": "x",
    "κ": "k",
}
_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")
# What pandas, Python, SQL and spreadsheets write for a missing value.
_MISSING = frozenset(
    (
        "",
        "nan",
        "NaN",
        "NAN",
        "-nan",
        "None",
        "null",
        "NULL",
        "Null",
        "N/A",
        "n/a",
        "#N/A",
        "NA",
        "<NA>",
    )
)
_MAYBE_MISSING = frozenset({"none", "na", "nil", "-", "?", "unlabeled", "unlabelled", "undefined"})
MAX_LISTED_NAMES = 8


def strip_invisible(name: str) -> str:
    """Return `name` without zero-width characters and surrounding blanks."""
    return name.strip() if name.isascii() else _INVISIBLE.sub("", name)


def fold_class_name(name: str) -> str:
    """Return the same text for names that differ in case, leading zeros or `.0` only."""
    folded = unicodedata.normalize("NFC", name).strip().casefold()
    return str(int(folded.partition(".")[0])) if _NUMBER.fullmatch(folded) else folded


def _skeleton(name: str) -> str:
    """Return the same text for names that look alike, or differ in case and blanks only."""
    folded = fold_class_name(unicodedata.normalize("NFKC", name))
    if _NUMBER.fullmatch(folded):
        return folded  # with its sign
    folded = "".join(_LOOK_ALIKES.get(letter, letter) for letter in folded)
    return re.sub(r"[\s_-]+", "", folded) or folded


def is_missing_label(label: str) -> bool:
    """Return whether a label is empty, or what programs write for a missing value (`nan`)."""
    return label in _MISSING


def may_be_missing_label(label: str) -> bool:
    """Return whether people write this for a missing label, although it may be a class (`none`)."""
    return label.casefold() in _MAYBE_MISSING


def whole_numbers(labels: Iterable[str]) -> dict[str, str]:
    """Return the number of each label with a decimal point if all labels are whole numbers.

    Programs write `1.0` for the class 1 where a cell of its column is empty. Missing labels do not
    count.
    """
    names = sorted({label for label in labels if not is_missing_label(label)})
    if not all(map(_NUMBER.fullmatch, names)):
        return {}
    return {name: name.partition(".")[0] for name in names if "." in name}


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return class names in order: by number if all are numbers, else by name."""
    names = sorted(names)
    return tuple(sorted(names, key=int) if all(map(str.isdecimal, names)) else names)


def similar_class_names(names: Iterable[str]) -> list[list[str]]:
    """Return groups of names that look like the same one."""
    groups = defaultdict(list)
    for name in names:
        groups[_skeleton(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def describe_similar(group: Sequence[str]) -> str:
    """Name the classes of a group, with the letters that only look like Latin ones."""
    return " and ".join(f"{name!r}{_describe_letters(name)}" for name in group)


def _describe_letters(name: str) -> str:
    scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in name}
    others = sorted(script for script in scripts if script in ("CYRILLIC", "GREEK"))
    return f" (with {' and '.join(map(str.capitalize, others))} letters)" if others else ""


def match_class_names(names: Sequence[str], known: Sequence[str], where: str) -> dict[str, str]:
    """Match the classes of a data set with those of a model.

    Equal names are the same class. Others match if they differ only in case or leading zeros, and
    only one to one.

    Args:
        names: classes of the data set.
        known: classes of the model.
        where: name of the data set, for the error.

    Returns:
        The model's name of each class.

    Raises:
        DataError: the model does not know a class.
    """
    known_set, by_form = set(known), defaultdict(list)
    for name in known:
        by_form[fold_class_name(name)].append(name)
    matches = {}
    for name in names:
        candidates = [name] if name in known_set else by_form[fold_class_name(name)]
        if len(candidates) == 1:
            matches[name] = candidates[0]
    num_names = Counter(matches.values())
    # Two names for one class of the model: none of the two is certain, unless it is equal.
    matches = {n: m for n, m in matches.items() if n == m or num_names[m] == 1}
    unknown = [name for name in names if name not in matches]
    if unknown:
        near = {name: closest_match(name, known) for name in unknown[:MAX_LISTED_NAMES]}
        shown = (f"{name} (it has {match})" if match else name for name, match in near.items())
        example = next(((n, m) for n, m in near.items() if m), (unknown[0], known[0]))
        more = " ..." if len(known) > 12 else ""
        raise DataError(
            f"the model doesn't know {len(unknown)} of the classes: {', '.join(shown)}",
            where=where,
            fix=f"its classes are: {', '.join(known[:12])}{more}; to say which is meant: "
            f"{format_rename(*example)}",
        )
    return matches


def format_rename(name: str, new_name: str) -> str:
    """Return the override that renames a class."""
    return _format_renames({name: new_name})


def _format_renames(names: Mapping[str, str]) -> str:
    return f"'data.rename={json.dumps(names, ensure_ascii=False)}'"


def check_renamed(rename: Mapping[str, str], classes: Iterable[str]) -> None:
    """Raise a `UsageError` if `rename` (`data.rename`) names a class that does not exist."""
    classes = list(classes)
    unknown = [name for name in rename if name not in classes]
    if unknown:
        close = did_you_mean(close_matches(unknown[0], classes))
        raise UsageError(
            f"data.rename: no class {unknown[0]!r}",
            fix=close or f"the classes are: {', '.join(classes[:12])}",
        )


def are_numbers_for_names(unknown: Sequence[str], classes: Sequence[str]) -> bool:
    """Return whether the classes of a split are numbers, and those of the training split names."""
    are_numbers = all(map(str.isdecimal, unknown)) and not any(map(str.isdecimal, classes))
    return bool(unknown) and bool(classes) and are_numbers


def unknown_classes(
    split: str,
    unknown: Sequence[str],
    classes: Sequence[str],
    show: Callable[[str], str] = str,
) -> Problem:
    """Return the problem that classes of a split are not among those of the training split.

    Classes with a similar name among the latter are shown with it, and the fix renames them.

    Args:
        show: how the message writes a name.
    """
    message = f"classes in {split} that train lacks"
    if not are_numbers_for_names(unknown, classes):
        similar = {name: match for name in unknown if (match := _similar_class(name, classes))}
        items = [
            show(name) + (f" (train has {show(similar[name])})" if name in similar else "")
            for name in unknown
        ]
        return Problem(message, items, _offer_rename(similar))
    found = f"{list_examples(unknown)} (numbers; train has names: {list_examples(classes)})"
    fix = (
        "which number means which name is not known: write the names into the list, or give them "
        f"all, e.g. {format_rename(unknown[0], classes[0])}"
    )
    return Problem(message, [found], fix)


def _similar_class(name: str, classes: Sequence[str]) -> str:
    """Return the class that probably is the same one, or "". Numbers have to be equal."""
    if not _NUMBER.fullmatch(name):
        return closest_match(name, classes)
    return next((each for each in classes if fold_class_name(each) == fold_class_name(name)), "")


def _offer_rename(similar: Mapping[str, str]) -> str:
    """Return what to do if names mean the same classes as similar ones; empty without any."""
    pairs = dict(list(similar.items())[:MAX_EXAMPLES])
    if not pairs:
        return ""
    are_the_same = "they are the same classes" if len(pairs) > 1 else "it is the same class"
    return f"if {are_the_same}: {_format_renames(pairs)}{' ...' * (len(pairs) < len(similar))}"


def rename_classes(source: DataSource, rename: Mapping[str, str]) -> DataSource:
    """Return the source with other names of its classes; those with equal names are merged."""
    check_renamed(rename, source.classes)
    names = [rename.get(name, name) for name in source.classes]
    in_order = list(source.classes) == sorted(source.classes)
    classes = sorted(set(names)) if in_order else list(dict.fromkeys(names))
    new_label = np.array([classes.index(name) for name in names], np.int64)
    parts = {
        split: Part(part.images, new_label[part.labels], part.ids, part.groups)
        for split, part in source.parts.items()
    }
    return DataSource(source.name, tuple(classes), parts, source.notes)
