from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlens import evaluation
from convlens.explore import try_image
from convlens.explore.jobs import JobCancelled
from convlens.interpret import activations, attribution, embedding, inputs
from helpers.commands import brightness_model
from helpers.exploring import Page, open_page


def png(value: int = 100, size: int = 8, mode: str = "L") -> bytes:
    noise = np.random.default_rng(value).integers(0, 256, (size, size), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(content, "PNG")
    return content.getvalue()


def upload(page: Page, content: bytes | None = None) -> str:
    image_id: str = page.post("/api/try/images?name=a.png", content=content or png())["image"]
    return image_id


def ask(page: Page, name: str, image: str, **more: Any) -> Any:
    return page.post(f"/api/try/{name}", {"run": "small", "image": image, **more})


def waited(page: Page, name: str, body: dict[str, Any]) -> Any:
    """Ask, wait for the job of the answer, and ask again."""
    first = page.post(f"/api/try/{name}", body)
    page.result(first["job"])
    return page.post(f"/api/try/{name}", body)


def subject(page: Page) -> inputs.InspectedModel:
    return page.workspace.open("small").subject


def picture(page: Page) -> inputs.Picture:
    return inputs.read_picture(subject(page), png(), "a.png")


def decoded(content: dict[str, Any]) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(content["maps"]), np.uint8)
    return values.reshape(-1, content["map_height"], content["map_width"])


def test_run_is_described(page: Page) -> None:
    run = page.post("/api/try/run", {"run": "small"})
    assert run["classes"] == [str(digit) for digit in range(10)]
    assert (run["size"], run["channels"], run["dark"]) == (8, 1, True)
    assert run["promises"] == [0.9, 0.95]  # for 99% there are too few validation images


def test_uploaded_image_is_classified_as_by_the_library(page: Page) -> None:
    answer = ask(page, "predict", upload(page))
    (expected,) = page.workspace.open("small").predictor.predict([png()], top_k=5)
    assert [(each["label"], each["prob"]) for each in answer["top"]] == list(expected.top)
    assert (answer["unsure"], answer["unlike"]) == (False, expected.unlike)


def test_answer_is_unsure_where_the_promise_needs_more_confidence(page: Page) -> None:
    predictor = page.workspace.open("small").predictor
    for value in range(20):
        (expected,) = predictor.predict([png(value)], min_accuracy=0.9)
        answer = ask(page, "predict", upload(page, png(value)), min_accuracy=0.9)
        assert answer["unsure"] == expected.unsure
        assert answer["top"]
    body = {"run": "small", "image": upload(page), "min_accuracy": 0.99}
    refused = page.send("/api/try/predict", body)
    assert refused.status_code == 400
    assert "validation" in refused.json()["error"]


def test_pixels_are_those_that_the_network_sees(page: Page) -> None:
    shown = ask(page, "picture", upload(page, png(size=30, mode="RGB")))
    expected = inputs.read_picture(subject(page), png(size=30, mode="RGB"), "a.png").pixels
    assert (shown["channels"], shown["height"], shown["width"]) == (1, 8, 8)
    assert base64.b64decode(shown["pixels"]) == expected.numpy().tobytes()


def test_hidden_pixels_have_the_mean_color(page: Page) -> None:
    image = upload(page)
    mask = np.zeros((8, 8), bool)
    mask[2:5, 1:] = True
    bits = base64.b64encode(np.packbits(mask).tobytes()).decode()
    answer = ask(page, "predict", image, hidden=bits)
    pixels = picture(page).pixels.numpy().copy()
    pixels[0, 2:5, 1:] = round(255 * subject(page).loaded.preprocessing.mean[0])
    (expected,) = page.workspace.open("small").predictor.predict([pixels[0]], top_k=5)
    assert [(each["label"], each["prob"]) for each in answer["top"]] == list(expected.top)
    nothing = base64.b64encode(bytes(8)).decode()
    assert ask(page, "predict", image, hidden=nothing) == ask(page, "predict", image)


@pytest.mark.parametrize("hidden", ["AAAA", "not base64", "A" * 400_000])
def test_masks_of_another_size_are_refused(page: Page, hidden: str) -> None:
    body = {"run": "small", "image": upload(page), "hidden": hidden}
    assert page.send("/api/try/predict", body).status_code == 400


def test_heat_map_is_that_of_the_library(page: Page) -> None:
    image = upload(page)
    for method, target in (("grad-cam", ""), ("occlusion", "3"), ("integrated-gradients", "")):
        shown = ask(page, "heat-map", image, method=method, target=target)
        (model,) = attribution.compute_attributions(
            [subject(page)], [[picture(page)]], [method], target=target or None, quiet=True
        )
        expected = model.maps[method][0].numpy()
        assert shown["label"] == model.classes[int(model.targets[0])]
        low = -shown["max"] if shown["signed"] else 0.0
        values = low + decoded(shown)[0] / 255 * (shown["max"] - low)
        assert values == pytest.approx(expected, abs=(shown["max"] - low) / 255)
    unknown = {"run": "small", "image": image, "method": "grad-cm"}
    refused = page.send("/api/try/heat-map", unknown)
    assert refused.status_code == 400
    assert "grad-cam" in refused.json()["fix"]
    refused = page.send("/api/try/heat-map", {"run": "small", "image": image, "target": "<b>"})
    assert refused.status_code == 400


def test_activations_are_those_of_the_library(page: Page) -> None:
    image = upload(page)
    layers = ask(page, "activations", image)["layers"]
    names = [each["layer"] for each in layers]
    activity = activations.compute_activity(subject(page), picture(page), names)
    assert names == list(activity.maps)
    assert len(names) == 2
    for shown in layers:
        maps = activity.maps[shown["layer"]]
        assert shown["order"] == activations.channel_order(maps, "active").tolist()
        low, high = activations.channel_limits([maps])
        values = low + decoded(shown) / 255 * (high - low)
        expected = np.clip(maps[shown["order"]], low, high)
        assert values == pytest.approx(expected, abs=(high - low) / 255)
    channel = shown["order"][0]
    one = ask(page, "channel", image, layer=shown["layer"], channel=channel)
    assert (decoded(one)[0] == decoded(shown)[0]).all()
    assert one["max"] == pytest.approx(float(activity.maps[shown["layer"]][channel].max()))
    for wrong in ({"layer": "nope", "channel": 0}, {"layer": shown["layer"], "channel": 999}):
        refused = page.send("/api/try/channel", {"run": "small", "image": image, **wrong})
        assert refused.status_code == 400


def test_large_maps_are_averaged_over_blocks() -> None:
    maps = np.arange(2 * 150 * 130, dtype=np.float32).reshape(2, 150, 130)
    small = try_image._shrink(maps)
    assert small.shape == (2, 50, 43)
    assert small[1, 2, 3] == pytest.approx(maps[1, 6:9, 9:12].mean())
    tokens = np.ones((3, 1, 200), np.float32)
    assert try_image._shrink(tokens).shape == (3, 1, 50)


def test_unknown_images_start_no_work(page: Page) -> None:
    refused = page.send("/api/try/nearest", {"run": "small", "image": "unknown"})
    assert (refused.status_code, refused.json()["error"]) == (400, "the server has no such image")
    assert not page.workspace.jobs.long.is_busy


def test_nearest_training_images_are_those_of_the_library(page: Page) -> None:
    body = {"run": "small", "image": upload(page)}
    shown = waited(page, "nearest", body)
    report = embedding.nearest_neighbors(
        subject(page), [picture(page)], 6, folder=page.workspace.path("small") / "x", quiet=True
    )
    neighbors = report.found[0].neighbors
    assert [each["name"] for each in shown["images"]] == [f"train:{n.number}" for n in neighbors]
    assert [each["label"] for each in shown["images"]] == [n.label for n in neighbors]
    assert [each["distance"] for each in shown["images"]] == pytest.approx(
        [n.distance for n in neighbors], abs=1e-5
    )
    assert shown["searched"] == shown["of"] == report.searched
    assert all(each["source"].startswith("data:image/") for each in shown["images"])
    assert shown["job"] is None
    # A training image is not its own neighbor.
    first = shown["images"][0]
    again = page.post("/api/try/nearest", {"run": "small", "image": first["image"]})
    assert first["name"] not in [each["name"] for each in again["images"]]


def test_a_cancelled_comparison_keeps_the_images_so_far(
    page: Page, explored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_page([str(explored / "models/small")]) as other:
        opened = other.workspace.open("small")
        index = embedding.index_features(opened.subject, opened.subject.split("train"), 1000)
        part = embedding.FeatureIndex(index.train, index.numbers[:9], index.directions[:9])

        def compare(subject: object, train: object, count: int, *, on_batch: Any) -> None:
            on_batch(part)
            raise JobCancelled

        monkeypatch.setattr(embedding, "index_features", compare)
        body = {"run": "small", "image": upload(other)}
        assert other.post("/api/try/nearest", body)["job"]
        other.workspace.jobs.long.wait_until_idle(20)
        answer = other.post("/api/try/nearest", body)
        assert (answer["job"], answer["searched"], answer["of"]) == (None, 9, len(index.train))
        assert len(answer["images"]) == 6


def test_images_that_activate_a_channel_most(page: Page) -> None:
    model = subject(page)
    layer = ask(page, "activations", upload(page))["layers"][-1]["layer"]
    shown = waited(page, "top-images", {"run": "small", "layer": layer, "channel": 1})
    val = model.split("val")
    maps = activations.features.layer_activations(
        model.model, model.prepared(val.rows.gather(torch.arange(len(val)))), [layer]
    )[layer]
    peaks = maps[:, 1].flatten(1).amax(1)
    order = peaks.argsort(descending=True, stable=True)[:9].tolist()
    assert [each["name"] for each in shown["images"]] == [f"val:{i}" for i in order]
    assert [each["peak"] for each in shown["images"]] == pytest.approx(peaks[order].tolist())
    refused = page.send("/api/try/top-images", {"run": "small", "layer": layer, "channel": 99})
    assert refused.status_code == 400


def choose(page: Page, **body: Any) -> list[dict[str, Any]]:
    answer = page.post("/api/try/choose", {"run": "small", "how": "random", **body})
    images: list[dict[str, Any]] = (page.result(answer["job"]) if "job" in answer else answer)[
        "images"
    ]
    return images


def test_images_are_chosen_at_random_by_class_and_by_number(page: Page) -> None:
    splits = page.post("/api/try/splits", {"run": "small"})
    assert splits["splits"].keys() == {"train", "val"}
    random = choose(page, split="train", count=10)
    assert len({each["name"] for each in random}) == 10
    assert [each["name"] for each in choose(page, split="train", count=10)] == [
        each["name"] for each in random
    ]
    other = choose(page, split="train", count=10, seed=1)
    assert [each["name"] for each in other] != [each["name"] for each in random]
    assert {each["label"] for each in choose(page, split="train", how="class", label="7")} == {"7"}
    (one,) = choose(page, split="val", how="number", number=3)
    val = subject(page).split("val")
    assert (one["name"], one["label"]) == ("val:3", str(int(val.labels[3])))
    shown = ask(page, "picture", one["image"])
    expected = val.rows.gather(torch.tensor([3]))[0]
    assert base64.b64decode(shown["pixels"]) == expected.numpy().tobytes()
    assert (shown["label"], shown["id"]) == (one["label"], val.ids[3])


def test_worst_mistakes_come_first_from_the_cache_or_computed(page: Page) -> None:
    model = subject(page)
    expected = inputs.worst_images(model, model.split("val")).tolist()
    assert expected
    shown = choose(page, split="val", how="worst", count=3)
    assert [each["name"] for each in shown] == [f"val:{i}" for i in expected[:3]]
    assert model.run_dir is not None
    split = evaluation.load_eval_split(model.loaded, "val", device="cpu", own_data=model.data)
    evaluation.evaluate_split(model.run_dir, model.loaded, split, "cpu", draw=False)
    del page.workspace.open("small").results["worst-val"]
    again = choose(page, split="val", how="worst", count=3)
    assert [each["name"] for each in again] == [each["name"] for each in shown]


def test_test_split_is_sealed_until_it_is_opened_which_counts_once(page: Page) -> None:
    run_dir = subject(page).run_dir
    assert run_dir is not None
    body = {"run": "small", "split": "test", "how": "random", "count": 2}
    refused = page.send("/api/try/choose", body)
    assert refused.status_code == 400
    assert "sealed" in refused.json()["error"]
    assert [e for e in run_dir.evaluation_log() if e["split"] == "test"] == []
    assert page.post("/api/try/splits", {"run": "small"})["test_uses"] == 0
    for _ in range(2):
        assert page.post("/api/try/open-test", {"run": "small"}) == {"test_uses": 1}
    (use,) = [e for e in run_dir.evaluation_log() if e["split"] == "test"]
    assert (use["by"], use["looks"], use["own"]) == ("explore", 1, True)
    assert [each["name"][:5] for each in choose(page, split="test", count=2)] == ["test:"] * 2


@pytest.mark.parametrize(
    "content",
    [
        b"not an image",
        png()[:40],
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"GIF89a" + b"\xff" * 50,
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"\xff\xd8\xff" + bytes(1000),
    ],
)
def test_broken_images_are_refused_with_a_reason(page: Page, content: bytes) -> None:
    body = {"run": "small", "image": upload(page, content)}
    for name in ("predict", "picture", "heat-map", "activations"):
        refused = page.send(f"/api/try/{name}", body)
        assert refused.status_code == 422
        assert "can't be read" in refused.json()["error"]


def test_images_with_too_many_pixels_are_refused(page: Page) -> None:
    content = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(content, "PNG")
    body = {"run": "small", "image": upload(page, content.getvalue())}
    refused = page.send("/api/try/predict", body)
    assert refused.status_code == 422
    assert "pixels" in refused.json()["error"]


@pytest.mark.parametrize(
    "image", ["", "x", "../small/model.safetensors", "/etc/passwd", "%2e%2e", "val:0"]
)
def test_images_are_only_found_by_ids_of_the_server(page: Page, image: str) -> None:
    refused = page.send("/api/try/picture", {"run": "small", "image": image})
    assert refused.status_code == 400
    assert refused.json()["error"] == "the server has no such image"


def test_runs_without_weights_or_data_say_so(page: Page) -> None:
    Path("models/started").mkdir(parents=True)
    Path("models/started/run.json").write_text('{"status": "training"}')
    bare = brightness_model(Path("models/bare"))  # its data set does not exist
    with open_page(["started", "bare"]) as other:
        refused = other.send("/api/try/run", {"run": "started"})
        assert refused.status_code == 422
        assert "weights" in refused.json()["error"]
        image = other.post("/api/try/images?name=a.png", content=png(mode="RGB"))["image"]
        body = {"run": "bare", "image": image}
        assert other.post("/api/try/predict", body)["top"][0]["label"] in ("dark", "light")
        refused = other.send("/api/try/splits", {"run": "bare"})
        assert refused.status_code == 422
        assert "changed since" in refused.json()["error"]
        job = other.post("/api/try/nearest", body)["job"]
        other.workspace.jobs.long.wait_until_idle(20)
        state = other.get(f"/api/jobs/{job}")
        assert (state["state"], state["error"]) == ("failed", refused.json()["error"])
    assert bare.model_path.exists()


def test_image_of_a_split_is_converted_for_another_run(page: Page, explored: Path) -> None:
    brightness_model(Path("models/bright"))
    with open_page([str(explored / "models/small"), "models/bright"]) as other:
        answer = other.post(
            "/api/try/choose", {"run": "small", "split": "val", "how": "number", "number": 3}
        )
        image = answer["images"][0]["image"]
        own, foreign = (
            other.post("/api/try/picture", {"run": run, "image": image})
            for run in ("small", "bright")
        )
        assert (own["channels"], foreign["channels"]) == (1, 3)
        gray = base64.b64decode(own["pixels"])
        assert base64.b64decode(foreign["pixels"]) == bytes(v for v in gray for _ in range(3))
        assert foreign["label"] == own["label"] == answer["images"][0]["label"]
