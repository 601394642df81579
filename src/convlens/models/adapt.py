"""Fitting tensors that came from elsewhere into a network: pure, and all or nothing.

Names are stripped of wrappers, tensors of equal name and shape are copied, the first convolution
is adapted to other channels or another kernel, the head stays new where the classes differ.
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

# Names that training code puts in front: DataParallel, torch.compile, Lightning and the like.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.")
# Less of the network found in the file, or less of the file in the network, and it is another
# architecture. Half is too little: a ResNet-18 is all in a ResNet-34 and fills 52% of it, and
# even a ResNet-50 has 56% of its weights by name and shape.
ENOUGH = 2 / 3


@dataclass(frozen=True)
class FittedWeights:
    """What became of the tensors; names are the network's, in `left` the file's."""

    matched: list[str]
    adapted: dict[str, str]  # what was done to each
    left: list[str]
    new: list[str]
    head: str  # what became of the head, in words

    def lines(self) -> list[str]:
        """The report for the user, one fact a line."""
        told = [f"{len(self.matched)} tensors taken over; {self.head}"]
        told += [f"adapted {name}: {how}" for name, how in self.adapted.items()]
        if self.new:
            told.append(f"new, not in the weights: {_some_names(self.new)}")
        if self.left:
            told.append(f"left over in the weights: {_some_names(self.left)}")
        return told


def fit_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], *, keep_head: bool = True, where: str = ""
) -> FittedWeights:
    """Copies `tensors` into `model` (in place) as far as they belong there.

    The head (`parts(model).head`) is taken over whole or not at all: only with `keep_head` and if
    its shape is equal; else it keeps its own initialisation. Counters of batch norms may be
    missing.

    Args:
        where: the file, for errors.

    Raises:
        ModelFileError: weights of another architecture, or NaN or infinity in them; the model is
            unchanged.
    """
    own = model.state_dict()
    found, strangers = _unwrapped(tensors, own)
    head = _head_prefix(model)
    stem = _stem(model)
    values: dict[str, Tensor] = {}
    adapted: dict[str, str] = {}
    for name, tensor in own.items():
        given = found.get(name)
        if given is None or name.startswith(head):
            continue
        if given.is_floating_point() != tensor.is_floating_point():
            continue
        if given.shape == tensor.shape:
            values[name] = given
        elif name == stem and _adaptable(given, tensor):
            values[name], adapted[name] = adapt_input(given, tensor.shape)
    _check_architecture(model, own, found, values, where)
    told = _head(own, found, values, head, keep_head)
    _check_finite(values, where)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    return FittedWeights(
        matched=[name for name in values if name not in adapted],
        adapted=adapted,
        left=[*(n for n in found if n not in values), *strangers],
        new=[n for n in own if n not in values and not _counter(n)],
        head=told,
    )


def adapt_input(kernel: Tensor, shape: Iterable[int]) -> tuple[Tensor, str]:
    """The first convolution's kernel `[O, C, k, k]` for other channels or another size; and how.

    3 to 1 channels: the sum, so that a grey image gives the response of its RGB copy; 1 to 3: a
    third each, the same the other way round. Another size: each new tap is the integral of the old
    kernel, stretched over the new one, over the tap's area. Integrals add up, so the response to a
    constant image stays what it was.
    """
    _, channels, height, width = shape
    how = [f"{_shape(kernel.shape)} -> {_shape((kernel.shape[0], channels, height, width))}"]
    result = kernel.float()
    if kernel.shape[1] != channels:
        summed = channels == 1
        result = result.sum(1, keepdim=True) if summed else result.expand(-1, 3, -1, -1) / 3
        how.append("channels summed" if summed else "a third for each channel")
    if tuple(kernel.shape[2:]) != (height, width):
        rows, columns = _overlaps(kernel.shape[2], height), _overlaps(kernel.shape[3], width)
        result = torch.einsum("ih,ochw,jw->ocij", rows, result, columns)
        how.append("kernel resampled by area, response to a constant image kept")
    return result, "; ".join(how)


def _overlaps(old: int, new: int) -> Tensor:
    """`[new, old]`: the share of each old tap that lies in each new one; columns add up to 1."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    taps = torch.arange(old, dtype=torch.float64)
    lower = torch.maximum(edges[:-1, None], taps[None])
    upper = torch.minimum(edges[1:, None], taps[None] + 1)
    return (upper - lower).clamp(min=0).float()


def _head_prefix(model: nn.Module) -> str:
    return f"{model_parts(model).head}."


def _stem(model: nn.Module) -> str:
    """The name of the first convolution's kernel; empty if there is none to adapt."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return f"{name}.weight" if module.groups == 1 else ""
    return ""


def _adaptable(given: Tensor, wanted: Tensor) -> bool:
    if given.ndim != 4 or given.shape[0] != wanted.shape[0]:
        return False
    channels = (given.shape[1], wanted.shape[1])
    return channels[0] == channels[1] or channels in ((1, 3), (3, 1))


def _unwrapped(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the network's names, and the names of those under another wrapper.

    The wrapper is the chain of `WRAPPERS` (or none) under which most of the network is found: a
    file may hold two copies, or a network whose own names begin like a wrapper's.
    """
    # Of parts that were compiled, the wrapper stands amid the name.
    plain = {name.replace("_orig_mod.", ""): name for name in tensors}
    sizes = dict.fromkeys(_chains(plain), 0)
    for chain in sizes:
        inside = (own[n] for n in _inside(plain, chain) if n in own)
        sizes[chain] = sum(tensor.numel() for tensor in inside)
    best = max(sizes, key=lambda chain: (sizes[chain], -len(chain)), default="")
    found = {name: tensors[plain[best + name]] for name in _inside(plain, best)}
    return found, [name for key, name in plain.items() if not key.startswith(best)]


def _chains(names: Iterable[str]) -> list[str]:
    """Every run of wrappers that some name begins with, none included."""
    chains = {""}
    for name in names:
        chain = ""
        while token := next((w for w in WRAPPERS if name.startswith(w, len(chain))), ""):
            chain += token
            chains.add(chain)
    return sorted(chains)


def _inside(names: Iterable[str], chain: str) -> list[str]:
    return [name[len(chain) :] for name in names if name.startswith(chain)]


def _head(
    own: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    values: dict[str, Tensor],
    head: str,
    keep: bool,
) -> str:
    """Adds the head to `values` if it is to be taken over; says what becomes of it."""
    its = [name for name in own if name.startswith(head)]
    there = [name for name in its if name in found]
    classes = own[f"{head}weight"].shape[0]
    if not there:
        return f"the head is new ({classes} classes; the weights have none of its name)"
    if [found[name].shape for name in there] != [own[name].shape for name in its]:
        theirs, ours = _shape(found[there[0]].shape), _shape(own[there[0]].shape)
        return f"the head is new ({classes} classes: {ours}; the weights' is {theirs})"
    if not keep:
        return f"the head is new ({classes} classes; the weights' are others)"
    values.update((name, found[name]) for name in its)
    return f"head of {classes} classes included"


def _check_architecture(
    model: nn.Module,
    own: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    where: str,
) -> None:
    """Refuses weights of which too little belongs here; the head counts on neither side."""
    head = _head_prefix(model)
    trunk = [n for n, _ in model.named_parameters() if not n.startswith(head)]
    total = sum(own[n].numel() for n in trunk)
    taken = sum(own[n].numel() for n in trunk if n in values)
    # Of the file, only what lies in parts that the network has: a projector or a teacher
    # beside the network is left over, another number of layers is another architecture.
    parts = {name.partition(".")[0] for name in own}
    inside = [n for n in found if n.partition(".")[0] in parts and not n.startswith(head)]
    theirs = sum(found[n].numel() for n in inside)
    used = sum(found[n].numel() for n in inside if n in values)
    if taken >= ENOUGH * total and used >= ENOUGH * theirs:
        return
    lacking = [f"{n} {_shape(own[n].shape)}" for n in trunk if n not in values]
    spare = [f"{n} {_shape(found[n].shape)}" for n in found if n not in values and not _counter(n)]
    raise ModelFileError(
        f"weights of another architecture: {_percent(taken, total)} of the network is in them, "
        f"{_percent(used, theirs)} of them in the network. Only the network has "
        f"{_some_names(lacking) or 'nothing'}; only the file has {_some_names(spare) or 'nothing'}",
        where=where,
        fix=f"the file seems to hold {describe_fit(found)}: choose that with model.name, or "
        "weights of this network",
    )


def _check_finite(values: Mapping[str, Tensor], where: str) -> None:
    bad = [n for n, t in values.items() if t.is_floating_point() and not _finite(t)]
    if bad:
        raise ModelFileError(
            f"NaN or infinity in {len(bad)} of the weights: {_some_names(bad)}",
            where=where,
            fix="that training broke down; take weights of an earlier epoch, or others",
        )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float()).all())


def describe_fit(tensors: Mapping[str, Tensor]) -> str:
    """A guess, in words, at what a file's tensors are."""
    count = sum(tensor.numel() for tensor in tensors.values())
    size = f"{len(tensors)} tensors of {count:,} numbers"
    # A ResNet's name counts its convolutions, those of the shortcuts aside, and the head.
    layers = [n for n in tensors if re.search(r"(^|\.)layer\d+\.\d+\.conv\d+\.weight$", n)]
    if layers:
        return f"a ResNet of {len(layers) + 2} layers ({size})"
    listed = [name for name in tensors if not _counter(name)]
    return f"{size}, such as {_some_names(listed)}" if listed else "no tensors"


def _counter(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _some_names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "number"


def _percent(part: int, whole: int) -> str:
    return f"{math.floor(100 * part / max(whole, 1))}%"
