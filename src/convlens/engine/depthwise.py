"""Faster gradients of depthwise convolutions in bfloat16 on a CPU.

EfficientNets and MobileNets in bfloat16 spend most of a training step on a CPU in the backward pass
of their depthwise convolutions, because oneDNN (as of torch 2.15) has no fast kernel in two cases:

- The gradient of a kernel larger than 3x3 takes 50 to 200 times as long as the forward pass. Each
  3x3 part of it is the gradient of a 3x3 kernel on a shifted image, so that of a 5x5 kernel is
  computed in four parts.
- The gradient of the input takes 100 to 300 times as long if the stride is larger than 1. It is
  computed in float32.

`depthwise_gradients` returns a context for the forward pass, in which such convolutions are
recorded with the faster gradients. The results are the same up to rounding. A step of
EfficientNet-Lite0 from `blocks.3` on takes a third of the time (docs/log.md); in float32 nothing
would be gained.
"""

from __future__ import annotations

import contextlib
import itertools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from convlens.device import Plan

FAST_KERNEL = 3  # the largest kernel for which oneDNN is fast
Pair = tuple[int, int]


def depthwise_gradients(model: nn.Module, plan: Plan) -> AbstractContextManager[Any]:
    """Return a context for the forward pass of `model`; it does nothing where nothing is gained.

    It can be entered many times, but not within itself.
    """
    is_concerned = (plan.device, plan.precision, plan.step_mode) == ("cpu", "bf16", "eager")
    if is_concerned and any(isinstance(m, nn.Conv2d) and _is_slow(m) for m in model.modules()):
        return _DepthwiseMode()
    return contextlib.nullcontext()


def _is_slow(conv: nn.Conv2d) -> bool:
    is_depthwise = conv.groups == conv.in_channels == conv.out_channels > 1
    return is_depthwise and (min(conv.kernel_size) > FAST_KERNEL or max(conv.stride) > 1)


class _DepthwiseMode(TorchFunctionMode):
    """Replace calls of `torch.conv2d` that are depthwise by `_DepthwiseConv`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and torch.is_grad_enabled():
            call = _as_depthwise(*args, **kwargs)
            if call is not None:
                return _DepthwiseConv.apply(*call)
        return func(*args, **kwargs)


def _as_depthwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Pair, Pair] | None:
    """Return the arguments of `_DepthwiseConv`; None for a convolution that is left to torch."""
    is_depthwise = input.ndim == 4 and 1 < groups == input.shape[1] == weight.shape[0]
    if not is_depthwise or isinstance(padding, str) or _pair(dilation) != (1, 1):
        return None
    if not input.requires_grad and not weight.requires_grad:
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return input, weight, bias, _pair(stride), _pair(padding)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class _DepthwiseConv(torch.autograd.Function):
    """`conv2d` with one filter per channel: input `[B, C, H, W]`, weight `[C, 1, kh, kw]`."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.padding, ctx.has_bias = stride, padding, bias is not None
        return torch.conv2d(input, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            _input_gradient(grad, input, weight, ctx.stride, ctx.padding) if needs_input else None,
            _weight_gradient(grad, input, weight, ctx.stride, ctx.padding)
            if needs_weight
            else None,
            grad.sum((0, 2, 3)) if ctx.has_bias and needs_bias else None,
            None,
            None,
        )


def _input_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    if max(stride) > 1:
        result = _backward(grad.float(), input.float(), weight.float(), stride, padding, 0)
        return result.to(input.dtype)
    return _backward(grad, input, weight, stride, padding, 0)


def _weight_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    """Return the gradient of the kernel, computed in parts of 3x3 if it is larger."""
    height, width = weight.shape[2:]
    if min(height, width) <= FAST_KERNEL:
        return _backward(grad, input, weight, stride, padding, 1)
    is_channels_last = input.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    part = weight[:, :, :FAST_KERNEL, :FAST_KERNEL].contiguous()
    # The pixels that one tap of the kernel sees, and those that 3 taps in a row see.
    rows, columns = (
        (size - 1) * step + FAST_KERNEL for size, step in zip(grad.shape[2:], stride, strict=True)
    )
    result = torch.empty_like(weight)
    for top, left in itertools.product(_part_starts(height), _part_starts(width)):
        seen = padded[:, :, top : top + rows, left : left + columns]
        seen = seen.contiguous(memory_format=layout)
        gradient = _backward(grad, seen, part, stride, (0, 0), 1)
        result[:, :, top : top + FAST_KERNEL, left : left + FAST_KERNEL] = gradient
    return result


def _part_starts(size: int) -> list[int]:
    """Return where parts of 3 taps start that cover `size` taps; the last one may overlap."""
    return [min(start, size - FAST_KERNEL) for start in range(0, size, FAST_KERNEL)]


def _backward(
    grad: Tensor, input: Tensor, weight: Tensor, stride: Pair, padding: Pair, which: int
) -> Tensor:
    """Return torch's gradient of the input (`which=0`) or of the weight (1)."""
    gradients = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        None,
        stride,
        padding,
        (1, 1),
        False,
        (0, 0),
        len(weight),
        (which == 0, which == 1, False),
    )
    gradient: Tensor = gradients[which]
    return gradient
