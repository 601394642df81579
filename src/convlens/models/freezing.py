"""Which parameters of a network learn (`model.trainable`), and how the others stay as they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from convlens.errors import UsageError
from convlens.models.parts import parts
from convlens.names import hint, near

FORMS = "all, head, stages, last:K, NAME+ or names with commas (layer3,layer4,fc)"


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
    chosen = _chosen(model, trainable)
    learns = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
        learns |= parameter.requires_grad
    if not learns:
        children = ", ".join(name for name, _ in model.named_children())
        raise UsageError(
            f"model.trainable={trainable!r} leaves nothing to train: everything would be frozen",
            fix=f"the network's children are: {children}; forms: {FORMS}",
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


def _chosen(model: nn.Module, trainable: str) -> set[str]:
    """Names of the parameters that `trainable` means."""
    every = [name for name, _ in model.named_parameters()]
    children = [name for name, _ in model.named_children()]
    word, colon, count = trainable.partition(":")
    if trainable == "all":
        return set(every)
    if trainable in ("head", "stages"):
        head = set(_below(every, [parts(model).head]))
        return head if trainable == "head" else set(every) - head
    if colon and word == "last":
        if not count.isdecimal() or not 1 <= int(count) <= len(children):
            raise UsageError(
                f"model.trainable={trainable!r}: the network has {len(children)} children",
                fix=f"last:1 to last:{len(children)} of {', '.join(children)}",
            )
        return set(_below(every, children[-int(count) :]))
    if trainable.endswith("+"):
        return set(_from(model, _known(model, [trainable[:-1]], trainable)[0]))
    names = [name.strip() for name in trainable.split(",")]
    return set(_below(every, _known(model, names, trainable)))


def _known(model: nn.Module, names: list[str], trainable: str) -> list[str]:
    modules = [name for name, _ in model.named_modules() if name]
    unknown = [name for name in names if name not in modules]
    if unknown:
        close = near(unknown[0], modules)
        children = ", ".join(name for name, _ in model.named_children())
        raise UsageError(
            f"model.trainable={trainable!r}: no module {unknown[0]!r}{hint(close)}",
            fix=f"{FORMS}; children: {children}",
        )
    return names


def _below(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The names that lie inside one of the modules."""
    starts = tuple(f"{module}." for module in modules)
    return [name for name in names if name.startswith(starts)]


def _from(model: nn.Module, first: str) -> list[str]:
    """Parameters of `first` and of every module after it, in the order of definition."""
    modules = [name for name, _ in model.named_modules()]
    behind = set(modules[modules.index(first) :])
    return [n for n, _ in model.named_parameters() if n.rpartition(".")[0] in behind]
