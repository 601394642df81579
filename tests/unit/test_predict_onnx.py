"""The program beside an ONNX file prepares images as the decoder does, and needs no convlens."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlens import model_export, prediction, run as runs
from convlens.data.decode import decode
from convlens.errors import ModelFileError
from helpers.commands import brightness_model, sided_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

predict_onnx = pytest.importorskip("convlens.predict_onnx")


def png_of_16_bit_color(values: np.ndarray) -> bytes:
    """Return a PNG of uint16 `[H, W, 3 or 4]`, which Pillow can't write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = (
        width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2 + 4 * (channels == 4)])
    )

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + checksum

    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header + b"\0\0\0"),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of every kind that is converted in a way of its own."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (37, 61, 4), dtype=np.uint8)
    deep = rng.integers(0, 65536, (37, 61, 4), dtype=np.uint16)
    grey = color[..., 0]
    floats = np.where(rng.random(grey.shape) < 0.1, np.nan, deep[..., 0] / 9000).astype(np.float32)
    large = np.repeat(np.repeat(color[..., :3], 9, 0), 9, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = {
        "color.png": Image.fromarray(color[..., :3]),
        "tall.webp": Image.fromarray(np.ascontiguousarray(color[..., :3].transpose(1, 0, 2))),
        "small.png": Image.fromarray(color[:3, :5, :3]),
        "exact.png": Image.fromarray(color[:16, :16, :3]),
        "grey.png": Image.fromarray(grey),
        "bits.png": Image.fromarray(grey > 100),
        "palette.gif": Image.fromarray(color[..., :3]).quantize(16),
        "alpha.png": Image.fromarray(color),
        "grey-alpha.png": Image.fromarray(color[..., :2]),
        "cmyk.jpg": Image.fromarray(color[..., :3]).convert("CMYK"),
        "grey16.png": Image.fromarray(deep[..., 0]),
        "grey16.pgm": Image.fromarray(deep[..., 0]),
        "grey32.tiff": Image.fromarray(deep[..., 0].astype(np.int32) * 7 - 1000),
        "float.tiff": Image.fromarray(floats),
        "unit.tiff": Image.fromarray((deep[..., 0] / 65535).astype(np.float32)),
        "reduced.jpg": Image.fromarray(large),
    }
    for name, sample in samples.items():
        sample.save(folder / name)
    Image.fromarray(large).save(folder / "rotated.jpg", exif=exif)
    Image.fromarray(color[..., :3]).save(folder / "rotated.tiff", exif=exif)
    (folder / "max255.pgm").write_bytes(
        b"P5 61 37 999\n" + (deep[..., 0] % 1000).astype(">u2").tobytes()
    )
    (folder / "color16.png").write_bytes(png_of_16_bit_color(deep[..., :3]))
    (folder / "alpha16.png").write_bytes(png_of_16_bit_color(deep))
    return sorted(folder.iterdir())


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("value_range", [None, (100.0, 40000.0), (0.0, 5.5)])
def test_pixels_are_those_of_the_decoder(
    images: list[Path], fit: str, value_range: tuple[float, float] | None
) -> None:
    for path, channels, background in itertools.product(
        images, (1, 3), ("white", "alpha", "#102030")
    ):
        pre: dict[str, Any] = {"image_size": 16, "channels": channels, "fit": fit}
        pre |= {"background": background}
        if value_range is not None:
            pre["value_range"] = list(value_range)
        expected = decode(
            path,
            size=16,
            channels=channels,
            fit=fit,
            value_range=value_range,
            background=background,
        )
        actual = predict_onnx.read_pixels(path, pre)
        np.testing.assert_array_equal(actual, expected, err_msg=f"{path.name} {pre}", strict=True)


def test_large_jpegs_are_reduced_and_other_large_images_are_refused(images: list[Path]) -> None:
    pre = {"image_size": 16, "channels": 3, "fit": "crop", "max_pixels": 2000}
    files = {path.name: path for path in images}
    expected = decode(files["reduced.jpg"], size=16, channels=3, fit="crop", max_pixels=20000)
    actual = predict_onnx.read_pixels(files["reduced.jpg"], pre | {"max_pixels": 20000})
    np.testing.assert_array_equal(actual, expected)
    with pytest.raises(ValueError, match="more than 2,000 pixels"):
        predict_onnx.read_pixels(files["color.png"], pre)


# As in an environment without these packages.
WITHOUT_OURS = """
import runpy, sys
sys.modules["torch"] = sys.modules["convlens"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_program_runs_without_convlens_and_torch(tmp_path: Path, images: list[Path]) -> None:
    model = brightness_model(tmp_path / "bright")
    (exported,) = model_export.export(model)
    assert exported.script is not None
    assert Path(exported.script.path) == tmp_path / "bright" / "predict_onnx.py"
    assert exported.script.images == 16
    assert 0 <= exported.script.max_probability_difference <= exported.script.tolerance
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    files = [str(text), *map(str, images)]

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-c", WITHOUT_OURS, exported.script.path, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = program("--json", "--top", "2", *files)
    assert done.returncode == 1  # because of the text
    assert done.stderr == ""
    answers = json.loads(done.stdout)["predictions"]
    assert answers[0]["filename"] == str(text)
    assert "cannot identify image file" in answers[0]["error"]
    loaded = runs.load_model(model.model_path)
    for expected, answer in zip(
        prediction.iter_predictions(loaded, files, top_k=2, quiet=True), answers, strict=True
    ):
        assert answer["filename"] == expected.filename
        if expected.error is None:
            assert answer["label"] == expected.label
            assert [each["label"] for each in answer["top"]] == [name for name, _ in expected.top]
            found = [each["prob"] for each in answer["top"]]
            np.testing.assert_allclose(found, [prob for _, prob in expected.top], atol=1e-5)
    first = answers[1]
    lines = program(files[1]).stdout.splitlines()
    assert lines == [f"{files[1]}  {first['label']} {first['prob']:.1%}"]


def test_program_asks_which_model_to_use(tmp_path: Path) -> None:
    (tmp_path / "predict_onnx.py").write_bytes(Path(predict_onnx.__file__).read_bytes())
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).touch()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "predict_onnx.py"), "x.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: choose the model with --model FILE (beside this script: a.onnx, b.onnx)\n"
    )


@pytest.mark.parametrize(
    ("right", "wrong", "file"),
    [
        ("Resampling.BILINEAR", "Resampling.NEAREST", r"\S+: a probability differs"),
        ("if orientation in UPRIGHT:", "if False:", "rotated.jpg"),
        ("// 257", "// 514", "16-bit.png"),
        ("scaled = scaled * 255", "scaled = scaled * 128", "float.tiff"),
        ("opaque.alpha_composite(image)", "pass", "transparent.png"),
        ('json.loads(metadata["classes"])', 'json.loads(metadata["classes"])[::-1]', "color.png"),
        ("classifier = ", "1 / 0; classifier = ", "ZeroDivisionError: division by zero"),
    ],
)
def test_export_finds_mistakes_in_the_program(
    sided: tuple[bytes, Any, Any], right: str, wrong: str, file: str, tmp_path: Path
) -> None:
    program = Path(predict_onnx.__file__).read_text("utf-8")
    assert right in program
    with pytest.MonkeyPatch.context() as patch:
        text = program.replace(right, wrong).encode()
        patch.setattr(model_export, "read_script", lambda: text)
        with pytest.raises(ModelFileError, match=f"does not reproduce.*: {file}"):
            model_export.check_script(sided[0], tmp_path / "predict_onnx.py", *sided[1:])


@pytest.fixture(scope="module")
def sided(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Any, Any]:
    """An exported model that tells left from right, the model itself, and its outputs."""
    folder = tmp_path_factory.mktemp("sided")
    (exported,) = model_export.export(sided_model(folder / "sided"))
    loaded = runs.load_model(folder / "sided" / "model.safetensors")
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    reference = model_export.ReferenceOutputs(loaded, images, "noise")
    return Path(exported.path).read_bytes(), loaded, reference
