"""The names by which a network's parts are known: its stages in order, and its head.

Our own families say them (`stages`, `head`). Networks of other libraries don't, and may have
sub-modules of just these names; for them `name_parts` finds out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from convlens.errors import UsageError, close_matches, did_you_mean_suffix

# Containers that hold a whole trunk: their children are the stages, not they themselves.
TRUNKS = ("features", "encoder", "layers", "blocks", "stages", "trunk_output")
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)
ATTRIBUTE = "convlens_parts"


@dataclass(frozen=True)
class ModelParts:
    """Dotted names of sub-modules: `stages` in the order of the forward pass, and the `head`."""

    stages: tuple[str, ...]
    head: str


@runtime_checkable
class DataInitialized(Protocol):
    """A network some of whose weights are computed from images before it is trained."""

    def initialize(self, images: Tensor) -> None:
        """Takes some thousand training images, normalised, float32 `[N, C, H, W]`."""
        ...


def model_parts(model: nn.Module) -> ModelParts:
    """The names of `model`'s stages and head; what fine-tuning and looking inside go by."""
    found = getattr(model, ATTRIBUTE, None)
    if isinstance(found, ModelParts):
        return found
    stages, head = getattr(model, "stages", ()), getattr(model, "head", "")
    return ModelParts(tuple(cast(Sequence[str], stages)), cast(str, head))


def stage_of(model: nn.Module) -> dict[str, str]:
    """The stage of each parameter, by the names that `named_parameters` gives.

    A stage is all that lies behind the one before it, up to and including the sub-module that
    gives it its name, in the order of registration: for a ResNet with
    `stages = ("maxpool", "layer1", ...)`, `conv1` and `bn1` are in `maxpool`. Names may be dotted
    (`features.4`). What lies behind the last stage belongs to the head, by the head's name.
    """
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    ends: list[tuple[int, str]] = []
    known = model_parts(model)
    for stage in known.stages:
        below = (place for name, place in order.items() if is_below(name, stage))
        ends.append((max(below), stage))
    found = {}
    for name, _ in model.named_parameters():
        place = order[name.rpartition(".")[0]]
        found[name] = next((stage for end, stage in ends if place <= end), known.head)
    return found


def is_below(name: str, module: str) -> bool:
    """Whether `name` (of a module or parameter) is `module` itself or inside it."""
    return name == module or name.startswith(f"{module}.")


def name_parts(model: nn.Module, head: str) -> None:
    """Gives a network of another library its `parts`.

    They are also its attributes `stages` and `head`, unless it has sub-modules of that name.
    """
    found = ModelParts(tuple(_stages(model, head)), head)
    setattr(model, ATTRIBUTE, found)
    for name, value in (("stages", found.stages), ("head", found.head)):
        if not hasattr(model, name):
            setattr(model, name, value)


def last_layer(model: nn.Module) -> str:
    """The name of the last linear layer or, where there is none, of the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        names: list[str] = [
            name for name, module in model.named_modules() if isinstance(module, kind)
        ]
        if names:
            return names[-1]
    raise ValueError("it has no layer that gives logits")


def _stages(model: nn.Module, head: str, prefix: str = "") -> Iterator[str]:
    """The children in order up to the head, a trunk's children in its place.

    Single layers are no stages but for the poolings: these end a block in networks that are one
    long chain, and the stem in others.
    """
    for name, child in model.named_children():
        full = prefix + name
        if head == full or head.startswith(f"{full}."):
            return
        if name in TRUNKS:
            yield from _stages(child, head, f"{full}.")
        elif isinstance(child, POOLINGS) or has_layers(child):
            yield full


def has_layers(module: nn.Module) -> bool:
    """Whether it is made of modules that have weights, and can be called."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # its children are called, it is not
        return False
    return any(True for child in module.children() for _ in child.parameters())


# ---- freezing ----------------------------------------
# Which parameters of a network learn (`model.trainable`), and how the others stay as they are.

TRAINABLE_FORMS = "all, head, stages, last:K, NAME+ or names with commas (layer3,layer4,fc)"


def freeze(model: nn.Module, trainable: str) -> None:
    """Takes every parameter that `trainable` does not mean out of training, in place.

    What a family keeps fixed itself (fastnet's whitening filters) stays so whatever is asked.

    Args:
        trainable: `all`; `head` (the classifier alone) or `stages` (all but the classifier);
            `last:K`, the last K children as torchvision lists them, with or without parameters
            (of a ResNet, `last:4` is layer3, layer4, avgpool and fc); `NAME+`, that module and
            all behind it; or names of modules with commas between.

    Raises:
        UsageError: words that mean nothing here, modules that aren't there, or a choice that
            leaves nothing to train.
    """
    chosen = _trainable_names(model, trainable)
    learns = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
        learns |= parameter.requires_grad
    if not learns:
        children = ", ".join(name for name, _ in model.named_children())
        raise UsageError(
            f"model.trainable={trainable!r} leaves nothing to train: everything would be frozen",
            fix=f"the network's children are: {children}; forms: {TRAINABLE_FORMS}",
        )


def set_train_mode(model: nn.Module) -> None:
    """Train mode, with everything frozen left in eval mode.

    Frozen is a sub-module that has parameters of which none requires a gradient (so a frozen
    batch norm keeps its statistics), and all of `frozen_prefix`: a frozen trunk is then one fixed
    function, dropout included.
    """
    model.train()
    whole = getattr(model, "_orig_mod", model)  # without torch.compile's wrapper
    for module in whole.modules():
        if module is not whole and _is_frozen(module):
            module.eval()
    for name in frozen_prefix(whole):
        whole.get_submodule(name).eval()


def frozen_prefix(model: nn.Module) -> list[str]:
    """Dotted names of the modules before the first that learns: the trunk, if it is frozen.

    Goes by the order of definition, into a `Sequential` of which a part learns. Empty where no
    weight comes before the first that learns. A dropout right before what learns is no part of
    the trunk: it belongs to the classifier behind it.
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
    weighty = [bool(list(module.parameters())) for module in modules]
    if not any(weighty):
        return []
    last = len(weighty) - 1 - weighty[::-1].index(True)
    for place in range(last + 1, len(prefix)):
        if any(isinstance(module, _DropoutNd) for module in modules[place].modules()):
            return prefix[:place]
    return prefix


def _is_frozen(module: nn.Module) -> bool:
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    return bool(wanted) and not any(wanted)


def _trainable_names(model: nn.Module, trainable: str) -> set[str]:
    """Names of the parameters that `trainable` means."""
    every = [name for name, _ in model.named_parameters()]
    children = [name for name, _ in model.named_children()]
    word, colon, count = trainable.partition(":")
    if trainable == "all":
        return set(every)
    if trainable in ("head", "stages"):
        head = set(_modules_below(every, [model_parts(model).head]))
        return head if trainable == "head" else set(every) - head
    if colon and word == "last":
        if not count.isdecimal() or not 1 <= int(count) <= len(children):
            raise UsageError(
                f"model.trainable={trainable!r}: the network has {len(children)} children",
                fix=f"last:1 to last:{len(children)} of {', '.join(children)}",
            )
        return set(_modules_below(every, children[-int(count) :]))
    if trainable.endswith("+"):
        return set(_modules_from(model, _known(model, [trainable[:-1]], trainable)[0]))
    names = [name.strip() for name in trainable.split(",")]
    return set(_modules_below(every, _known(model, names, trainable)))


def _known(model: nn.Module, names: list[str], trainable: str) -> list[str]:
    modules = [name for name, _ in model.named_modules() if name]
    unknown = [name for name in names if name not in modules]
    if unknown:
        close = close_matches(unknown[0], modules)
        children = ", ".join(name for name, _ in model.named_children())
        raise UsageError(
            f"model.trainable={trainable!r}: no module {unknown[0]!r}{did_you_mean_suffix(close)}",
            fix=f"{TRAINABLE_FORMS}; children: {children}",
        )
    return names


def _modules_below(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The names that lie inside one of the modules."""
    starts = tuple(f"{module}." for module in modules)
    return [name for name in names if name.startswith(starts)]


def _modules_from(model: nn.Module, first: str) -> list[str]:
    """Parameters of `first` and of every module after it, in the order of definition."""
    modules = [name for name, _ in model.named_modules()]
    behind = set(modules[modules.index(first) :])
    return [n for n, _ in model.named_parameters() if n.rpartition(".")[0] in behind]
