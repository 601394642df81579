"""Loading weights of another origin into a network: all that fits, or an error and no change.

Prefixes of wrappers are stripped, tensors of equal name and shape are copied, the first convolution
is adapted to another number of channels or kernel size, and a head of other classes is left as
initialized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlens.errors import ModelFileError
from convlens.models.stages import model_parts

# Prefixes added by training code: DataParallel, torch.compile, Lightning and others.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.")
# Weights belong to another architecture if they cover less of the network than this, or the
# network covers less of them. Half is too little: a ResNet-18 is contained in a ResNet-34 and
# covers 52% of it, and a ResNet-50 covers 56% of a ResNet-18 by name and shape.
MIN_COVERAGE = 2 / 3


@dataclass(frozen=True)
class FittedWeights:
    """Result of `fit_weights`: names of tensors by what was done with them.

    Attributes:
        matched: tensors of the network that were copied unchanged.
        adapted: tensors of the network that were copied after a change, with a description of it.
        left: tensors of the file that were not used.
        new: tensors of the network that keep their initial values.
        head: what was done with the head, in words.
    """

    matched: list[str]
    adapted: dict[str, str]
    left: list[str]
    new: list[str]
    head: str

    def lines(self) -> list[str]:
        """Return the report for the user, one fact per line."""
        lines = [f"{len(self.matched)} tensors loaded; {self.head}"]
        lines += [f"adapted {name}: {change}" for name, change in self.adapted.items()]
        if self.new:
            lines.append(f"not in the file, newly initialized: {_abbreviate(self.new)}")
        if self.left:
            lines.append(f"in the file, not used: {_abbreviate(self.left)}")
        return lines


def fit_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], *, keep_head: bool = True, where: str = ""
) -> FittedWeights:
    """Copy `tensors` into `model`, in place, where name and shape fit.

    The head (`model_parts(model).head`) is copied as a whole, and only with `keep_head` and if its
    shapes are equal; otherwise it keeps its initial values. Counters of batch norms may be missing.

    Args:
        where: path of the file, for errors.

    Raises:
        ModelFileError: weights of another architecture, or with NaN or infinite values. The model
            is unchanged.
    """
    state = model.state_dict()
    given, foreign = _unwrap(tensors, state)
    head = _head_prefix(model)
    first_kernel = _first_kernel(model)
    values: dict[str, Tensor] = {}
    adapted: dict[str, str] = {}
    for name, tensor in state.items():
        value = given.get(name)
        if value is None or name.startswith(head):
            continue
        if value.is_floating_point() != tensor.is_floating_point():
            continue
        if value.shape == tensor.shape:
            values[name] = value
        elif name == first_kernel and _is_adaptable(value, tensor):
            values[name], adapted[name] = adapt_input(value, tensor.shape)
    _check_architecture(model, state, given, values, where)
    head_values, head_report = _fit_head(state, given, head, keep_head)
    values |= head_values
    _check_finite(values, where)
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    return FittedWeights(
        matched=[name for name in values if name not in adapted],
        adapted=adapted,
        left=[*(name for name in given if name not in values), *foreign],
        new=[name for name in state if name not in values and not _is_counter(name)],
        head=head_report,
    )


def adapt_input(kernel: Tensor, shape: Iterable[int]) -> tuple[Tensor, str]:
    """Convert the kernel of a first convolution to other input channels or another size.

    From 3 channels to 1, kernels are summed: a grey image gives the response of its RGB copy. From
    1 to 3, each channel gets a third. For another size, each new tap is the integral of the old
    kernel, stretched to the new size, over the area of the tap. The integrals add up to the sum of
    the old taps, so the response to a constant image does not change.

    Args:
        kernel: `[O, C, k, k]`.
        shape: shape of the result.

    Returns:
        The new kernel, and a description of the change.
    """
    _, channels, height, width = shape
    changes = [f"{_shape(kernel.shape)} -> {_shape((kernel.shape[0], channels, height, width))}"]
    result = kernel.float()
    if kernel.shape[1] != channels:
        summed = channels == 1
        result = result.sum(1, keepdim=True) if summed else result.expand(-1, 3, -1, -1) / 3
        changes.append("channels summed" if summed else "a third for each channel")
    if tuple(kernel.shape[2:]) != (height, width):
        rows, columns = _overlaps(kernel.shape[2], height), _overlaps(kernel.shape[3], width)
        result = torch.einsum("ih,ochw,jw->ocij", rows, result, columns)
        changes.append("kernel resampled by area, response to a constant image kept")
    return result, "; ".join(changes)


def _overlaps(old: int, new: int) -> Tensor:
    """`[new, old]`: the fraction of each old tap inside each new one; columns add up to 1."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    taps = torch.arange(old, dtype=torch.float64)
    lower = torch.maximum(edges[:-1, None], taps[None])
    upper = torch.minimum(edges[1:, None], taps[None] + 1)
    return (upper - lower).clamp(min=0).float()


def _head_prefix(model: nn.Module) -> str:
    return f"{model_parts(model).head}."


def _first_kernel(model: nn.Module) -> str:
    """The name of the first convolution's kernel; empty if it can't be adapted."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return f"{name}.weight" if module.groups == 1 else ""
    return ""


def _is_adaptable(given: Tensor, wanted: Tensor) -> bool:
    if given.ndim != 4 or given.shape[0] != wanted.shape[0]:
        return False
    channels = (given.shape[1], wanted.shape[1])
    return channels[0] == channels[1] or channels in ((1, 3), (3, 1))


def _unwrap(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Strip the wrapper's prefix; return tensors by name, and the names without that prefix.

    The prefix is the sequence of `WRAPPERS` (or none) under which most of the network is found. A
    file may hold two copies, or a network whose own names begin like a wrapper's.
    """
    # Where parts of a network were compiled, the wrapper's name is inside the tensor's name.
    file_names = {name.replace("_orig_mod.", ""): name for name in tensors}
    sizes = dict.fromkeys(_prefixes(file_names), 0)
    for prefix in sizes:
        known = (state[name] for name in _strip(file_names, prefix) if name in state)
        sizes[prefix] = sum(tensor.numel() for tensor in known)
    best = max(sizes, key=lambda prefix: (sizes[prefix], -len(prefix)), default="")
    unwrapped = {name: tensors[file_names[best + name]] for name in _strip(file_names, best)}
    return unwrapped, [name for key, name in file_names.items() if not key.startswith(best)]


def _prefixes(names: Iterable[str]) -> list[str]:
    """Every sequence of wrappers that some name begins with, and the empty one."""
    prefixes = {""}
    for name in names:
        prefix = ""
        while wrapper := next((w for w in WRAPPERS if name.startswith(w, len(prefix))), ""):
            prefix += wrapper
            prefixes.add(prefix)
    return sorted(prefixes)


def _strip(names: Iterable[str], prefix: str) -> list[str]:
    return [name[len(prefix) :] for name in names if name.startswith(prefix)]


def _fit_head(
    state: Mapping[str, Tensor], given: Mapping[str, Tensor], head: str, keep: bool
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of the head to copy, if any, and a description."""
    names = [name for name in state if name.startswith(head)]
    available = [name for name in names if name in given]
    classes = state[f"{head}weight"].shape[0]
    if not available:
        return {}, f"the head is new ({classes} classes; the file has no head of this name)"
    if [given[name].shape for name in available] != [state[name].shape for name in names]:
        theirs, ours = _shape(given[available[0]].shape), _shape(state[available[0]].shape)
        return {}, f"the head is new ({classes} classes: {ours}; that of the file is {theirs})"
    if not keep:
        return {}, f"the head is new ({classes} classes; the file has other classes)"
    return {name: given[name] for name in names}, f"head of {classes} classes included"


def _check_architecture(
    model: nn.Module,
    state: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    where: str,
) -> None:
    """Raise an error if too little fits; the heads are not counted."""
    head = _head_prefix(model)
    backbone = [name for name, _ in model.named_parameters() if not name.startswith(head)]
    network_size = sum(state[name].numel() for name in backbone)
    loaded_size = sum(state[name].numel() for name in backbone if name in values)
    # Of the file, only what lies in sub-modules that the network has: a projector or a teacher
    # beside the network is left over, another number of layers is another architecture.
    submodules = {name.partition(".")[0] for name in state}
    comparable = [
        name for name in given if name.partition(".")[0] in submodules and not name.startswith(head)
    ]
    file_size = sum(given[name].numel() for name in comparable)
    used_size = sum(given[name].numel() for name in comparable if name in values)
    if loaded_size >= MIN_COVERAGE * network_size and used_size >= MIN_COVERAGE * file_size:
        return
    missing = [f"{name} {_shape(state[name].shape)}" for name in backbone if name not in values]
    extra = [
        f"{name} {_shape(given[name].shape)}"
        for name in given
        if name not in values and not _is_counter(name)
    ]
    raise ModelFileError(
        f"weights of another architecture: they cover {_percent(loaded_size, network_size)} of the "
        f"network, and {_percent(used_size, file_size)} of them is used. Only in the network: "
        f"{_abbreviate(missing) or 'nothing'}; only in the file: {_abbreviate(extra) or 'nothing'}",
        where=where,
        fix=f"the file seems to hold {describe_tensors(given)}: choose that network with "
        "model.name, or other weights",
    )


def _check_finite(values: Mapping[str, Tensor], where: str) -> None:
    bad = [name for name, tensor in values.items() if not _is_finite(tensor)]
    if bad:
        raise ModelFileError(
            f"NaN or infinity in {len(bad)} of the weights: {_abbreviate(bad)}",
            where=where,
            fix="use weights of an earlier epoch, or others: this training diverged",
        )


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def describe_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Describe the tensors of a file in words: a ResNet of n layers, or size and some names."""
    count = sum(tensor.numel() for tensor in tensors.values())
    size = f"{len(tensors)} tensors of {count:,} numbers"
    # A ResNet is named by its number of convolutions (without those of shortcuts) plus the head.
    layers = [n for n in tensors if re.search(r"(^|\.)layer\d+\.\d+\.conv\d+\.weight$", n)]
    if layers:
        return f"a ResNet of {len(layers) + 2} layers ({size})"
    names = [name for name in tensors if not _is_counter(name)]
    return f"{size}, such as {_abbreviate(names)}" if names else "no tensors"


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _abbreviate(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "number"


def _percent(part: int, total: int) -> str:
    return f"{math.floor(100 * part / max(total, 1))}%"
