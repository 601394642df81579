"""The table of network families and the one function that builds from it.

To add a family: one file in this folder, one line in `MODELS`. Its constructor takes
`(classes, channels, image_size, *, its own options)`; the network has `stages` (the names of
its sub-modules in order, what `look` and fine-tuning go by) and `head` (the name of its last
linear layer, so that it can be replaced). `tests/test_contracts.py` then runs it. Any other
name is torchvision's, or timm's as `timm/NAME` (`zoo.py`); `parts(model)` has the names of the
stages and the head of them all.
"""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from convlens.errors import UsageError
from convlens.models import zoo
from convlens.models.parts import Initialised, Parts, parts
from convlens.names import hint, near

__all__ = [
    "MODELS",
    "Initialised",
    "Parts",
    "build",
    "family",
    "load",
    "options_of",
    "parts",
    "try_out",
]

# File and class in this folder. By name, since torchvision takes a second or two to import.
MODELS: dict[str, str] = {
    "cnn": "cnn.CNN",
    "fastnet": "fastnet.FastNet",
    "resnet18": "resnet.ResNet18",
    "resnet34": "resnet.ResNet34",
    "resnet50": "resnet.ResNet50",
    "wrn": "wrn.WRN",
}
# Sizes that are tried in turn when an image has the wrong one for a network; 224 suits every one.
USUAL_SIZES = (16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 288, 320, 384)
MODEST = 30_000_000  # weights of a network that is tried out for real
FAILURES = (TypeError, ValueError, RuntimeError, OverflowError, AssertionError)


def build(
    name: str, classes: int, channels: int, image_size: int, options: Mapping[str, Any]
) -> nn.Module:
    """The network `name` for `classes` classes of `[channels, image_size, image_size]` images.

    Raises:
        UsageError: unknown family, unknown option (all at once, with near misses), bad value.
    """
    known = options_of(name)
    unknown = [key for key in options if key not in known]
    if unknown:
        hints = []
        for key in unknown:
            close = [f"model.{other}" for other in near(key, known)[:1]]
            hints.append(f"unknown key 'model.{key}'{hint(close)}")
        fix = f"model {name} has: {', '.join(known) or 'no keys of its own'}"
        raise UsageError("; ".join(hints), fix=fix)
    try:
        if name in MODELS:
            return family(name)(classes, channels, image_size, **options)
        return zoo.build(name, classes, channels, image_size, **options)
    except UsageError:
        raise
    # A text where a number belongs, or more weights than there is memory for.
    except FAILURES as error:
        raise UsageError(
            f"model {name}: {_reason(error)}", fix=f"received {dict(options)}"
        ) from error


def family(name: str) -> Callable[..., nn.Module]:
    """The class behind a line of `MODELS`."""
    file, _, called = MODELS[name].partition(".")
    found: Callable[..., nn.Module] = getattr(import_module(f"convlens.models.{file}"), called)
    return found


def load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts a network's complete tensors, as a file has them, into `model`.

    Beside its tensors a state dict has version numbers of the modules, which a file of tensors
    lacks; MNASNet refuses to be loaded without. The file was written by this very class, so the
    network's own numbers are right.

    Raises:
        RuntimeError: names or shapes that differ.
    """
    state = OrderedDict(tensors)
    setattr(state, "_metadata", getattr(model.state_dict(), "_metadata"))  # noqa: B009, B010
    model.load_state_dict(state)


def options_of(name: str) -> dict[str, Any]:
    """The network's own options with their defaults.

    Of our families they are read from the constructor; of others None stands for the default.

    Raises:
        UsageError: no such network, with near misses.
    """
    if name not in MODELS:
        return zoo.options_of(name, MODELS)
    parameters = inspect.signature(family(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def try_out(
    name: str, channels: int, image_size: int, options: Mapping[str, Any], batch_size: int = 2
) -> nn.Module:
    """Runs a training batch through a network for two classes; returns it, on the meta device.

    Of large networks only shapes are computed: nothing is allocated. Nothing is drawn in any case.
    (A network that can't be had so is built for real and not run.)

    Raises:
        UsageError: what `build` says; images too small for the network (with a size that does);
            a single image in a batch where a norm would see one value of each channel.
    """

    def attempt(size: int, batch: int) -> nn.Module:
        try:
            with torch.device("meta"), _Undrawn():
                model = build(name, 2, channels, size, options)
            if not _takes_zeros(model, (batch, channels, size, size)):
                with torch.device("meta"):
                    model.train()(torch.empty(batch, channels, size, size))
            return model
        except FAILURES as error:
            if re.search(r"\bmeta\b", str(error), re.IGNORECASE):
                # It reads numbers off tensors, or does what has no shapes-only form.
                return build(name, 2, channels, size, options)
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"model {name}: {_reason(error)}") from error

    def works(size: int) -> bool:
        try:
            attempt(size, 2)
        except UsageError:
            return False
        return True

    try:
        model = attempt(image_size, 2)
    except UsageError as error:
        if image_size == 224 or not works(224):  # it isn't the size
            raise
        larger = [size for size in USUAL_SIZES if size > image_size]
        smaller = [size for size in reversed(USUAL_SIZES) if size < image_size]
        suits = next(filter(works, [*larger, *smaller]))
        reason = error.what.removeprefix(f"model {name}: ")
        raise UsageError(
            f"model {name} can't take images of {image_size} px: {reason}",
            fix=f"data.image_size={suits} works, or choose another network",
        ) from error
    if batch_size == 1:
        try:
            attempt(image_size, 1)
        except UsageError as error:
            raise UsageError(
                f"train.batch_size=1: {error.what}",
                fix="batch norm needs two values of each channel: train.batch_size=2 or more",
            ) from error
    return model


class _Undrawn(TorchFunctionMode):
    """Leaves weights on the meta device without initial values, which they don't keep anyway.

    torch goes through every one of these operations in Python there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init" or func in _FILLS:
            target = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **(kwargs or {}))


_FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)


def _takes_zeros(model: nn.Module, shape: tuple[int, int, int, int]) -> bool:
    """Whether a network of modest size, all its weights 0, takes a training batch of zeros.

    `model` is on the meta device and stays there. Shapes alone are computed in Python, for which
    torch imports SymPy and its compiler: two seconds, where a small network takes milliseconds.
    No is no verdict.
    """
    if sum(p.numel() for p in model.parameters()) > MODEST or shape[-1] > 224:
        return False
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    zeros = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            functional_call(model.train(), zeros, (torch.zeros(shape),))
    except Exception:  # the meta device says what is wrong, if anything
        return False
    return True


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
