"""Networks that users write: building, checking, and finding their stages and head.

A network is a class or a function that returns an `nn.Module` for images `[N, C, S, S]`, with
logits `[N, K]`. It is called with those of the keywords `num_classes`, `in_channels` and
`image_size` that its signature names, and with the options of the recipe's section `model`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convlens import user_code
from convlens.errors import UsageError
from convlens.models import stages

STANDARD_KEYWORDS = ("num_classes", "in_channels", "image_size")


def network_options(name: str) -> dict[str, Any]:
    """Return the options of a network with their defaults; None where it has no default.

    Raises:
        ConvlensError: as by `user_code.load_object`.
    """
    keywords, _ = user_code.accepted_keywords(user_code.load_object("models", name))
    empty = inspect.Parameter.empty
    return {
        key: None if default is empty else default
        for key, default in keywords.items()
        if key not in STANDARD_KEYWORDS
    }


def has_variable_outputs(name: str) -> bool:
    """Return whether a network can be built for any number of classes."""
    keywords, takes_any = user_code.accepted_keywords(user_code.load_object("models", name))
    return takes_any or "num_classes" in keywords


def build_user_network(
    name: str, classes: int, channels: int, image_size: int, options: Mapping[str, Any]
) -> nn.Module:
    """Build a network, without running it.

    Raises:
        UsageError: unknown or missing options, an exception in its code, or no network.
        ConvlensError: as by `user_code.load_object`.
    """
    make: Callable[..., Any] = user_code.load_object("models", name)
    keywords, takes_any = user_code.accepted_keywords(make)
    standard = dict(zip(STANDARD_KEYWORDS, (classes, channels, image_size), strict=True))
    given = {key: value for key, value in standard.items() if takes_any or key in keywords}
    own = {key: value for key, value in keywords.items() if key not in STANDARD_KEYWORDS}
    if not takes_any:
        user_code.check_options(f"model {name}", own, options)
    try:
        model = make(**given, **options)
    except Exception as error:
        raise code_error(name, error) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model {name}: returned an object of type {type(model).__name__!r}",
            fix="name a torch.nn.Module class, or a function that returns a network",
        )
    return model


def prepare_user_network(
    model: nn.Module, name: str, classes: int | None, channels: int, image_size: int
) -> None:
    """Check the outputs for two images of zeros in eval mode, and find the stages and the head.

    Args:
        classes: the number of outputs that the network must have; None for any.

    Raises:
        UsageError: an exception in its code, an output that is not float `[2, classes]`, or no
            layer that can be the head.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UsageError(f"model {name}: it has no parameters to train")
    images = torch.zeros(2, channels, image_size, image_size, device=parameter.device)
    called: list[str] = []
    names = {module: key for key, module in model.named_modules() if key}
    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(names[module]))
        for module in names
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:
        raise code_error(name, error) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    check_logits(name, logits, 2, classes)
    if not isinstance(getattr(model, stages.PARTS_ATTRIBUTE, None), stages.ModelParts):
        _find_parts(model, name, logits.shape[1], called)


def check_logits(name: str, logits: object, images: int, classes: int | None) -> None:
    """Refuse outputs that are not logits.

    Raises:
        UsageError: says what was returned, and what is expected.
    """
    expected = f"[N, {'K' if classes is None else classes}]"
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"model {name}: returned an object of type {type(logits).__name__!r}, not a tensor",
            fix=f"return logits {expected} only",
        )
    shape = list(logits.shape)
    if len(shape) != 2 or shape[0] != images or classes not in (None, shape[1]):
        raise UsageError(
            f"model {name}: returned the shape {shape} for {images} images, not {expected}",
            fix="return one row of logits for each image; the keyword num_classes is their number",
        )
    if not logits.is_floating_point():
        raise UsageError(f"model {name}: returned {logits.dtype}, not floating-point logits")
    if logits.device.type != "meta" and not bool(torch.isfinite(logits).all()):
        raise UsageError(
            f"model {name}: returned NaN or infinity for black images",
            fix="look for a division by zero or a logarithm of zero",
        )


def code_error(name: str, error: Exception) -> Exception:
    """Return the error for an exception that a network raised."""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return error
    return user_code.part_error("models", name, error)


def _find_parts(model: nn.Module, name: str, outputs: int, called: Sequence[str]) -> None:
    """Store the names of the stages and the head for `models.model_parts`.

    Attributes `stages` and `head`, as those of the families of convlens, have priority.

    Args:
        called: names of the modules in the order in which they were called.
    """
    modules = dict(model.named_modules())
    head = getattr(model, "head", None)
    if not isinstance(head, str) or head not in modules:
        head = _find_head(modules, name, outputs, called)
    own: Any = getattr(model, "stages", ())
    if _are_modules(own, modules):
        found = list(own)
    else:
        candidates = list(stages.children_with_layers(model, head)) or list(
            _layers_before(model, head)
        )
        found = [each for each in candidates if each in called]
        found.sort(key=called.index)
    parts = stages.ModelParts(tuple(found), head)
    setattr(model, stages.PARTS_ATTRIBUTE, parts)


def _find_head(
    modules: Mapping[str, nn.Module], name: str, outputs: int, called: Sequence[str]
) -> str:
    """Return the last linear layer, or else convolution, that was called with as many outputs."""
    for kind, width in ((nn.Linear, "out_features"), (nn.Conv2d, "out_channels")):
        for each in reversed(called):
            if isinstance(modules[each], kind) and getattr(modules[each], width) == outputs:
                return each
    raise UsageError(
        f"model {name}: no nn.Linear or nn.Conv2d has {outputs} outputs, so it has no head",
        fix="compute the logits with an nn.Linear layer, the classifier",
    )


def _are_modules(names: Any, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a value is a list of names of modules, and not, say, a `ModuleList`."""
    return isinstance(names, list | tuple) and bool(names) and all(n in modules for n in names)


def _layers_before(model: nn.Module, head: str, prefix: str = "") -> Iterator[str]:
    """Yield the layers with weights before the head; of a container that holds it, its layers."""
    for name, child in model.named_children():
        full = prefix + name
        if full == head:
            return
        if stages.is_below(head, full):
            yield from _layers_before(child, head, f"{full}.")
            return
        if next(child.parameters(), None) is not None:
            yield full
