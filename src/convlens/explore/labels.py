"""Routes of the part Labels: suspected labels, decisions on them, and training with the result.

The lists are those that `convlens labels` writes below `plots/`. Of a data set's test images they
name as suspects only what `convlens labels --test` has judged, which has been logged as a use.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from convlens.errors import DataError, ResourceError, UsageError
from convlens.explore import commands, label_review, web
from convlens.explore.commands import Background
from convlens.explore.jobs import Job, WorkQueue, result_of
from convlens.explore.label_review import Review
from convlens.explore.web import RequestBody, answer, read_json, workspace_of
from convlens.explore.workspace import Workspace
from convlens.run_folders import PLOTS_DIR

MAX_OPEN_REVIEWS = 8
IMAGE_SIDE = 448  # pixels of the image that is judged
# Where columns and classes of the data set are. The corrected list has its own columns and names.
DATA_KEYS = ("path_column", "label_column", "split_column", "images", "rename", "layout")


def labels_routes() -> list[Route]:
    posts = {
        "lists": list_tables,
        "open": open_review,
        "image": show_image,
        "decide": decide,
        "undo": undo,
        "find": find_suspects,
        "command": show_command,
        "train": train_again,
        "training": show_training,
    }
    return [Route(f"/api/labels/{name}", view, methods=["POST"]) for name, view in posts.items()]


@dataclass
class LabelWork:
    """What the part keeps: the open reviews, and the training that it has started."""

    plots: Path = field(default_factory=lambda: PLOTS_DIR.absolute())
    reviews: OrderedDict[str, Review] = field(default_factory=OrderedDict)
    trainings: dict[str, Background] = field(default_factory=dict)


def _work_of(request: Request) -> LabelWork:
    return web.part_state(request, "label_work", LabelWork)


async def _in_thread(request: Request, function: Callable[[], Any]) -> Any:
    """Run a function in the queue of work on data, so that its calls never overlap."""
    jobs = workspace_of(request).jobs
    return await result_of(jobs.data.submit(lambda job: function()))


class ReviewBody(RequestBody):
    review: str


def _open(work: LabelWork, name: str) -> Review:
    """Return the review of a list.

    Raises:
        UsageError: there is no such list.
        DataError: it is damaged.
    """
    if name not in work.reviews:
        tables = label_review.find_tables(work.plots)
        if name not in tables:
            raise UsageError("there is no such list of labels", fix="reload the page")
        work.reviews[name] = label_review.read_review(tables[name])
    work.reviews.move_to_end(name)
    while len(work.reviews) > MAX_OPEN_REVIEWS:
        work.reviews.popitem(last=False)
    return work.reviews[name]


async def list_tables(request: Request) -> JSONResponse:
    """Answer with the names of all lists that `convlens labels` has written here."""
    tables = await run_in_threadpool(label_review.find_tables, _work_of(request).plots)
    running = workspace_of(request).jobs.commands.running_or_waiting("labels")
    return answer({"lists": list(tables), "job": running.id if running else None})


async def open_review(request: Request) -> JSONResponse:
    """Answer with the suspects of a list and the decisions so far."""
    body = await read_json(request, ReviewBody)
    work = _work_of(request)

    def describe() -> dict[str, Any]:
        work.reviews.pop(body.review, None)  # `convlens labels` may have been run again
        review = _open(work, body.review)
        if review.of_files:
            review.write_corrected()  # of decisions before a server was killed
        return {
            "classes": review.classes,
            "of_files": review.of_files,
            "total": review.total,
            "known": len(review.decisions.lines),
            "decisions_file": _shown(work, review.decisions.path),
            "suspects": [
                {
                    "name": Path(suspect.image).name,
                    "label": suspect.label,
                    "split": suspect.split,
                    "suggested": suspect.suggested,
                    "score": suspect.score,
                    "p_suggested": suspect.p_suggested,
                    "copies": suspect.copies,
                    "decision": label_review.describe_decision(review.decisions.of(suspect.image)),
                }
                for suspect in review.suspects
            ],
        }

    return answer(await _in_thread(request, describe))


def _shown(work: LabelWork, path: Path) -> str:
    """Return a path relative to the folder in which the command was started."""
    return str(path.relative_to(work.plots.parent))


class SuspectBody(ReviewBody):
    number: int = Field(ge=0)


async def show_image(request: Request) -> JSONResponse:
    """Answer with the image of a suspect."""
    body = await read_json(request, SuspectBody)
    work = _work_of(request)

    def show() -> dict[str, Any]:
        suspect = _suspect(_open(work, body.review), body.number)
        return {"source": _image_source(suspect.image)}

    return answer(await _in_thread(request, show))


def _suspect(review: Review, number: int) -> label_review.Suspect:
    if number >= len(review.suspects):
        raise UsageError("there is no such image in this list", fix="reload the page")
    return review.suspects[number]


def _image_source(path: str) -> str:
    """Return an image file as a data URI.

    Raises:
        DataError: it cannot be read.
    """
    from convlens.data.decode import UnreadableImage, decode, read_bytes

    try:
        content = read_bytes(path)
        pixels = decode(content, size=None, channels=3, fit="pad", name=Path(path).name)
    except UnreadableImage as error:
        raise DataError(
            f"the image can't be read: {error.reason}", fix="delete it from the list, or skip it"
        ) from None
    return web.picture_source(pixels, IMAGE_SIDE)


# -- decisions --------------------------------------------------------------------------------


class PageBody(ReviewBody):
    """Attributes:
    page: a random name of the browser tab.
    known: number of lines of the decisions that the page has seen.
    """

    page: str = Field(min_length=8, max_length=40)
    known: int = Field(ge=0)


class DecideBody(PageBody):
    number: int = Field(ge=0)
    decision: Literal["keep", "change", "delete", "skip"]
    label: str = ""


async def decide(request: Request) -> JSONResponse:
    """Write a decision to the disk, then answer."""
    body = await read_json(request, DecideBody)
    work, jobs = _work_of(request), workspace_of(request).jobs

    def write() -> dict[str, Any]:
        review = _open(work, body.review)
        suspect = _suspect(review, body.number)
        if not review.of_files:
            raise UsageError(
                "the images of this data set are not files, so their labels cannot be corrected",
                fix="save them as files in a folder for each class",
            )
        if (body.decision == "change") != bool(body.label) or (
            body.label and body.label not in review.classes
        ):
            raise UsageError("a change needs one of the classes", fix="choose a class")
        accepted = review.decisions.decide(
            suspect.image, body.decision, body.label, body.page, body.known
        )
        return {"accepted": accepted, **_news(review, body.known)}

    content = await _in_thread(request, write)
    _update_corrected(jobs.data, work, body.review)
    return answer(content)


async def undo(request: Request) -> JSONResponse:
    """Take back the last decision of this page, then answer with the number of its image."""
    body = await read_json(request, PageBody)
    work, jobs = _work_of(request), workspace_of(request).jobs

    def take_back() -> dict[str, Any]:
        review = _open(work, body.review)
        undone = review.decisions.undo(body.page)
        images = [suspect.image for suspect in review.suspects]
        number = images.index(undone.image) if undone.image in images else None
        return {"number": number, **_news(review, body.known)}

    content = await _in_thread(request, take_back)
    _update_corrected(jobs.data, work, body.review)
    return answer(content)


def _news(review: Review, known: int) -> dict[str, Any]:
    """Return what has changed since the line `known`, by this page and others."""
    changed = set(review.decisions.changed_since(known))
    return {
        "known": len(review.decisions.lines),
        "changes": {
            str(number): label_review.describe_decision(review.decisions.of(suspect.image))
            for number, suspect in enumerate(review.suspects)
            if suspect.image in changed
        },
    }


def _update_corrected(queue: WorkQueue, work: LabelWork, name: str) -> None:
    """Write `corrected.csv` soon; of several decisions in a row, once."""
    with contextlib.suppress(ResourceError):  # the decision itself is on the disk
        queue.submit(lambda job: _open(work, name).write_corrected(), f"corrected-{name}")


# -- commands ---------------------------------------------------------------------------------


class FindBody(RequestBody):
    run: str
    folds: int = Field(5, ge=2, le=20)


async def find_suspects(request: Request) -> JSONResponse:
    """Start `convlens labels` for the data of a run; answer with the job."""
    body = await read_json(request, FindBody)
    workspace = workspace_of(request)
    path = workspace.path(body.run)
    arguments = ["labels", str(path), "--folds", str(body.folds)]

    def find(job: Job) -> dict[str, Any]:
        commands.run_command(job, arguments)
        return {}

    job = web.start(workspace.jobs.commands, find, "labels", commands.command_line(arguments))
    return answer({"job": job.id})


class TrainBody(ReviewBody):
    run: str
    name: str = Field("", max_length=80)


def _training_arguments(workspace: Workspace, work: LabelWork, body: TrainBody) -> list[str]:
    """Return the command that trains with the recipe of a run and the corrected labels.

    Raises:
        UsageError: the run has no recipe, the name is taken, or the images are not files.
    """
    from convlens.run import RunDir, safe_name

    review = _open(work, body.review)
    if not review.of_files:
        raise UsageError(
            "the images of this data set are not files, so the list cannot be used for training",
            fix="save them as files in a folder for each class",
        )
    path = workspace.path(body.run)
    recipe = path / "recipe.yaml"
    if not recipe.is_file():
        raise UsageError("this run has no recipe", fix="choose another run")
    name = body.name or f"{path.name}-corrected"
    if safe_name(name) != name or name.startswith("-"):
        raise UsageError(
            "this name cannot be the name of a folder",
            fix=f"for example {safe_name(name).lstrip('-')}",
        )
    data = RunDir(path).recipe().data
    defaults = type(data)()
    changed = [key for key in DATA_KEYS if getattr(data, key) != getattr(defaults, key)]
    resets = [f"data.{key}={'auto' if key == 'layout' else 'null'}" for key in changed]
    corrected = _shown(work, review.corrected)
    # The test split stays sealed until somebody opens it.
    return [
        "train", str(recipe), *resets, "--data", corrected, "--name", name, "--no-test"
    ]  # fmt: skip


async def show_command(request: Request) -> JSONResponse:
    """Answer with the command that `train_again` would start, and what the decisions change."""
    body = await read_json(request, TrainBody)
    workspace, work = workspace_of(request), _work_of(request)

    def describe() -> dict[str, Any]:
        arguments = _training_arguments(workspace, work, body)
        counts = _open(work, body.review).write_corrected()
        name = arguments[arguments.index("--name") + 1]
        return {"command": commands.command_line(arguments), "name": name, **counts}

    return answer(await _in_thread(request, describe))


async def train_again(request: Request) -> JSONResponse:
    """Start the training as a process of its own, which goes on without the page."""
    body = await read_json(request, TrainBody)
    workspace, work = workspace_of(request), _work_of(request)

    def start() -> dict[str, Any]:
        running = [each for each in work.trainings.values() if each.is_running]
        if running:
            raise UsageError("a training is running already", fix="wait until it has ended")
        arguments = _training_arguments(workspace, work, body)
        review = _open(work, body.review)
        review.write_corrected()
        log = label_review.sibling(review.table, "training").with_suffix(".log")
        training = Background(arguments, log)
        training.start()
        work.trainings = {training.id: training}
        return training.to_dict()

    return answer(await _in_thread(request, start))


class TrainingBody(RequestBody):
    training: str


async def show_training(request: Request) -> JSONResponse:
    """Answer with the state of a training and the last lines that it has printed."""
    body = await read_json(request, TrainingBody)
    training = _work_of(request).trainings.get(body.training)
    if training is None:
        raise UsageError("there is no such training", fix="reload the page")
    return answer(await run_in_threadpool(training.to_dict))
