"""Which parameters of a network learn (`model.trainable`), and how the others stay as they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from convlens.errors import UsageError
from convlens.models.parts import parts
from convlens.names import near

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
    batch norm keeps its statistics), and all that comes before the first child with a trainable
    parameter: a frozen trunk is then one fixed function, dropout included.
    """
    model.train()
    for module in model.modules():
        if module is not model and _is_frozen(module):
            module.eval()
    for child in getattr(model, "_orig_mod", model).children():  # without torch.compile's wrapper
        if any(parameter.requires_grad for parameter in child.parameters()):
            break
        child.eval()


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
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        children = ", ".join(name for name, _ in model.named_children())
        raise UsageError(
            f"model.trainable={trainable!r}: no module {unknown[0]!r}{hint}",
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
