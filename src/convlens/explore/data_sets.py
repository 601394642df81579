"""Routes of the part Data: the images of a data set, its splits, copies and unreadable files.

Sets are those of the runs and those that the command named. The rule for the sealed test split is
that of `convlens audit`: the number of its images of each class is shown, and that copies of them
are in other splits, but no test image, name or label. A run's test split can be opened, which is
logged as a use; that of another set stays sealed, since no run could log it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from convlens.errors import UsageError
from convlens.explore import web
from convlens.explore.jobs import Job, result_of
from convlens.explore.web import RequestBody, answer, read_json, workspace_of
from convlens.explore.workspace import OpenedRun, Workspace

if TYPE_CHECKING:
    from convlens.data.audit import Audit
    from convlens.data.dataset import Data, Split
    from convlens.data.duplicates import Duplicates
    from convlens.recipe import Recipe

RUN, SET = "run", "set"  # kinds of ids: `run:NAME`, `set:0`
IMAGES_PER_PAGE = 96
IMAGE_SIDE = 512  # pixels of one image
VIEW_SIDE = 160  # pixels of an augmented view
VIEWS = 12
MAX_GROUPS = 40  # of copies that are shown with their images
MAX_IN_GROUP = 6
MAX_UNREADABLE = 500


def data_routes() -> list[Route]:
    posts = {
        "sets": list_sets,
        "open": open_set,
        "images": list_images,
        "image": show_image,
        "check": check_set,
        "open-test": open_test_split,
    }
    return [Route(f"/api/data/{name}", view, methods=["POST"]) for name, view in posts.items()]


@dataclass
class OpenedSet:
    """A data set in memory.

    Attributes:
        recipe: how a training would read and augment it.
        run: the run whose data set it is; None for another one.
        audit: the result of `check_set`, once it is known.
    """

    data: Data
    recipe: Recipe
    run: OpenedRun | None = None
    audit: Audit | None = None

    @property
    def test_is_open(self) -> bool:
        return self.run is not None and self.run.test_is_open

    def split(self, name: str) -> Split:
        """Return a split.

        Raises:
            UsageError: the test split is sealed.
        """
        if name == "test":
            if self.run is None:
                raise _sealed_without_run()
            return self.run.split("test")
        return self.data.train if name == "train" else self.data.val

    def class_name(self, name: str, label: int) -> str:
        """Return the name of a label: those of the test split are in the order of the model."""
        if name == "test" and self.run is not None:
            return self.run.subject.classes[label]
        return self.data.classes[label]


def _sealed_without_run() -> UsageError:
    return UsageError("the test split is sealed", fix="train on this set, and open it in the run")


class SetBody(RequestBody):
    set: str


def _sets(request: Request) -> dict[str, OpenedSet]:
    """Return the data sets that are open, by their ids."""
    sets: dict[str, OpenedSet] = web.part_state(request, "data_sets", dict)
    return sets


async def _run_of(request: Request, set_id: str) -> OpenedRun | None:
    """Return the opened run of a set; None if it is not that of a run.

    Raises:
        UsageError: the server has not handed out that id.
    """
    kind, _, name = set_id.partition(":")
    if kind == RUN:
        return await web.open_run(request, name)
    workspace = workspace_of(request)
    if kind != SET or name not in map(str, range(len(workspace.data_names))):
        raise UsageError("no such data set on this page", fix="reload the page")
    return None


async def list_sets(request: Request) -> JSONResponse:
    """Answer with the ids and names of all data sets."""
    workspace = workspace_of(request)
    named = [
        {"id": f"{SET}:{number}", "name": Path(name).name or name}
        for number, name in enumerate(workspace.data_names)
    ]
    runs = [{"id": f"{RUN}:{run}", "name": f"data of {run}"} for run in workspace.run_ids()]
    return answer({"sets": [*named, *runs]})


async def open_set(request: Request) -> JSONResponse:
    """Open a data set as a job, since its images may have to be decoded first."""
    body = await read_json(request, SetBody)
    run = await _run_of(request, body.set)
    workspace, sets = workspace_of(request), _sets(request)

    def open_it(job: Job) -> dict[str, Any]:
        opened = sets.get(body.set)
        if opened is None or opened.run is not run:
            opened = _open_run_set(run) if run else _open_named_set(workspace, body.set)
            sets[body.set] = opened
        return _describe_set(opened)

    job = workspace.jobs.data.submit(open_it, f"open-{body.set}", "reading the images")
    return answer({"job": job.id})


def _open_run_set(run: OpenedRun) -> OpenedSet:
    from convlens import serialization

    data = run.data()
    recipe = serialization.recipe_from_metadata(run.subject.loaded.model_metadata)
    config = recipe.data.model_copy(update={"name": data.name})  # where it is now
    return OpenedSet(data, recipe.model_copy(update={"data": config}), run)


def _open_named_set(workspace: Workspace, set_id: str) -> OpenedSet:
    """Open a set as a training with the default recipe would; unreadable files are left out."""
    from convlens.training import resolve, setup

    name = workspace.data_names[int(set_id.partition(":")[2])]
    requested = resolve.resolve_recipe(name).recipe
    recipe, data = setup.load_for_training(
        requested.replace(**{"data.on_bad": "skip", "data.max_bad": 0.999})
    )
    return OpenedSet(data, recipe)


def _describe_set(opened: OpenedSet) -> dict[str, Any]:
    import numpy as np

    data = opened.data
    n = len(data.classes)
    train = np.bincount(data.train.labels.numpy(), minlength=n)
    val = np.bincount(data.val.labels.numpy(), minlength=n)
    test = data.summary.counts - train - val
    classes = [
        {"name": name, "train": int(a), "val": int(b), "test": int(c)}
        for name, a, b, c in zip(data.classes, train, val, test, strict=True)
    ]
    return {
        "name": Path(data.name).name or data.name,
        "summary": str(data.summary),
        "classes": classes,
        "splits": {"train": int(train.sum()), "val": int(val.sum()), "test": int(test.sum())},
        "how": data.split_descriptions,
        "notes": list(data.notes),
        "per_page": IMAGES_PER_PAGE,
        "test_is_open": opened.test_is_open,
        "can_open_test": opened.run is not None,
        "test_uses": opened.run.test_uses() if opened.run else 0,
        "large": data.image_size > 96,
    }


async def _on_data(
    request: Request, set_id: str, function: Callable[[OpenedSet], dict[str, Any]]
) -> JSONResponse:
    """Answer with the result of a function of an opened set, in the queue of work on data."""
    opened = await _opened_set(request, set_id)
    jobs = workspace_of(request).jobs
    return answer(await result_of(jobs.data.submit(lambda job: function(opened))))


async def _opened_set(request: Request, set_id: str) -> OpenedSet:
    """Return a data set that the page has opened.

    Raises:
        UsageError: an unknown id, or the set is not open.
    """
    await _run_of(request, set_id)
    opened = _sets(request).get(set_id)
    if opened is None:
        raise UsageError("this data set is not open any more", fix="reload the page")
    return opened


class ImagesBody(SetBody):
    """Attributes:
    label: only images of this class; empty for all.
    page: from 0.
    """

    split: Literal["train", "val", "test"]
    label: str = ""
    page: int = Field(0, ge=0)


async def list_images(request: Request) -> JSONResponse:
    """Answer with a page of small images of a split."""
    body = await read_json(request, ImagesBody)

    def describe(opened: OpenedSet) -> dict[str, Any]:
        import torch

        split = opened.split(body.split)
        numbers = torch.arange(len(split))
        if body.label:
            names = [opened.class_name(body.split, n) for n in range(len(opened.data.classes))]
            if body.label not in names:
                raise UsageError("this data set has no such class", fix="choose another one")
            numbers = numbers[split.labels == names.index(body.label)]
        start = body.page * IMAGES_PER_PAGE
        shown = numbers[start : start + IMAGES_PER_PAGE]
        return {
            "total": len(numbers),
            "images": _describe_images(opened, body.split, shown.tolist()),
        }

    return await _on_data(request, body.set, describe)


def _describe_images(opened: OpenedSet, name: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
    from convlens.reports import html

    split = opened.split(name)
    sources = html.thumbnails(split, numbers)
    return [
        {
            "split": name,
            "number": number,
            "name": str(split.ids[number]),
            "label": opened.class_name(name, int(split.labels[number])),
            "source": source,
        }
        for number, source in zip(numbers, sources, strict=True)
    ]


class SetImageBody(SetBody):
    split: Literal["train", "val", "test"]
    number: int = Field(ge=0)


async def show_image(request: Request) -> JSONResponse:
    """Answer with one image as the network gets it, and as augmentation changes it."""
    body = await read_json(request, SetImageBody)

    def describe(opened: OpenedSet) -> dict[str, Any]:
        import torch

        from convlens import run_plots

        split = opened.split(body.split)
        if body.number >= len(split):
            raise UsageError("there is no such image", fix="reload the page")
        pixels = split.rows.gather(torch.tensor([body.number]))[0].numpy()
        views = run_plots.augmented_views(opened.recipe, opened.data, split, body.number, VIEWS)
        return {
            "name": str(split.ids[body.number]),
            "label": opened.class_name(body.split, int(split.labels[body.number])),
            "source": web.picture_source(pixels, IMAGE_SIDE),
            "size": pixels.shape[-1],
            "recipe": opened.recipe.name,
            "views": [web.picture_source(view, VIEW_SIDE) for view in views],
        }

    return await _on_data(request, body.set, describe)


async def open_test_split(request: Request) -> JSONResponse:
    """Open the sealed test split of a run's data after the page has asked; the use is logged."""
    body = await read_json(request, SetBody)
    run = await _run_of(request, body.set)
    if run is None:
        raise _sealed_without_run()
    return await web.open_test_split(request, run)


# -- copies and unreadable files --------------------------------------------------------------


async def check_set(request: Request) -> JSONResponse:
    """Look for copies and unreadable files, as `convlens audit` does; the answer is a job."""
    body = await read_json(request, SetBody)
    opened = await _opened_set(request, body.set)

    def check(job: Job) -> dict[str, Any]:
        from convlens.data.audit import audit

        if opened.audit is None:
            opened.audit = audit(opened.recipe.data)
        return _describe_audit(opened, opened.audit)

    job = web.start(
        workspace_of(request).jobs.long, check, f"check-{body.set}", "inspecting all images"
    )
    return answer({"job": job.id})


def _describe_audit(opened: OpenedSet, audit: Audit) -> dict[str, Any]:
    from convlens.data.sources import find_configured_source

    unreadable = audit.unreadable
    hidden = 0
    if not opened.test_is_open and unreadable:
        source = find_configured_source(opened.recipe.data)
        test = source.parts.get("test")
        sealed = set(test.ids) if test is not None else set()
        unreadable = [each for each in unreadable if each.id not in sealed]
        hidden = len(audit.unreadable) - len(unreadable)
    return {
        "images": audit.images,
        "unreadable": [
            {"name": each.id, "label": each.label, "reason": each.reason}
            for each in unreadable[:MAX_UNREADABLE]
        ],
        "unreadable_total": len(audit.unreadable),
        "unreadable_hidden": hidden,
        "exact": _describe_copies(opened, audit.duplicates),
        "near": _describe_copies(opened, audit.near_duplicates),
        "problems": audit.problems,
        "notes": audit.notes,
    }


def _describe_copies(opened: OpenedSet, copies: Duplicates) -> dict[str, Any]:
    """Return groups of copies; of a sealed test image only that there is one."""
    listed = copies.listed[:MAX_GROUPS]
    shown: dict[str, list[str]] = {}
    for group in listed:
        for identity, split in zip(group.ids, group.splits, strict=True):
            if split != "test" or opened.test_is_open:
                shown.setdefault(split, []).append(identity)
    found = {split: _find_images(opened, split, ids) for split, ids in shown.items()}
    groups = []
    for group in listed:
        members = list(zip(group.ids, group.splits, group.labels, strict=True))
        visible = {label for _, split, label in members if split in found}
        images = [
            found.get(split, {}).get(identity)
            or ({"split": "test", "sealed": True} if split not in found else {"name": identity})
            for identity, split, _ in members[:MAX_IN_GROUP]
        ]
        groups.append(
            {
                "images": images,
                "more": max(0, len(members) - MAX_IN_GROUP),
                "across_splits": group.across_splits,
                "two_labels": len(visible) > 1,
            }
        )
    return {"total": copies.groups, "across_splits": copies.across_splits, "groups": groups}


def _find_images(opened: OpenedSet, name: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the images of a split with these ids, as for a page of images."""
    wanted = set(ids)
    numbers = [n for n, identity in enumerate(opened.split(name).ids) if identity in wanted]
    images = _describe_images(opened, name, numbers)
    return {image["name"]: image for image in images}
