"""Find the files that a list of images names.

The paths of a list are often not those on this disk: another system wrote them, extensions are
missing, or the images were moved. `PathFinder` tries the usual explanations, each folder being
read once, and says which of them it used (`Resolution.notes`) or why files are missing
(`Resolution.hints`).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from urllib.parse import unquote

from convlens.data.class_names import strip_invisible
from convlens.data.layout import is_annotation_name, list_examples
from convlens.data.scan import JUNK_FOLDERS, is_directory, is_regular_file
from convlens.data.types import is_image_name

MAX_FOLDERS = 2000  # folders that are searched for the images of a list
MAX_DEPTH = 4  # levels below the list that are searched
MAX_COMPARISONS = 5_000_000  # paths x folders; more would take too long
NUM_PROBES = 20  # paths that decide which folders are searched for all
MAX_SHARE_SAMPLE = 2000  # values that decide whether a column contains paths

_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:/")
# `/data/upload/1/abcd1234-cat.jpg`: Label Studio puts eight random digits before the name.
_UPLOAD = re.compile(r"(?:^|/)upload/(?:\d+/)?[0-9a-f]{8}-([^/]+)$")


@dataclass
class Resolution:
    """Where the files of a list are.

    Attributes:
        files: the absolute path of each file, or None.
        notes: what was changed to find them.
        hints: why files were not found, and the key that helps.
        fix: the most useful of these keys with its value, or empty.
    """

    files: list[str | None]
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    fix: str = ""


class PathFinder:
    """Finds the files of one list.

    Args:
        folder: the folder of the list; its paths are relative to it.
        images: another folder that they may be relative to (`data.images`).
        name: of the list without its suffix. Its paths may also be relative to a folder of this
            name beside it, such as `test` beside `test.csv`.
    """

    def __init__(self, folder: str, images: str | None = None, name: str = "") -> None:
        self._folder = folder
        self._bases = [folder] if images is None else [images, folder]
        self._namesake = os.path.join(folder, name) if name else ""
        if self._namesake and os.path.isdir(self._namesake):
            self._bases.append(self._namesake)
        self._listings = _Listings()

    def is_file(self, path: str) -> bool:
        """Return whether `path` is a file as it is written."""
        return any(self._listings.exact(base, path) for base in self._bases)

    def share(self, paths: Sequence[str]) -> float:
        """Return the share of the non-empty `paths` that are files, of a sample of many."""
        values = [path for path in dict.fromkeys(paths) if path]
        step = -(-len(values) // MAX_SHARE_SAMPLE) or 1
        sample = values[::step]
        return sum(file is not None for file in self.resolve(sample).files) / max(1, len(sample))

    def resolve(self, paths: Sequence[str]) -> Resolution:
        """Find the files of all paths. Files as they are written have priority."""
        files: dict[str, str | None] = dict.fromkeys(paths)
        repairs: Counter[str] = Counter()
        hints: list[str] = []
        for path in files:
            file = next(filter(None, (self._listings.exact(b, path) for b in self._bases)), None)
            files[path] = file or self._find_similar(path, repairs, hints)
        result = Resolution([], hints=hints)
        in_namesake = sum(
            file is not None and file == self._listings.exact(self._namesake, path)
            for path, file in files.items()
            if self._namesake and not os.path.isabs(path)
        )
        if in_namesake:
            name = self._relative(self._namesake)
            result.notes.append(f"{in_namesake:,} files were found in {name}")
        self._find_moved(files, result)
        self._find_in_other_folder(files, result)
        self._find_uploaded(files, result)
        missing = [path for path, file in files.items() if file is None and path]
        if missing:
            self._explain(missing, result)
        total = len(files)
        changed = [f"{count:,} of {total:,} {repair}" for repair, count in repairs.items()]
        result.notes[:0] = [f"paths repaired: {', '.join(changed)}"] if changed else []
        result.files = [files[path] for path in paths]
        return result

    def _find_similar(self, path: str, repairs: Counter[str], hints: list[str]) -> str | None:
        """Return the file that is meant by a path in another notation, without its extension, or
        in another case."""
        cleaned, changes = _clean(path)
        for base in self._bases:
            file = self._listings.exact(base, cleaned)
            if file is None:
                matches, change = self._listings.similar(base, cleaned)
                if len(matches) > 1:
                    names = ", ".join(os.path.basename(match) for match in matches[:3])
                    _add_once(hints, f"several files may be meant by {path}: {names}")
                    return None
                file = matches[0] if matches else None
                changes = [*changes, change] if matches else changes
            if file is not None:
                repairs.update(changes)
                return file
        return None

    def _find_moved(self, files: dict[str, str | None], result: Resolution) -> None:
        """Find files whose first folders have other names here, e.g. those of another machine.

        If some files are where the list says, the others are missing: a file of the same name in
        another folder is another image.
        """
        cleaned = {path: _clean(path)[0] for path in files if path}
        for is_absolute in (True, False):
            paths = [path for path, text in cleaned.items() if _is_absolute(text) == is_absolute]
            if any(files[path] for path in paths):
                continue
            parts = {path: _parts(cleaned[path]) for path in paths}
            common = _common_folders(parts.values())
            best: dict[str, str] = {}
            num_dropped = 0
            for count in range(0 if is_absolute else 1, len(common) + 1):
                tails = {path: "/".join(names[count:]) for path, names in parts.items()}
                found = {p: file for p, t in tails.items() if (file := self._find_any(t))}
                if len(found) > len(best):
                    best, num_dropped = found, count
                if len(best) == len(paths):
                    break
            if best:
                files.update(best)
                prefix = "/".join(common[:num_dropped])
                prefix = f"/{prefix}" if next(iter(best)).startswith("/") else prefix
                result.notes.append(
                    f"{len(best):,} of {len(files):,} paths begin with {prefix}, which is not "
                    "here: the rest of each path was found"
                )

    def _find_any(self, path: str) -> str | None:
        return next(filter(None, (self._find_in(base, [path]) for base in self._bases)), None)

    def _find_in_other_folder(self, files: dict[str, str | None], result: Resolution) -> None:
        """Find files that are in a folder beside the list, if no file is where the list says.

        They count if all are in the same folder, or each in exactly one.
        """
        missing = [path for path, file in files.items() if file is None and path]
        if not missing:
            return
        texts = _texts_without_common_folders(missing)
        probes = missing[:: max(1, len(missing) // NUM_PROBES)][:NUM_PROBES]
        folders, hits = list[str](), list[str]()
        for folders in self._searched_folders():
            hits = [f for f in folders if any(self._find_in(f, texts[path]) for path in probes)]
            if hits:
                break
        hits = hits[: max(1, MAX_COMPARISONS // len(missing))]
        if not hits:
            return
        found = {
            folder: {p: file for p in missing if (file := self._find_in(folder, texts[p]))}
            for folder in hits
        }
        complete = [folder for folder in hits if len(found[folder]) == len(missing)]
        are_all_missing = not any(files.values())
        if are_all_missing and len(complete) == 1:
            files.update(found[complete[0]])
            result.notes.append(
                f"{len(missing):,} files were found in {self._relative(complete[0])}"
            )
        elif are_all_missing and (by_name := self._find_by_name(folders, texts)):
            files.update(by_name)
            names = sorted({self._relative(os.path.dirname(file)) for file in by_name.values()})
            result.notes.append(
                f"{len(missing):,} files were found by name in {len(names)} folders: "
                f"{list_examples(names)}"
            )
        elif len(complete) > 1:
            names = [self._relative(folder) for folder in complete]
            result.hints.append(f"they are in each of the folders {list_examples(names)}")
            result.fix = " or ".join(f"data.images={name}" for name in names[:3])
        else:
            largest = max(hits, key=lambda folder: len(found[folder]))
            name, count = self._relative(largest), len(found[largest])
            example = self._relative(next(iter(found[largest].values())))
            result.hints.append(
                f"{example} is there, like {count:,} of {len(missing):,}: data.images={name}"
            )
            result.fix = f"data.images={name}" if are_all_missing else ""

    def _find_uploaded(self, files: dict[str, str | None], result: Resolution) -> None:
        """Find uploads to Label Studio under the names that they had before."""
        names = {
            path: match[1]
            for path, file in files.items()
            if file is None and (match := _UPLOAD.search(_clean(path)[0]))
        }
        if not names:
            return
        counts = Counter(names.values())
        names = {path: name for path, name in names.items() if counts[name] == 1}
        found = dict(zip(names, self.resolve(list(names.values())).files, strict=True))
        if num_found := sum(file is not None for file in found.values()):
            files.update(found)
            result.notes.append(
                f"{num_found:,} of {len(files):,} paths are uploads to Label Studio, which were "
                "found under their original names"
            )

    def _find_by_name(
        self, folders: Sequence[str], texts: Mapping[str, Sequence[str]]
    ) -> dict[str, str]:
        """Return the file of each path by its name, if each occurs in exactly one of `folders`."""
        paths_of: dict[str, list[str]] = defaultdict(list)
        for folder in folders:
            listing = self._listings.of(folder)
            for name in () if listing is None else filter(is_image_name, listing.files):
                for key in (name, os.path.splitext(name)[0]):
                    paths_of[key].append(os.path.join(folder, name))
        found = {}
        for path, (*_, text) in texts.items():
            if len(paths_of.get(text, ())) != 1:
                return {}
            found[path] = paths_of[text][0]
        return found

    def _find_in(self, folder: str, texts: Sequence[str]) -> str | None:
        """Return the file that one of `texts` means below `folder`."""
        for text in texts:
            if file := self._listings.exact(folder, text):
                return file
            matches, _ = self._listings.similar(folder, text)
            if len(matches) == 1:
                return matches[0]
        return None

    def _searched_folders(self) -> list[list[str]]:
        """Return the folders that may hold the images, in groups, the likeliest first.

        Folders below the list come before those beside it, and folders of annotations, such as
        masks with the names of the images, come last.
        """
        below = self._folders_below()
        are_annotations = is_annotation_name(os.path.basename(self._folder))
        beside = self._folders_beside() if are_annotations or not below else []
        groups = [
            [f for f in folders if not any(map(is_annotation_name, self._relative(f).split("/")))]
            for folders in (below, beside)
        ]
        return [*groups, below, beside]

    def _folders_below(self) -> list[str]:
        """Return the folders below those that paths are relative to, breadth first."""
        folders: list[str] = []
        for base in self._bases:
            folders += self._listings.tree(base, MAX_DEPTH)
        return list(dict.fromkeys(folders))

    def _folders_beside(self) -> list[str]:
        """Return the folder above that of the list, and those below it.

        A folder of lists, such as `annotations/`, often lies beside that of the images.
        """
        parent = os.path.dirname(self._folder)
        listing = self._listings.of(self._folder)
        if parent == self._folder or listing is None or listing.by_stem:
            return []
        folders = [parent, *self._listings.tree(parent, 2)]
        return [folder for folder in folders if folder not in self._bases]

    def _relative(self, folder: str) -> str:
        return os.path.relpath(folder, self._folder).replace(os.sep, "/")

    def _explain(self, missing: Sequence[str], result: Resolution) -> None:
        """Add the reasons why files are missing."""
        total = len(missing)
        kinds = {
            "have a backslash": [path for path in missing if "\\" in path],
            "are absolute": [path for path in missing if _is_absolute(_clean(path)[0])],
            "have no extension": [path for path in missing if not PurePosixPath(path).suffix],
        }
        for kind, paths in kinds.items():
            if paths:
                result.hints.append(f"{len(paths):,} of {total:,} {kind}")
        for path in missing[:NUM_PROBES]:
            stem, extension = os.path.splitext(_clean(path)[0])
            for base in self._bases if extension else ():
                matches, _ = self._listings.similar(base, stem)
                if matches:
                    result.hints.append(
                        f"{os.path.basename(matches[0])} is there instead of {path}"
                    )
                    return


def is_url(text: str) -> bool:
    """Return whether a text is an address with a scheme, such as `https://...` or `s3://...`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None and not is_file_url(text)


def is_file_url(text: str) -> bool:
    """Return whether a text is the address of a file on this machine: `file:///...`."""
    return text[:5].lower() == "file:"


def path_of_file_url(text: str) -> str:
    """Return the path in the address of a file."""
    path = unquote(re.sub(r"^//(localhost(?=/))?", "", text[5:]))
    return path[1:] if _WINDOWS_DRIVE.match(path[1:]) else path


def _clean(path: str) -> tuple[str, list[str]]:
    """Return a path in the notation of this system, and what was changed."""
    changes = []
    text = strip_invisible(path)
    if text != path:
        changes.append("without invisible characters")
    if "?d=" in text:  # Label Studio's address of a local file
        text = unquote(text.partition("?d=")[2])
        changes.append("from an address of Label Studio")
    elif is_file_url(text):
        text = path_of_file_url(text)
        changes.append("from a file:// address")
    elif re.search(r"%[0-9A-Fa-f]{2}", text):
        text = unquote(text)
        changes.append("with blanks and other characters for %20 and the like")
    if "\\" in text:
        text = text.replace("\\", "/")
        changes.append("with / for \\")
    if text.startswith("~"):
        text = os.path.expanduser(text)
        changes.append("with the home folder for ~")
    return text, changes


def _is_absolute(path: str) -> bool:
    return path.startswith("/") or _WINDOWS_DRIVE.match(path) is not None


def _parts(path: str) -> list[str]:
    """Return folders and name of a path with slashes, without root, drive and `.`."""
    return [part for part in path.split("/") if part not in ("", ".")]


def _texts_without_common_folders(paths: Sequence[str]) -> dict[str, list[str]]:
    """Return each path as it is, if it is relative, and without the folders that all share."""
    cleaned = {path: _clean(path)[0] for path in paths}
    parts = {path: _parts(text) for path, text in cleaned.items()}
    num_common = len(_common_folders(parts.values()))
    return {
        path: [*([] if _is_absolute(text) else [text]), "/".join(parts[path][num_common:])]
        for path, text in cleaned.items()
    }


def _common_folders(paths: Iterable[Sequence[str]]) -> list[str]:
    """Return the folders that all paths (as parts) begin with."""
    folders: list[str] | None = None
    for parts in paths:
        parents = parts[:-1]
        if folders is None:
            folders = list(parents)
        else:
            pairs = zip(folders, parents, strict=False)
            length = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            folders = folders[: min(len(folders), len(parents)) if length is None else length]
    return folders or []


def _fold(name: str) -> str:
    """Return the same text for names that differ in case or in their Unicode form only."""
    return unicodedata.normalize("NFC", name).casefold()


def _add_once(hints: list[str], hint: str) -> None:
    """Add a hint, of which one example is enough."""
    if not hints:
        hints.append(hint)


class _Listing:
    """Names of the files and folders in a folder."""

    def __init__(self, files: set[str], folders: set[str]) -> None:
        self.files, self.folders = files, folders

    @cached_property
    def folded_files(self) -> dict[str, list[str]]:
        return _group_by(self.files, _fold)

    @cached_property
    def folded_folders(self) -> dict[str, list[str]]:
        return _group_by(self.folders, _fold)

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        return _group_by(filter(is_image_name, self.files), lambda name: os.path.splitext(name)[0])

    @cached_property
    def by_folded_stem(self) -> dict[str, list[str]]:
        names = filter(is_image_name, self.files)
        return _group_by(names, lambda name: _fold(os.path.splitext(name)[0]))


def _group_by(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in sorted(names):
        groups[key(name)].append(name)
    return dict(groups)


class _Listings:
    """Looks up files in the listings of their folders, each of which is read once.

    A list of a million images would otherwise ask the system for each of them several times.
    """

    def __init__(self) -> None:
        self._listings: dict[str, _Listing | None] = {}
        self._folders: dict[tuple[str, str], str] = {}  # normalized, by base and path
        self._real_folders: dict[tuple[str, str], str | None] = {}

    def of(self, folder: str) -> _Listing | None:
        """Return the names in a folder: none if it does not exist; None if it can't be listed."""
        if folder not in self._listings:
            self._listings[folder] = _list_folder(folder)
        return self._listings[folder]

    def exact(self, base: str, path: str) -> str | None:
        """Return the absolute path of the file `path` below `base`."""
        if not path or "\0" in path:
            return None
        parent, name = os.path.split(path)
        if (base, parent) not in self._folders:
            self._folders[base, parent] = os.path.normpath(os.path.join(base, parent))
        folder = self._folders[base, parent]
        listing = self.of(folder)
        full = os.path.join(folder, name)
        exists = os.path.isfile(full) if listing is None else name in listing.files
        return full if exists else None

    def similar(self, base: str, path: str) -> tuple[list[str], str]:
        """Return files whose path differs in extension or case, and the difference.

        Several are returned if it is not clear which one is meant.
        """
        if not path or "\0" in path:
            return [], ""
        folder, name = os.path.split(os.path.normpath(os.path.join(base, path)))
        listing = self.of(folder)
        if listing is not None and name in listing.by_stem:
            return [
                os.path.join(folder, match) for match in listing.by_stem[name]
            ], "with extension"
        real_folder = self._real_folder(base, os.path.dirname(path))
        listing = None if real_folder is None else self.of(real_folder)
        if real_folder is None or listing is None:
            return [], ""
        for names, change in (
            (listing.folded_files, "in another case"),
            (listing.by_folded_stem, "with extension and in another case"),
        ):
            if matches := names.get(_fold(name)):
                if unicodedata.normalize("NFC", matches[0]) == unicodedata.normalize("NFC", name):
                    change = "in another Unicode form"
                return [os.path.join(real_folder, match) for match in matches], change
        return [], ""

    def _real_folder(self, base: str, path: str) -> str | None:
        """Return the folder `path` below `base` as it is written on the disk; None if unclear."""
        key = (base, path)
        if key not in self._real_folders:
            folder: str | None = os.path.normpath(os.path.join(base, path))
            assert folder is not None
            if not os.path.isdir(folder):
                parent, name = os.path.split(path.rstrip("/"))
                above = self._real_folder(base, parent) if name else None
                listing = None if above is None else self.of(above)
                matches = [] if listing is None else listing.folded_folders.get(_fold(name), [])
                folder = os.path.join(above or "", matches[0]) if len(matches) == 1 else None
            self._real_folders[key] = folder
        return self._real_folders[key]

    def tree(self, top: str, depth: int) -> list[str]:
        """Return up to `MAX_FOLDERS` folders below `top`, breadth first."""
        folders: list[str] = []
        level = [top]
        for _ in range(depth):
            level = [
                os.path.join(folder, name)
                for folder in level
                if (listing := self.of(folder)) is not None
                for name in sorted(listing.folders)
                if not name.startswith(".") and name not in JUNK_FOLDERS
            ]
            folders += level
            if len(folders) > MAX_FOLDERS:
                return folders[:MAX_FOLDERS]
        return folders


def _list_folder(folder: str) -> _Listing | None:
    try:
        with os.scandir(folder) as entries:
            files, folders = set(), set()
            for entry in entries:
                if is_regular_file(entry):
                    files.add(entry.name)
                elif is_directory(entry):
                    folders.add(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return _Listing(set(), set())
    except (OSError, ValueError):  # a folder that may be entered but not listed
        return None
    return _Listing(files, folders)
