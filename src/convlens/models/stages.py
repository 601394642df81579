"""Stages and head of a network by name, and freezing of parameters (`model.trainable`).

The families of convlens have attributes `stages` and `head`. Networks of other libraries lack them,
or have sub-modules with these names; `name_parts` determines their stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from convlens.errors import UsageError, close_matches, did_you_mean_suffix

# Names of containers that hold a whole backbone: their children are the stages.
BACKBONES = ("features", "encoder", "layers", "blocks", "stages", "trunk_output")
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)
# Attribute in which `name_parts` stores its result.
PARTS_ATTRIBUTE = "convlens_parts"
# Attribute of a batch norm whose statistics `freeze_batch_norm` keeps.
FROZEN_ATTRIBUTE = "convlens_frozen_statistics"
TRAINABLE_FORMS = "all, head, stages, last:K, NAME+ or names with commas (layer3,layer4,fc)"


@dataclass(frozen=True)
class ModelParts:
    """Dotted names of sub-modules: `stages` in the order of the forward pass, and the `head`."""

    stages: tuple[str, ...]
    head: str


@runtime_checkable
class DataInitialized(Protocol):
    """A network that computes some of its weights from images before training."""

    def initialize(self, images: Tensor) -> None:
        """Set these weights from some thousand normalized training images, `[N, C, H, W]`."""
        ...


def model_parts(model: nn.Module) -> ModelParts:
    """Return the names of a model's stages and head."""
    parts = getattr(model, PARTS_ATTRIBUTE, None)
    if isinstance(parts, ModelParts):
        return parts
    stages, head = getattr(model, "stages", ()), getattr(model, "head", "")
    return ModelParts(tuple(cast(Sequence[str], stages)), cast(str, head))


def stage_of(model: nn.Module) -> dict[str, str]:
    """Map each parameter, by its name in `named_parameters`, to the name of its stage.

    In the order of registration, a stage contains everything after the previous stage, up to and
    including the sub-module it is named after: for a ResNet with
    `stages = ("maxpool", "layer1", ...)`, `conv1` and `bn1` are in `maxpool`. Names may be dotted
    (`features.4`). Everything after the last stage belongs to the head, under the head's name.
    """
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    parts = model_parts(model)
    ends = [
        (max(index for name, index in order.items() if is_below(name, stage)), stage)
        for stage in parts.stages
    ]
    stages = {}
    for name, _ in model.named_parameters():
        index = order[name.rpartition(".")[0]]
        stages[name] = next((stage for end, stage in ends if index <= end), parts.head)
    return stages


def is_below(name: str, module: str) -> bool:
    """Return whether `name` (of a module or parameter) is `module` itself or inside it."""
    return name == module or name.startswith(f"{module}.")


def name_parts(model: nn.Module, head: str) -> None:
    """Determine the stages of a network of another library, for `model_parts`.

    Also sets its attributes `stages` and `head`, unless it has sub-modules with these names.
    """
    parts = ModelParts(tuple(children_with_layers(model, head)), head)
    setattr(model, PARTS_ATTRIBUTE, parts)
    for name, value in (("stages", parts.stages), ("head", parts.head)):
        if not hasattr(model, name):
            setattr(model, name, value)


def last_layer(model: nn.Module) -> str:
    """Return the name of the last linear layer, or of the last convolution if there is none."""
    for kind in (nn.Linear, nn.Conv2d):
        names: list[str] = [
            name for name, module in model.named_modules() if isinstance(module, kind)
        ]
        if names:
            return names[-1]
    raise ValueError("the network has no linear layer and no convolution")


def children_with_layers(model: nn.Module, head: str, prefix: str = "") -> Iterator[str]:
    """Yield the children in order up to the head; the children of a backbone instead of itself.

    Single layers are not stages, except for poolings: these end a block in networks that are one
    long chain of layers, and the stem in others.
    """
    for name, child in model.named_children():
        full = prefix + name
        if head == full or head.startswith(f"{full}."):
            return
        if name in BACKBONES:
            yield from children_with_layers(child, head, f"{full}.")
        elif isinstance(child, POOLINGS) or has_layers(child):
            yield full


def has_layers(module: nn.Module) -> bool:
    """Return whether a module is callable and contains modules with weights."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # only their children are called
        return False
    return any(True for child in module.children() for _ in child.parameters())


def freeze(model: nn.Module, trainable: str) -> None:
    """Freeze every parameter that `trainable` does not select, in place.

    Parameters that a family keeps fixed (fastnet's whitening filters) stay frozen in any case.

    Args:
        trainable: `all`; `head` (only the classifier) or `stages` (all but the classifier);
            `last:K`, the last K children in torchvision's order, with or without parameters (of a
            ResNet, `last:4` is layer3, layer4, avgpool and fc); `NAME+`, that module and all after
            it; or names of modules, separated by commas.

    Raises:
        UsageError: invalid value, unknown modules, or nothing left to train.
    """
    selected = _trainable_names(model, trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in selected)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        children = ", ".join(name for name, _ in model.named_children())
        raise UsageError(
            f"model.trainable={trainable!r} leaves nothing to train: all parameters are frozen",
            fix=f"the network's children are: {children}; forms: {TRAINABLE_FORMS}",
        )


def freeze_batch_norm(model: nn.Module) -> None:
    """Keep the statistics of all batch norms in training; weights and biases are still trained.

    The few batches of a fine-tuning give worse statistics than those that the network was trained
    with, and differ from them because the images are augmented.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            setattr(module, FROZEN_ATTRIBUTE, True)


def set_train_mode(model: nn.Module) -> None:
    """Set train mode, and eval mode for everything frozen.

    A sub-module is frozen if it has parameters and none of them requires a gradient, so a frozen
    batch norm keeps its statistics; `freeze_batch_norm` keeps those of the others. All modules of
    `frozen_prefix` are in eval mode too: a frozen backbone is a fixed function, dropout included.
    """
    model.train()
    network = getattr(model, "_orig_mod", model)  # without the wrapper of torch.compile
    for module in network.modules():
        keeps_statistics = getattr(module, FROZEN_ATTRIBUTE, False)
        if keeps_statistics or (module is not network and _is_frozen(module)):
            module.eval()
    for name in frozen_prefix(network):
        network.get_submodule(name).eval()


def frozen_prefix(model: nn.Module) -> list[str]:
    """Return the dotted names of the modules before the first that is trained.

    The order is that of definition; a `Sequential` of which a part is trained is entered. The list
    is empty if no weight comes before the first trained module. A dropout right before the first
    trained module is not included: it belongs to the classifier that follows.
    """
    prefix = list[str]()
    parent, path, descends = model, "", True
    while descends:
        descends = False
        for name, child in parent.named_children():
            if any(p.requires_grad for p in child.parameters()):
                descends = isinstance(child, nn.Sequential)
                parent, path = child, f"{path}{name}."
                break
            prefix.append(f"{path}{name}")
    modules = [model.get_submodule(name) for name in prefix]
    with_weights = [
        index for index, m in enumerate(modules) if next(m.parameters(), None) is not None
    ]
    if not with_weights:
        return []
    for index in range(with_weights[-1] + 1, len(prefix)):
        if any(isinstance(module, _DropoutNd) for module in modules[index].modules()):
            return prefix[:index]
    return prefix


def _is_frozen(module: nn.Module) -> bool:
    requires_grad = [parameter.requires_grad for parameter in module.parameters()]
    return bool(requires_grad) and not any(requires_grad)


def _trainable_names(model: nn.Module, trainable: str) -> set[str]:
    """Return the names of the parameters that `trainable` selects."""
    parameters = [name for name, _ in model.named_parameters()]
    children = [name for name, _ in model.named_children()]
    word, colon, count = trainable.partition(":")
    if trainable == "all":
        return set(parameters)
    if trainable in ("head", "stages"):
        head = set(_parameters_of(parameters, [model_parts(model).head]))
        return head if trainable == "head" else set(parameters) - head
    if colon and word == "last":
        if not count.isdecimal() or not 1 <= int(count) <= len(children):
            raise UsageError(
                f"model.trainable={trainable!r}: the network has {len(children)} children",
                fix=f"last:1 to last:{len(children)} of {', '.join(children)}",
            )
        return set(_parameters_of(parameters, children[-int(count) :]))
    if trainable.endswith("+"):
        first = trainable.removesuffix("+")
        _check_modules_exist(model, [first], trainable)
        return set(_parameters_from(model, first))
    names = [name.strip() for name in trainable.split(",")]
    _check_modules_exist(model, names, trainable)
    return set(_parameters_of(parameters, names))


def _check_modules_exist(model: nn.Module, names: list[str], trainable: str) -> None:
    modules = [name for name, _ in model.named_modules() if name]
    unknown = [name for name in names if name not in modules]
    if unknown:
        close = close_matches(unknown[0], modules)
        children = ", ".join(name for name, _ in model.named_children())
        raise UsageError(
            f"model.trainable={trainable!r}: no module {unknown[0]!r}{did_you_mean_suffix(close)}",
            fix=f"{TRAINABLE_FORMS}; children: {children}",
        )


def _parameters_of(parameters: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Return the parameters inside one of the modules."""
    prefixes = tuple(f"{module}." for module in modules)
    return [name for name in parameters if name.startswith(prefixes)]


def _parameters_from(model: nn.Module, first: str) -> list[str]:
    """Return the parameters of `first` and of every module after it, in order of definition."""
    modules = [name for name, _ in model.named_modules()]
    selected = set(modules[modules.index(first) :])
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in selected]
