from __future__ import annotations

from convlens import user_code
from convlens.errors import ResourceError
from convlens.explore.commands import (
    TrainingProgress,
    command_line,
    run_command,
    trust_option,
)
from convlens.explore.jobs import started_jobs


def test_progress_counts_the_epochs_of_all_models() -> None:
    progress = TrainingProgress()
    seen = []
    for line in (
        "digits: 10 classes",
        "small-fold0, 1 of 3",
        "epoch   1/4  train loss 2.3 accuracy 10.00%",
        "epoch   4/4  train loss 2.1 accuracy 20.00%",
        "",
        "small-fold2, 3 of 3",
        "epoch   2/4  train loss 2.2 accuracy 15.00%",
    ):
        progress.read(line)
        seen.append((progress.done, progress.total))
    assert seen == [(0, 0), (0, 0), (1, 12), (4, 12), (4, 12), (4, 12), (10, 12)]
    assert progress.text.startswith("epoch   2/4")


def test_failed_command_gives_its_error() -> None:
    with started_jobs() as jobs:
        job = jobs.commands.submit(lambda job: run_command(job, ["labels", "no such data"]))
        error = job.future.exception(timeout=120)
    assert isinstance(error, ResourceError)
    assert "no such data" in error.what
    assert error.fix.endswith("convlens labels 'no such data'")


def test_command_is_written_as_one_types_it() -> None:
    assert (
        command_line(["train", "a b.yaml", "--name", "x"]) == "convlens train 'a b.yaml' --name x"
    )


def test_commands_may_import_the_user_code_that_the_page_may() -> None:
    for is_trusted, option in ((False, []), (True, ["--trust-code"])):
        with user_code.trust(is_trusted), started_jobs() as jobs:
            job = jobs.commands.submit(lambda job: trust_option())
            assert job.future.result(10) == option
