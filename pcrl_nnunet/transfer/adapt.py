"""Adaptation of a convolution's weight to another number of input channels or another kernel size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adapt_input_channels(weight: Tensor, channels: int, label_channels: int = 0, how: str = "repeat") -> Tensor:
    """Return the first convolution's weight for another number of input channels.

    If the number of image channels changes:
    - ``repeat``: the response to identical channels stays the same, so that activations keep their scale. From one
      channel this is the usual "repeat and divide". Several channels have no counterparts in other data, so each new
      channel gets an equal share of their sum.
    - ``first``: common channels are copied; further channels get zero.
    - ``mean``: every channel gets the mean.
    Label channels (a cascade's, after the image's) get zero: at first, the network sees only the image.

    Args:
        weight: (out, C, *kernel)
        channels: number of the result's input channels, including labels.

    Returns:
        (out, channels, *kernel); `weight` itself if nothing changes.
    """
    image_channels = channels - label_channels
    if weight.shape[1] != image_channels:
        if how == "first":
            missing = weight.new_zeros(len(weight), max(0, image_channels - weight.shape[1]), *weight.shape[2:])
            weight = torch.cat([weight[:, :image_channels], missing], dim=1)
        else:
            shared = weight.mean(1, keepdim=True) if how == "mean" else weight.sum(1, keepdim=True) / image_channels
            weight = shared.repeat_interleave(image_channels, dim=1)
    if label_channels:
        weight = torch.cat([weight, weight.new_zeros(len(weight), label_channels, *weight.shape[2:])], dim=1)
    return weight


def adapt_kernel_size(weight: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Return a convolution's weight for another kernel size. Sizes that are not both odd or both even stay.

    Along an axis that becomes longer, zeros surround the weights: the convolution stays the same. Along an axis that
    becomes shorter, the cut weights are added to the remaining ends: the response stays the same wherever the image is
    constant along that axis. From [3, 3, 3] to [1, 3, 3] the result is a sum over the first axis.

    Args:
        weight: (out, in, *kernel)
        kernel_size: kernel size of the result.
    """
    for axis, size in enumerate(kernel_size, start=2):
        more, odd = divmod(size - weight.shape[axis], 2)
        if odd:
            continue
        if more > 0:
            zeros = weight.new_zeros(*weight.shape[:axis], more, *weight.shape[axis + 1 :])
            weight = torch.cat([zeros, weight, zeros], dim=axis)
        elif more < 0:
            before, kept, after = weight.split([-more, size, -more], dim=axis)
            weight = kept.clone()
            weight.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
            weight.narrow(axis, size - 1, 1).add_(after.sum(axis, keepdim=True))
    return weight
