from __future__ import annotations

from pathlib import Path

from convlens.run import list_runs
from convlens.run_folders import is_run_folder, run_folders


def test_folders_with_a_run_file_are_runs() -> None:
    assert run_folders() == []
    for name, file in (("b", "run.json"), ("a", "run.json"), ("bare", "model.safetensors")):
        (Path("models") / name).mkdir(parents=True)
        (Path("models") / name / file).write_text("{}")
    Path("models/empty").mkdir()
    Path("models/file").write_text("")
    assert run_folders() == [Path("models/a"), Path("models/b")]
    assert [run.path for run in list_runs()] == run_folders()
    assert is_run_folder(Path("models/bare"))
    assert not is_run_folder(Path("models/empty"))
    assert not is_run_folder(Path("models/file"))
