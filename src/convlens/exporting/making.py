"""The job of `convlens export`: a file is written only if its outputs agree with convlens's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from convlens import device, run
from convlens.errors import UsageError
from convlens.exporting.agreement import NumericalCheck, ReferenceOutputs, sample_images
from convlens.exporting.formats import FORMATS, capture, describe
from convlens.formats.onnxfile import require
from convlens.names import pick
from convlens.run import Loaded, RunFolder
from convlens.system import files
from convlens.system.console import print_status, quieted


@dataclass(frozen=True)
class Export:
    """An exported file and the numerical check (`proof`) that it passed."""

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
    proof: NumericalCheck
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@device.preserve_torch_settings()
def export(
    run_dir: RunFolder,
    to: Sequence[str] = ("onnx",),
    *,
    output: str | Path | None = None,
    data: str | Path | None = None,
    quiet: bool = False,
) -> list[Export]:
    """Write a run's model as files for other programs, one for each format.

    Args:
        to: names of `FORMATS`.
        output: the file's path, with the format's suffix; by default beside the model file.
        data: a data set to check outputs on; by default the run's validation images.

    Raises:
        UsageError: unknown format, missing package, or another suffix.
        ModelFileError: torch can't translate the network, or the translation does not reproduce
            convlens's outputs; then no file is written.
    """
    names = list(dict.fromkeys(to))
    if not names:
        raise UsageError("no format to export to", fix=f"choose from: {', '.join(FORMATS)}")
    chosen = [pick(FORMATS, name, "format") for name in names]
    if output is not None and len(names) > 1:
        raise UsageError("one file for several formats", fix="leave out --output, or one --to each")
    targets = [Path(output or run_dir.model_path.with_suffix(form.suffix)) for form in chosen]
    for name, form, target in zip(names, chosen, targets, strict=True):
        if target.suffix.lower() != form.suffix:
            raise UsageError(
                f"{name} files end in {form.suffix}", where=str(output), fix="rename it"
            )
        for package in form.packages:
            require(package)  # now, not after minutes of work
    with quieted(quiet):
        loaded = run.load_model(run_dir.model_path)
        images, source = sample_images(run_dir, loaded, None if data is None else str(data))
        reference = ReferenceOutputs(loaded, images, source)
        program = capture(loaded)
        return [
            write_checked(name, program, target, loaded, reference)
            for name, target in zip(names, targets, strict=True)
        ]


def write_checked(
    name: str, program: Any, target: Path, loaded: Loaded, reference: ReferenceOutputs
) -> Export:
    """Serialize a captured program, check the result, and only then write it to `target`."""
    form = FORMATS[name]
    facts = describe(loaded, reference)
    content = form.serialize(program, facts)
    # These very bytes are loaded and run, as a user of the file would, and then written.
    proof = reference.check(form.load(content, str(target)), str(target))
    files.remove_stale_temp_files(target.parent, [target.name], alone=False)
    files.write_atomic(target, content)
    print_status(f"{name}: {escape(proof.sentence())}")
    shared = ("run", "source_sha256", "classes", "input", "outputs", "preprocessing")
    return Export(
        format=name,
        path=str(target),
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        **{key: facts[key] for key in shared},
        proof=proof,
        versions={
            "convlens": facts["convlens"],
            "torch": torch.__version__,
            **{package: str(require(package).__version__) for package in form.packages},
        },
    )
