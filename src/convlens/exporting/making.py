"""The job of `convlens export`: files that are kept only once they have proven themselves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from convlens import device, run
from convlens.errors import ModelFileError, ResourceError, UsageError
from convlens.exporting import agreement
from convlens.exporting.agreement import Agreement, Witness
from convlens.exporting.formats import FORMATS, Body, captured, described, texts
from convlens.formats.onnxfile import needed
from convlens.names import pick
from convlens.run import RunFolder
from convlens.system import files
from convlens.system.console import print_status, quieted

PATIENCE = 60.0  # seconds to wait for another export that puts its files in place


@dataclass(frozen=True)
class Export:
    """An exported file that was read back from the disk and answered as convlens does.

    `proof` says on what and how exactly. All of this stands in FILE.json beside it, too.
    """

    format: str
    path: str
    sha256: str
    bytes: int
    run: str
    source_sha256: str
    classes: list[str]
    input: str
    outputs: str
    preprocessing: dict[str, Any]
    proof: Agreement
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@device.preserve_torch_settings()
def export(
    place: RunFolder,
    to: Sequence[str] = ("onnx",),
    *,
    output: str | Path | None = None,
    data: str | Path | None = None,
    quiet: bool = False,
) -> list[Export]:
    """Writes a run's model as files for other programs, one for each format.

    Args:
        to: names of `FORMATS`.
        output: where to, with the format's suffix; by default beside the model file.
        data: a set to compare answers on; by default the run's validation images.

    Raises:
        UsageError: no such format, a package that isn't there, a file of another suffix.
        ModelFileError: torch can't translate the network, or what was written doesn't agree with
            convlens: then no file is left.
    """
    names = list(dict.fromkeys(to))
    if not names:
        raise UsageError("no format to export to", fix=f"choose from: {', '.join(FORMATS)}")
    chosen = {name: pick(FORMATS, name, "format") for name in names}
    targets = {name: _target(place, name, output, len(names)) for name in names}
    for form in chosen.values():
        for package in form.packages:
            needed(package)  # before minutes of work
    with quieted(quiet):
        loaded = run.load_model(place.model_path)
        seen = agreement.pictures(place, loaded, None if data is None else str(data))
        witness = Witness(loaded, seen)
        facts = described(loaded, witness.at_once)
        program = captured(loaded)
        return [
            _proven(name, form.make(program), targets[name], facts, witness, form.packages)
            for name, form in chosen.items()
        ]


def _target(place: RunFolder, name: str, output: str | Path | None, count: int) -> Path:
    suffix = FORMATS[name].suffix
    if output is None:
        return place.model_path.with_suffix(suffix)
    if count > 1:
        raise UsageError("one file for several formats", fix="leave out --output, or one --to each")
    if Path(output).suffix.lower() != suffix:
        raise UsageError(f"{name} files end in {suffix}", where=str(output), fix="rename it")
    return Path(output)


def _proven(
    name: str,
    body: Body,
    target: Path,
    facts: dict[str, Any],
    witness: Witness,
    packages: Sequence[str],
) -> Export:
    """Writes the file under another name, lets it answer, and only then gives it its own."""
    with _draft(target) as draft:
        proof = _agreement(body, draft, facts, witness, target)
        # With the proof inside it is another file, so it has to answer again.
        told = {**facts, "proof": proof.to_dict()}
        proof = _agreement(body, draft, told, witness, target)
        content = draft.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    made = Export(
        format=name,
        path=str(target),
        sha256=digest,
        bytes=len(content),
        run=facts["run"],
        source_sha256=facts["source_sha256"],
        classes=list(witness.classes),
        input=facts["input"],
        outputs=facts["outputs"],
        preprocessing=witness.preprocessing,
        proof=proof,
        versions={
            "convlens": facts["convlens"],
            "torch": torch.__version__,
            **{package: str(needed(package).__version__) for package in packages},
        },
    )
    with _alone(target):
        _keep(target, content, made)
    print_status(f"{name}: {escape(proof.sentence())}")
    for tie in proof.near_ties:
        print_status(escape(f"near-tie: {tie['image']}: {tie['convlens']} or {tie['exported']}"))
    return made


@contextlib.contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A name beside `target` that nobody else has: another export of it may be at work."""
    files.sweep(target.parent, [target.name, f"{target.name}.json"], alone=False)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}{files.PART}")
    try:
        yield draft
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Only one export at a time: else of two a file could get the other's FILE.json."""
    lock = target.with_name(f".{target.name}.lock")
    with files.lock(lock, what=f"the export to {target.name}", patience=PATIENCE):
        try:
            yield
        finally:  # held, so that who waits for it looks for it anew
            with contextlib.suppress(OSError):
                lock.unlink()


def _agreement(
    body: Body, draft: Path, facts: dict[str, Any], witness: Witness, target: Path
) -> Agreement:
    """Writes the draft, reads it back from the disk, and compares what it says and answers."""
    written = body.sealed(facts)
    files.write_atomic(draft, written)
    found, ask = body.opened(draft, written)
    right = {**facts, "classes": list(witness.classes), "preprocessing": witness.preprocessing}
    changed = [key for key, value in texts(right).items() if found.get(key) != value]
    if changed:
        raise ModelFileError(
            f"the exported file says something else than the model: {', '.join(changed)}",
            where=str(target),
            fix="try again; if it stays so, tell us",
        )
    return witness.compare(ask, str(target))


def _keep(target: Path, content: bytes, made: Export) -> None:
    """The proven bytes under their name, with FILE.json beside; both or none.

    A kill in between can leave a file without its FILE.json, but none with that of another.
    """
    beside = target.with_name(target.name + ".json")
    aside = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}{files.PART}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(beside, aside)
    try:
        files.write_atomic(target, content)
    except BaseException:  # what was there before is intact
        with contextlib.suppress(OSError):
            os.replace(aside, beside)
        raise
    try:
        if files.sha256(target) != made.sha256:
            raise ResourceError("the disk gives back other bytes", where=str(target))
        text = json.dumps(made.to_dict(), indent=1, ensure_ascii=False)
        files.write_atomic(beside, text + "\n")
    except BaseException:
        for path in (target, beside):
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
