"""The Python API of looking: inside networks, at runs side by side, at what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convlens.api import Run
from convlens.errors import UsageError
from convlens.recipe import Recipe
from convlens.run import find
from convlens.system.console import quieted

if TYPE_CHECKING:
    from convlens.comparing.comparison import Comparison
    from convlens.diagnosing.diagnosis import Diagnosis
    from convlens.inspection.looking import Look
    from convlens.inspection.measuring import Measurements
    from convlens.labelling.suspects import LabelReport
    from convlens.reporting.building import Report


def look(
    runs: str | Path | Run | Sequence[str | Path | Run],
    images: str | Path | Sequence[str | Path] = (),
    *,
    device: str | None = None,
    quiet: bool = True,
    **options: Any,
) -> Look:
    """Draws what the layers of networks make of images, all networks side by side.

    Args:
        runs: one or several: runs (name, folder, model file or `Run`), or networks of torchvision
            or timm (`NAME[:WEIGHTS]`).
        images: files, folders, globs, `test:17`, `worst:5`, `class:cat:3`; without any, a few
            validation images, unless only filters and the like are asked for.
        options: as in `inspection.looking.Options`, and on the command line: `layers`, `order`,
            `channels`, `filters`, `top_images`, `dream`, `attribution`, `measure`, `embedding`,
            `nearest` and more.

    Raises:
        ConvlensError: with what, where and what to do.

    Example:
        >>> seen = convlens.look(["resnet18", "resnet18-tiny"], ["cat.png", "worst:3"])
        >>> seen.files, seen.seen[0][1].maps["layer1.0"].shape
    """
    from convlens.inspection import choosing, looking

    listed = ("layers", "filters", "top_images", "dream", "attribution", "measure", "embedding")
    options |= {k: _several(options[k]) for k in listed if k in options}
    try:
        asked = looking.Options(**options)
    except TypeError as error:
        known = ", ".join(looking.Options.__dataclass_fields__)
        raise UsageError(f"look: {error}", fix=f"its options are {known}") from error
    asked.check()
    with quieted(quiet):
        opened = choosing.open_all(
            [*_texts(runs), *map(str, _several(images))],
            on=device,
            examples=asked.needs_images,
        )
        return looking.look(opened, asked)


def measure(
    runs: str | Path | Run | Sequence[str | Path | Run],
    measures: str | Sequence[str] = (),
    *,
    folder: str | Path | None = None,
    device: str | None = None,
    quiet: bool = True,
    **options: Any,
) -> Measurements:
    """Measures every stage of one or several networks over images, and draws one figure.

    Args:
        runs: a run or several, by name, folder or model file; or networks of torchvision or timm.
        measures: some of `convlens.inspection.measuring.NAMES`; all by default.
        folder: of the figures; `plots/RUN/look`, of several `plots/look-RUN-RUN`, by default.
        options: `split`, `data`, `layers`, `images`, `learn_from`, `untrained`, `seed`, as in
            `convlens.inspection.measuring.measure`.

    Example:
        >>> found = convlens.measure(["resnet18", "resnet18-noaug"], ["probe", "picture"])
        >>> found.networks[0].stages["layer4.1"]["probe"].value
    """
    from convlens.inspection import measuring
    from convlens.inspection.choosing import folder_of
    from convlens.inspection.subjects import open_subject

    names = _several(measures)
    measuring.chosen(names)
    subjects = [open_subject(text, on=device) for text in _texts(runs)]
    place = folder_of(subjects) if folder is None else Path(folder)
    return measuring.measure(subjects, names, folder=place, quiet=quiet, **options)


def compare(
    *runs: str | Path | Run,
    split: str = "test",
    data: str | Path | None = None,
    force: bool = False,
    device: str | None = None,
    quiet: bool = True,
) -> Comparison:
    """Puts runs side by side, and says which can be told apart from the first.

    Example:
        >>> result = convlens.compare("resnet18", "resnet18-noaug")
        >>> result.verdicts[0].sentence

    Args:
        runs: at least two; those that differ only in their seeds are taken together.
        split, data, force, device: as on the command line.
    """
    from convlens.comparing import comparison

    names = [run._folder if isinstance(run, Run) else run for run in runs]
    return comparison.compare(names, split, data=data, force=force, on=device, quiet=quiet)


def diagnose(run: str | Path | Run, *, device: str | None = None, quiet: bool = True) -> Diagnosis:
    """Diagnose a run: overfitting, learning rate, dead layers and more, with evidence and remedy.

    Example:
        >>> [(finding.rule, finding.overrides) for finding in convlens.diagnose("mnist").findings]
    """
    from convlens.diagnosing import diagnosis

    folder = run._folder if isinstance(run, Run) else find(run)
    return diagnosis.diagnose(folder, on=device, quiet=quiet)


def report(
    *runs: str | Path | Run,
    output: str | Path | None = None,
    audit: bool | None = None,
    device: str | None = None,
    quiet: bool = True,
) -> Report:
    """Writes one HTML page about a run, or one that compares several; `Report.path` is where.

    Args:
        output: the file; by default below `plots/`.
        audit: whether to look at every image of the data set; by default where they are few.
    """
    from convlens.reporting import building

    return building.report(_texts(runs), output=output, audit=audit, on=device, quiet=quiet)


def find_label_errors(
    what: str | Path | Mapping[str, Any] | Recipe | Run,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    data: str | Path | None = None,
    folds: int = 5,
    test: bool = False,
    name: str | None = None,
    fresh: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> LabelReport:
    """Names images whose labels are probably wrong, by models that didn't train on them.

    Args:
        what, overrides, data, name, fresh, device, quiet: as in `train`; `what` may be a run,
            whose recipe is then taken.
        folds: so many models are trained, each judges the images of its fold.
        test: judges the test split as well, by all models; their runs log that look.

    Returns:
        Suspects with suggestions, the surest first, probabilities and scores of all images, and
        the paths of a sheet of pictures and of a CSV to correct.

    Raises:
        ConvlensError: with what, where and what to do.
    """
    from convlens.labelling import finding

    if isinstance(what, Run):
        alone = what._folder.model_path
        what = alone if alone.is_file() else what.path
    return finding.find_label_errors(
        what,
        overrides,
        data=data,
        folds=folds,
        test=test,
        name=name,
        fresh=fresh,
        on=device,
        quiet=quiet,
    )


def _several(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | Path | Run) else list(value)


def _texts(runs: Any) -> list[str]:
    """Runs as the command line names them."""
    return [str(each.path if isinstance(each, Run) else each) for each in _several(runs)]
