"""Check a network, loss, optimizer, augmentation or data set against what convlens expects of it.

`check_part` is the job of `convlens check`. Each check is a function in a table; it returns what it
found, or raises `CheckFailed`. The contract tests call the same functions for the entries of
convlens' own tables.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from convlens import model_export, models, serialization, user_code
from convlens.data.sources import find_source
from convlens.data.transforms.pipeline import Augmentation, Mixing, user_augmentation
from convlens.data.transforms.random import SampleInfo
from convlens.data.types import EncodedFiles
from convlens.device import preserve_rng, preserve_torch_settings
from convlens.engine.losses import LossInputs, build_loss
from convlens.errors import ConvlensError, UsageError, lookup
from convlens.models import user_network
from convlens.optim import build_optimizer, unstorable_state
from convlens.recipe import OptimConfig
from convlens.run import LoadedModel, Preprocessing

CLASSES = 5
MAX_STEPS = 20  # after which one batch must have a lower loss
RTOL, ATOL = 1e-3, 1e-4  # of float32 sums in another order


class CheckFailed(Exception):  # noqa: N818
    """A part is not as it should be.

    Args:
        what: what was found.
        fix: what to do.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass(frozen=True)
class CheckResult:
    """The result of one check: what was found, and what to do if it failed."""

    name: str
    passed: bool
    found: str
    fix: str = ""


@dataclass(frozen=True)
class PartCheck:
    """The results for a part; `check_part` returns it."""

    part: str
    kind: str
    results: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the output of `convlens check --json`."""
        return {**asdict(self), "passed": self.passed}


# Networks


@dataclass(frozen=True)
class NetworkCase:
    """A network to check.

    Attributes:
        build: `(classes, channels, image_size)` to a new network with random weights.
    """

    build: Callable[[int, int, int], nn.Module]
    classes: int = CLASSES
    channels: int = 3
    image_size: int = 32

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build(self.classes, self.channels, self.image_size)

    def images(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        size = self.image_size
        return torch.randn(count, self.channels, size, size, generator=generator)


def check_shapes(case: NetworkCase) -> str:
    """The output is finite float32 `[N, K]` in train and eval mode."""
    model = case.network()
    for mode in (True, False):
        logits = model.train(mode)(case.images(3))
        name = "train" if mode else "eval"
        if not isinstance(logits, Tensor) or list(logits.shape) != [3, case.classes]:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise CheckFailed(
                f"{shape} for 3 images in {name} mode",
                f"return logits [N, {case.classes}] only, also in train mode",
            )
        if logits.dtype != torch.float32:
            raise CheckFailed(f"{logits.dtype} in {name} mode", "compute in the type of the images")
        if not bool(torch.isfinite(logits).all()):
            raise CheckFailed(f"NaN or infinity in {name} mode", "look for a division by zero")
    return f"float32 [N, {case.classes}] at {case.image_size} px"


def check_batch_independence(case: NetworkCase) -> str:
    """In eval mode, an image has the same output in every batch."""
    model, images = case.network().eval(), case.images(4)
    with torch.no_grad():
        together = model(images)
        one_by_one = torch.cat([model(images[i : i + 1]) for i in range(4)])
    if not torch.allclose(together, one_by_one, rtol=RTOL, atol=ATOL):
        largest = (together - one_by_one).abs().max()
        raise CheckFailed(
            f"outputs depend on the other images of the batch (by up to {largest:.2g})",
            "use no statistics of the batch in eval mode, and reshape along the right axes",
        )
    return "the same for any batch"


def check_single_image(case: NetworkCase) -> str:
    """A batch of one image works in eval mode; train mode may need two."""
    model, image = case.network(), case.images(1)
    with torch.no_grad():
        logits = model.eval()(image)
    if list(logits.shape) != [1, case.classes]:
        raise CheckFailed(
            f"{list(logits.shape)} for one image", "do not call squeeze() without a dimension"
        )
    try:
        model.train()(image)
    except ValueError:  # batch norm with a single value per channel
        return "eval mode; for training, batches of two or more"
    return "train and eval mode"


def check_stages(case: NetworkCase) -> str:
    """The stages are sub-modules that are called in their order."""
    model = case.network().eval()
    stages = list(models.model_parts(model).stages)
    if not stages:
        raise CheckFailed(
            "none: look and fine-tuning have the head only",
            "make the layers attributes of the network, or set self.stages to their names",
        )
    order: list[str] = []
    for stage in stages:
        model.get_submodule(stage).register_forward_hook(
            lambda module, inputs, output, stage=stage: order.append(stage)
        )
    with torch.no_grad():
        model(case.images(2))
    if order != stages:
        raise CheckFailed(
            f"stages {', '.join(stages)} are called in the order {', '.join(order) or 'never'}",
            "define the layers in the order of the forward pass, and call each once",
        )
    return ", ".join(stages)


def check_head(case: NetworkCase) -> str:
    """The head is the layer that makes the logits, and can be replaced."""
    model = case.network().eval()
    name = models.model_parts(model).head
    head = model.get_submodule(name)
    if not isinstance(head, nn.Linear | nn.Conv2d) or head.weight.shape[0] != case.classes:
        raise CheckFailed(
            f"{name} is not a linear layer or convolution with {case.classes} outputs",
            "compute the logits with an nn.Linear layer, and set self.head to its name",
        )
    other = case.classes + 6
    replacement = (
        nn.Linear(head.in_features, other)
        if isinstance(head, nn.Linear)
        else nn.Conv2d(head.in_channels, other, 1)
    )
    model.set_submodule(name, replacement)
    with torch.no_grad():
        logits = model(case.images(2))
    if list(logits.shape) != [2, other]:
        raise CheckFailed(
            f"with {other} outputs in {name}, the network returns {list(logits.shape)}",
            f"return the output of {name}",
        )
    return name


def check_gradients(case: NetworkCase) -> str:
    """A finite gradient reaches every parameter that is trained."""
    model = case.network().train()
    images, labels = case.images(8), torch.arange(8) % case.classes
    nn.functional.cross_entropy(model(images), labels).backward()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    without = [name for name, parameter in named if parameter.grad is None]
    if without:
        raise CheckFailed(
            f"no gradient for {', '.join(without[:4])}{' ...' * (len(without) > 4)}",
            "use these parameters in forward, remove them, or call requires_grad_(False)",
        )
    bad = [n for n, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    if bad:
        raise CheckFailed(
            f"NaN or infinite gradients of {', '.join(bad[:4])}",
            "avoid square roots, logarithms and norms of zero",
        )
    return f"all {len(named)} parameters"


def check_learning(case: NetworkCase) -> str:
    """A few steps on one batch lower its loss, in both memory formats."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = case.network().to(memory_format=memory_format).train()
        images = case.images(8).contiguous(memory_format=memory_format)
        labels = torch.arange(8) % case.classes
        optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
        losses = list[float]()
        # Random layers, such as dropout, may hide the effect of a few steps.
        while len(losses) < 4 or (losses[-1] >= losses[0] and len(losses) < MAX_STEPS):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if not losses[-1] < losses[0]:
            raise CheckFailed(
                f"{MAX_STEPS} steps do not lower the loss of one batch "
                f"({losses[0]:.3f} to {losses[-1]:.3f})",
                "look for a detach, a no_grad or a softmax before the loss",
            )
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"


def check_determinism(case: NetworkCase) -> str:
    """The same seed gives the same weights, and eval mode the same output each time."""
    first, second = case.network().eval(), case.network().eval()
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise CheckFailed(
            "the same seed gives other weights", "draw with torch's generator, not with numpy's"
        )
    images = case.images(2)
    with torch.no_grad():
        outputs = [first(images) for _ in range(2)]
    if not torch.equal(*outputs):
        raise CheckFailed(
            "eval mode gives another output each time",
            "make random layers depend on self.training",
        )
    return "equal weights and outputs"


def check_input(case: NetworkCase) -> str:
    """The images are not changed by the forward pass."""
    model, images = case.network().eval(), case.images(2)
    before = images.clone()
    with torch.no_grad():
        model(images)
    if not torch.equal(images, before):
        raise CheckFailed("forward changes its input", "use no in-place operation on the images")
    return "kept"


def check_model_file(case: NetworkCase) -> str:
    """A network that is read from a model file has the same outputs."""
    model = case.network().train()
    with torch.no_grad():
        model(case.images(4))  # updates the statistics of norms
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        serialization.write_model_file(path, model.state_dict(), {})
        tensors, _ = serialization.read_model_file(path)
    again = case.network()
    models.load_weights(again, tensors)
    images, before, after = case.images(2), model.state_dict(), again.state_dict()
    with torch.no_grad():
        equal = torch.equal(again.eval()(images), model.eval()(images))
    if not equal or not all(torch.equal(before[name], after[name]) for name in before):
        raise CheckFailed(
            "outputs differ after saving and loading",
            "keep everything that training changes in parameters and buffers",
        )
    return "the same outputs after loading"


def check_export(case: NetworkCase) -> str:
    """torch.export can translate the network, and the program gives the same outputs."""
    model = case.network().eval()
    mean = [0.0] * case.channels
    preprocessing = Preprocessing(case.image_size, case.channels, "crop", mean, [1.0] * len(mean))
    loaded = LoadedModel(model, tuple(map(str, range(case.classes))), preprocessing, {})
    try:
        model_export.capture(copy.copy(loaded))
    except ConvlensError as error:
        raise CheckFailed(
            error.what[:160], "let forward depend on shapes only, not on values of tensors"
        ) from error
    return "torch.export translates it"


NETWORK_CHECKS: dict[str, Callable[[NetworkCase], str]] = {
    "shape and type": check_shapes,
    "batch independence": check_batch_independence,
    "batch of one": check_single_image,
    "stages": check_stages,
    "head": check_head,
    "gradients": check_gradients,
    "learning": check_learning,
    "determinism": check_determinism,
    "input": check_input,
    "model file": check_model_file,
    "export": check_export,
}


# Losses


@dataclass(frozen=True)
class LossCase:
    """A loss to check.

    Attributes:
        build: images of each class to the loss.
    """

    build: Callable[[list[float]], nn.Module]

    def rows(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the loss, and logits and labels of 12 rows of unequal classes."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(12, 4, generator=generator).requires_grad_()
        return self.build([7.0, 4.0, 1.0, 0.0]), logits, torch.tensor([0] * 7 + [1] * 4 + [2])


def check_mean(case: LossCase) -> str:
    """The loss of a batch is one number, to which its parts add up."""
    loss, logits, labels = case.rows()
    return _check_parts(loss, logits, labels, "a mean over the rows")


def check_mixed_labels(case: LossCase) -> str:
    """The same for class probabilities, as MixUp and CutMix make them."""
    loss, logits, labels = case.rows()
    one_hot = nn.functional.one_hot(labels, 4).float()
    return _check_parts(loss, logits, one_hot.lerp(one_hot.flip(0), 0.3), "accepts probabilities")


def _check_parts(loss: nn.Module, logits: Tensor, targets: Tensor, found: str) -> str:
    whole = loss(logits, targets)
    if not isinstance(whole, Tensor) or whole.shape != () or whole.dtype != torch.float32:
        what = f"{whole.dtype} {list(whole.shape)}" if isinstance(whole, Tensor) else repr(whole)
        raise CheckFailed(f"returned {what}", "return one float32 number, the mean over the rows")
    parts = zip(logits.split([7, 5]), targets.split([7, 5]), strict=True)
    added = sum(len(rows) / 12 * loss(rows, labels) for rows, labels in parts)
    if not torch.allclose(cast(Tensor, added), whole, rtol=1e-4, atol=1e-6):
        raise CheckFailed(
            "parts of a batch do not add up to the batch",
            "divide by the number of rows, not by the sum of their weights",
        )
    (gradient,) = torch.autograd.grad(whole, logits)
    if not bool(torch.isfinite(gradient).all()):
        raise CheckFailed("the gradient is NaN or infinite", "clamp what may become zero")
    return found


def check_certain_predictions(case: LossCase) -> str:
    """Gradients are finite for predictions that are certain, right or wrong."""
    loss = case.build([1.0, 1.0])
    for size in (30.0, 1e4):
        logits = torch.tensor([[size, 0.0], [0.0, size], [size, size]], requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(logits, torch.tensor([0, 0, 1])), logits)
        if not bool(torch.isfinite(gradient).all()):
            raise CheckFailed(
                f"NaN or infinite gradients for logits of {size:g}",
                "use log_softmax, and clamp probabilities before logarithms and powers",
            )
    return "finite gradients"


def check_teaching(case: LossCase) -> str:
    """Gradient descent on the loss gives each row its label."""
    loss, labels = case.build([3.0, 2.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 2])
    logits = torch.zeros(6, 3, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=5.0)
    losses = []
    for _ in range(20):
        value = loss(logits, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    if not losses[-1] < losses[0] or not torch.equal(logits.argmax(1), labels):
        raise CheckFailed(
            "20 steps of gradient descent do not give each row its label",
            "check its sign and its targets",
        )
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f} in 20 steps"


LOSS_CHECKS: dict[str, Callable[[LossCase], str]] = {
    "mean over rows": check_mean,
    "mixed labels": check_mixed_labels,
    "certain predictions": check_certain_predictions,
    "learning": check_teaching,
}


# Optimizers


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer to check, by its section of a recipe."""

    config: OptimConfig

    def problem(self) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
        """Return a linear regression with its optimizer."""
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = build_optimizer(model, self.config)
        return model, optimizer, torch.randn(32, 4), torch.randn(32, 1)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, target: Tensor
) -> float:
    loss = nn.functional.mse_loss(model(inputs), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def check_descent(case: OptimizerCase) -> str:
    """Twenty steps lower a loss."""
    model, optimizer, inputs, target = case.problem()
    losses = [_step(model, optimizer, inputs, target) for _ in range(20)]
    if not losses[-1] < losses[0]:
        raise CheckFailed(
            f"the loss goes from {losses[0]:.3f} to {losses[-1]:.3f} in 20 steps",
            "check the sign of the update and the learning rate",
        )
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f} in 20 steps"


def check_learning_rate(case: OptimizerCase) -> str:
    """The update follows the learning rate of its group, which the schedule sets."""
    model, optimizer, inputs, target = case.problem()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _step(model, optimizer, inputs, target)
    moved = any(
        not torch.equal(old, new.detach())
        for old, new in zip(before, model.parameters(), strict=True)
    )
    if moved:
        raise CheckFailed(
            "weights change although group['lr'] is 0",
            "read the learning rate from group['lr'] in each step",
        )
    return "read in each step"


def check_state(case: OptimizerCase) -> str:
    """A checkpoint of its state continues with the same bits."""
    model, optimizer, inputs, target = case.problem()
    for _ in range(3):
        _step(model, optimizer, inputs, target)
    wrong = unstorable_state(optimizer)
    if wrong:
        raise CheckFailed(
            f"state {', '.join(wrong)} is not a tensor", "keep it as torch.tensor(...)"
        )
    state = copy.deepcopy(optimizer.state_dict())
    other, again, _, _ = case.problem()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(state)
    for _ in range(2):
        _step(model, optimizer, inputs, target)
        _step(other, again, inputs, target)
    if not all(map(torch.equal, model.parameters(), other.parameters())):
        raise CheckFailed(
            "a resumed training continues with other numbers",
            "keep everything that step() changes in self.state",
        )
    return "resumes with the same bits"


OPTIMIZER_CHECKS: dict[str, Callable[[OptimizerCase], str]] = {
    "learning": check_descent,
    "learning rate": check_learning_rate,
    "state": check_state,
}


# Augmentations


@dataclass(frozen=True)
class AugmentationCase:
    """An augmentation to check: an entry of a table, and its arguments."""

    entry: Augmentation | Mixing
    arguments: Mapping[str, Any]

    def apply(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the images and labels of four epochs."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for epoch in range(1, 5):
            if isinstance(self.entry, Mixing):
                found.append(self.entry(images, labels, generator, **self.arguments))
            else:
                info = SampleInfo(torch.arange(len(images)), epoch, seed)
                found.append((self.entry(images, generator, info, **self.arguments), labels))
        return torch.cat([each for each, _ in found]), torch.cat([each for _, each in found])


# Number, channels and side of the images that an augmentation has to accept.
AUGMENTED_SHAPES = ((6, 1, 8, 8), (5, 3, 17, 17), (1, 3, 8, 8))


def _random_images(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    return images, torch.eye(4)[torch.arange(len(images)) % 4]


def check_augmented_images(case: AugmentationCase) -> str:
    """The images keep their type, number, channels and range; labels are probabilities."""
    for shape in AUGMENTED_SHAPES:
        images, labels = _random_images(shape)
        found, shares = case.apply(images, labels, 0)
        if found.dtype != torch.float32 or found.shape != (4 * shape[0], *shape[1:]):
            raise CheckFailed(
                f"{found.dtype} {list(found.shape[1:])} for images {list(shape[1:])}",
                "return float32 images of the same shape",
            )
        if not bool(((found >= 0) & (found <= 1)).all()):
            raise CheckFailed(
                f"values from {found.min():.3g} to {found.max():.3g}", "clamp them to 0 and 1"
            )
        is_share = bool((shares >= 0).all())
        if not is_share or not torch.allclose(shares.sum(1), torch.ones(len(shares)), atol=1e-5):
            raise CheckFailed("labels are not probabilities", "let the row of each image sum to 1")
    return "shape, type and range are kept"


def check_augmented_input(case: AugmentationCase) -> str:
    """The input is not changed."""
    for shape in AUGMENTED_SHAPES:
        images, labels = _random_images(shape)
        before = images.clone(), labels.clone()
        case.apply(images, labels, 0)
        if not torch.equal(images, before[0]) or not torch.equal(labels, before[1]):
            raise CheckFailed("it changes its input", "use no in-place operation on the images")
    return "kept"


def check_generator(case: AugmentationCase) -> str:
    """All random numbers are drawn from the given generator."""
    for shape in AUGMENTED_SHAPES:
        images, labels = _random_images(shape)
        found = []
        for seed in (1, 5):
            torch.manual_seed(seed)  # the global generator has no effect
            found.append(case.apply(images.clone(), labels.clone(), 0))
        if not all(map(torch.equal, *found)):
            raise CheckFailed(
                "the same generator gives other images",
                "draw with torch.rand(..., generator=generator), not with random or numpy",
            )
    return "the only source of random numbers"


AUGMENTATION_CHECKS: dict[str, Callable[[AugmentationCase], str]] = {
    "images": check_augmented_images,
    "input": check_augmented_input,
    "generator": check_generator,
}


# Data sets


@dataclass(frozen=True)
class DatasetCase:
    """A data set to check, by its name."""

    name: str


def check_splits(case: DatasetCase) -> str:
    """It has training images of two classes or more."""
    source = find_source(case.name)
    if len(source.classes) < 2:
        raise CheckFailed(f"{len(source.classes)} class", "a classifier needs two or more")
    sizes = [f"{split} {len(part.labels):,}" for split, part in source.parts.items()]
    return f"{len(source.classes)} classes, {', '.join(sizes)} images"


def check_repeatable(case: DatasetCase) -> str:
    """Two readings give the same images and labels."""
    first, second = find_source(case.name), find_source(case.name)
    for split, part in first.parts.items():
        other = second.parts[split]
        assert isinstance(part.images, EncodedFiles)
        assert isinstance(other.images, EncodedFiles)
        same_labels = part.labels.tolist() == other.labels.tolist()
        if not same_labels or part.images.stat_digest() != other.images.stat_digest():
            raise CheckFailed(
                f"{split}: other images or labels each time",
                "sort what is listed from folders, and leave out random transforms",
            )
    return "the same images and labels each time"


DATASET_CHECKS: dict[str, Callable[[DatasetCase], str]] = {
    "splits and classes": check_splits,
    "repeatable": check_repeatable,
}


# The command


@preserve_torch_settings()
@preserve_rng()
def check_part(
    part: str,
    options: Mapping[str, Any] | None = None,
    *,
    kind: str | None = None,
    image_size: int = 32,
) -> PartCheck:
    """Import a part of the user, and return a result for each check of its kind.

    Args:
        part: `FILE.py:NAME`, `package.module:NAME`, or an entry point.
        options: those that the recipe will give, such as `width` of a network.
        kind: `network`, `loss`, `optimizer`, `augmentation` or `dataset`; by default it is
            recognized.
        image_size: of the images for a network.

    Raises:
        UsageError: the part cannot be imported, or it is not clear what it is.
    """
    if kind is not None:
        lookup(_CASES, kind, "kind of part")
    with user_code.trust([part]):  # it was named for this
        kind = kind or recognize_kind(part)
        table, make_case = _CASES[kind]
        case = make_case(part, dict(options or {}), image_size)
        results = tuple(_run(name, check, case) for name, check in table.items())
    return PartCheck(part, kind, results)


def _network_case(part: str, options: Mapping[str, Any], image_size: int) -> NetworkCase:
    def build(classes: int, channels: int, size: int) -> nn.Module:
        return models.build_model(part, classes, channels, size, options)

    if user_network.has_variable_outputs(part):
        return NetworkCase(build, image_size=image_size)
    network = user_network.build_user_network(part, CLASSES, 3, image_size, options)
    with torch.no_grad():
        outputs = network.eval()(torch.zeros(2, 3, image_size, image_size)).shape[1]
    return NetworkCase(build, classes=outputs, image_size=image_size)


def _loss_case(part: str, options: Mapping[str, Any], image_size: int) -> LossCase:
    config = OptimConfig(loss=part, loss_options=dict(options))
    return LossCase(lambda counts: build_loss(LossInputs(config, counts)))


def _optimizer_case(part: str, options: Mapping[str, Any], image_size: int) -> OptimizerCase:
    values = dict(options)
    lr = values.pop("lr", 0.01)
    return OptimizerCase(OptimConfig(name=part, lr=lr, options=values))


def _augmentation_case(part: str, options: Mapping[str, Any], image_size: int) -> AugmentationCase:
    return AugmentationCase(user_augmentation(part), options)


def _dataset_case(part: str, options: Mapping[str, Any], image_size: int) -> DatasetCase:
    return DatasetCase(part)


_CASES: dict[str, tuple[Mapping[str, Callable[[Any], str]], Callable[..., Any]]] = {
    "network": (NETWORK_CHECKS, _network_case),
    "loss": (LOSS_CHECKS, _loss_case),
    "optimizer": (OPTIMIZER_CHECKS, _optimizer_case),
    "augmentation": (AUGMENTATION_CHECKS, _augmentation_case),
    "dataset": (DATASET_CHECKS, _dataset_case),
}


def _run(name: str, check: Callable[[Any], str], case: Any) -> CheckResult:
    """Run one check; an exception of the part is a failure."""
    try:
        return CheckResult(name, True, check(case))
    except CheckFailed as failure:
        return CheckResult(name, False, failure.what, failure.fix)
    except ConvlensError as error:
        where = f" ({error.where})" if error.where else ""
        return CheckResult(name, False, error.what + where, error.fix)
    except Exception as error:
        return CheckResult(
            name, False, user_code.describe_error(error), "run it alone to see the whole error"
        )


def recognize_kind(part: str) -> str:
    """Return what a part is, by its base class or by the names of its parameters.

    Raises:
        UsageError: neither tells it.
    """
    found = user_code.load_object("models", part)
    first = _parameters(found)[:2]
    if isinstance(found, type):
        if issubclass(found, torch.optim.Optimizer):
            return "optimizer"
        if issubclass(found, nn.Module):
            inputs = _parameters(found.forward)[1:]
            return "loss" if len(inputs) == 2 else "network"
        if issubclass(found, torch.utils.data.Dataset) or hasattr(found, "__getitem__"):
            return "dataset"
    elif first[:1] == ["images"]:
        return "augmentation"
    elif first in (["logits", "targets"], ["input", "target"], ["logits", "labels"]):
        return "loss"
    elif {"num_classes", "in_channels"} & set(_parameters(found)):
        return "network"
    elif not first or first[0] in ("split", "train"):
        return "dataset"
    raise UsageError(f"it is not clear what {part} is", fix=f"add --kind {'|'.join(_CASES)}")


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []
