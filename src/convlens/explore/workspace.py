"""What the server works with: the runs, their opened models, and the images it was given.

Nothing here is found by a path that a request names. Runs and images have ids that the server has
handed out, and another id is an error.
"""

from __future__ import annotations

import copy
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convlens.errors import UsageError
from convlens.explore.jobs import Jobs
from convlens.run_folders import MODELS_DIR, is_run_folder, run_folders

if TYPE_CHECKING:
    from convlens.data.dataset import Data, Split
    from convlens.interpret.inputs import InspectedModel
    from convlens.prediction import Predictor

MAX_OPEN_RUNS = 4
MAX_IMAGES = 1024  # that the server keeps; the oldest are dropped
MAX_IMAGE_BYTES = 256 << 20  # of all of them


@dataclass
class OpenedRun:
    """A model in memory.

    Attributes:
        subject: the network, for quick work.
        predictor: classifies images with it.
        results: what was computed for it and is kept, by the key of the job.
        test_is_open: whether its test split has been opened, and this use logged.
    """

    id: str
    subject: InspectedModel
    predictor: Predictor
    file_state: tuple[int, int]
    results: dict[str, Any] = field(default_factory=dict)
    test_is_open: bool = False
    _for_long_work: InspectedModel | None = None
    _data_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def subject_for_long_work(self) -> InspectedModel:
        """A copy of the network for the thread of long work.

        Its layers are recorded with hooks, which the other thread would trigger.
        """
        if self._for_long_work is None:
            loaded = copy.copy(self.subject.loaded)
            loaded.model = copy.deepcopy(loaded.model)
            self._for_long_work = type(self.subject)(
                self.subject.name, loaded, self.subject.plan, self.subject.run_dir
            )
        return self._for_long_work

    def data(self) -> Data:
        """Return the data set of the run; only jobs of `jobs.data` and `jobs.long` may call this.

        Raises:
            DataError: the images have changed or moved.
        """
        with self._data_lock:
            return self.subject.data

    def check_is_open(self, name: str) -> None:
        """Check that something of a split may be shown.

        Raises:
            UsageError: the test split is sealed.
        """
        if name == "test" and not self.test_is_open:
            raise UsageError("the test split is sealed", fix="open it first")

    def split(self, name: str) -> Split:
        """Return a split of the run's data; see `data` for who may call this.

        Raises:
            UsageError: the test split is sealed.
            DataError: the images have changed or moved, or there is no such split.
        """
        self.check_is_open(name)
        with self._data_lock:
            return self.subject.split(name)

    def test_uses(self) -> int:
        """Return how often the test split of the run has been used."""
        from convlens import evaluation

        run_dir = self.subject.run_dir
        return 0 if run_dir is None else evaluation.count_test_uses(run_dir, self.subject.loaded)

    def open_test_split(self) -> None:
        """Open the test split because somebody asked for it, and log this as one use.

        What the page shows of it from now on is part of this use, until the model is opened again.
        """
        with self._data_lock:
            if not self.test_is_open:
                self.subject.split("test")
                self.subject.log_test_use("explore")
                self.test_is_open = True


@dataclass(frozen=True)
class StoredImage:
    """An image that the page works with.

    Attributes:
        name: of the file or of its position, e.g. `val:17`.
        content: the bytes of an image file, or uint8 pixels `[C, S, S]` of a split.
        run: id of the run whose split it is from; empty for a file.
        label: its class, if known.
        image_id: its id in the data set.
    """

    id: str
    name: str
    content: Any
    run: str = ""
    label: str | None = None
    image_id: str | None = None

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else int(self.content.nbytes)


class Workspace:
    """The state of the server.

    Args:
        names: runs by name or folder, or model files; without them all runs of the current
            directory, also those that are trained later.
        device: where models compute; by default the fastest one.
        data: names or folders of data sets to show beside those of the runs.
    """

    def __init__(
        self,
        names: Sequence[str],
        jobs: Jobs,
        device: str | None = None,
        *,
        data: Sequence[str] = (),
    ) -> None:
        self.jobs = jobs
        self.data_names = tuple(
            os.path.abspath(name) if os.path.exists(name) else name for name in dict.fromkeys(data)
        )
        self.device = device
        self.follows_folder = not names
        self._models_folder = MODELS_DIR.absolute()
        self._paths: dict[str, Path] = {}
        self._add_runs([_run_path(name) for name in names] or run_folders(self._models_folder))
        self._opened: OrderedDict[str, OpenedRun] = OrderedDict()
        self._images: OrderedDict[str, StoredImage] = OrderedDict()
        self._lock = threading.RLock()

    # -- runs ---------------------------------------------------------------------------------

    def run_ids(self) -> list[str]:
        """Return the ids of the runs, in the order in which they are shown."""
        if self.follows_folder:
            self._add_runs(run_folders(self._models_folder))
        return list(self._paths)

    def path(self, run: str) -> Path:
        """Return the folder or model file of a run.

        Raises:
            UsageError: the server has not handed out that id.
        """
        if run not in self._paths:
            raise UsageError("no such run on this page", fix="reload the page")
        return self._paths[run]

    def open(self, run: str) -> OpenedRun:
        """Return the opened model of a run; only jobs of `jobs.quick` may call this.

        It is opened again if the model file has changed. The models used last stay in memory.

        Raises:
            UsageError: an unknown id.
            ModelFileError: the model file cannot be read.
        """
        from convlens.interpret import inputs
        from convlens.prediction import Predictor

        path = self.path(run)
        opened = self._opened.get(run)
        if opened is None or opened.file_state != _file_state(path):
            inputs.check_has_weights(str(path))
            subject = inputs.open_inspected_model(str(path), device=self.device)
            predictor = Predictor(subject.loaded, subject.plan.device)
            opened = OpenedRun(run, subject, predictor, _file_state(path))
            self._opened[run] = opened
        self._opened.move_to_end(run)
        while len(self._opened) > MAX_OPEN_RUNS:
            self._opened.popitem(last=False)
        return opened

    def _add_runs(self, paths: Sequence[Path]) -> None:
        known = {path.resolve() for path in self._paths.values()}
        for path in paths:
            if path.resolve() in known:
                continue
            known.add(path.resolve())
            name = path.stem if path.is_file() else path.resolve().name
            # Bytes of a name that are not text cannot be shown, and no request can contain them.
            name = name.encode("utf-8", "backslashreplace").decode()
            unique, number = name, 2
            while unique in self._paths:
                unique, number = f"{name}-{number}", number + 1
            self._paths[unique] = path

    # -- images -------------------------------------------------------------------------------

    def add_image(self, name: str, content: Any, **facts: Any) -> StoredImage:
        """Keep an image and return it with its new id; the oldest ones are dropped."""
        image = StoredImage(secrets.token_urlsafe(9), name, content, **facts)
        with self._lock:
            self._images[image.id] = image
            total = sum(each.size for each in self._images.values())
            while len(self._images) > 1 and (
                len(self._images) > MAX_IMAGES or total > MAX_IMAGE_BYTES
            ):
                total -= self._images.popitem(last=False)[1].size
        return image

    def image(self, image_id: str) -> StoredImage:
        """Return an image by its id.

        Raises:
            UsageError: the server has not handed it out, or has dropped it since.
        """
        with self._lock:
            image = self._images.get(image_id)
            if image is None:
                raise UsageError("the server has no such image", fix="give it the image again")
            self._images.move_to_end(image_id)
            return image


def _run_path(name: str) -> Path:
    """Return the folder or model file of a run.

    Raises:
        UsageError, ModelFileError: there is none; close matches are named.
    """
    for path in (MODELS_DIR / name, Path(name)):
        if is_run_folder(path) or os.path.isfile(path):
            return path.absolute()
    from convlens.run import find_run  # imports torch, but only for an error message

    return find_run(name).path.absolute()


def _file_state(path: Path) -> tuple[int, int]:
    """Return time and inode of a model file, which change when it is written again."""
    file = path if path.is_file() else path / "model.safetensors"
    try:
        status = file.stat()
    except OSError:
        return (0, 0)  # opening it says why
    return status.st_mtime_ns, status.st_ino
