"""Losses of other libraries, measured where they are installed and run on the device; none is installed for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[..., Tensor]


def _module(path: str, name: str) -> Callable[..., Peer]:
    """A loss module of another package that takes torch's options."""
    return lambda **options: getattr(import_module(path), name)(**options)


def _function(path: str, name: str) -> Callable[..., Peer]:
    """A function of tensors and options."""

    def build(**options: Any) -> Peer:
        function = getattr(import_module(path), name)
        return lambda *tensors: function(*tensors, **options)

    return build


def _torch_chunked(**options: Any) -> Peer:
    chunks = torch.nn.LinearCrossEntropyOptions()
    return lambda *tensors: F.linear_cross_entropy(*tensors, options=chunks, **options)


def _liger_linear(**options: Any) -> Peer:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(**options)
    return lambda input, weight, target: loss(weight, input, target)


PEERS: dict[str, dict[str, Callable[..., Peer]]] = {
    "CrossEntropyLoss": {
        "liger": _module("liger_kernel.transformers", "LigerCrossEntropyLoss"),
        "flash-attn": _module("flash_attn.losses.cross_entropy", "CrossEntropyLoss"),
        "quack": _function("quack.cross_entropy", "cross_entropy"),
    },
    "SigmoidFocalLoss": {"torchvision": _function("torchvision.ops", "sigmoid_focal_loss")},
    "linear_cross_entropy": {
        "torch chunked": _torch_chunked,
        "liger": _liger_linear,
        "cce": _function("cut_cross_entropy", "linear_cross_entropy"),
    },
}


def peers(loss: str, options: dict[str, Any], tensors: tuple[Tensor, ...]) -> Iterator[tuple[str, Peer]]:
    """The peers of a loss that are here and give a number for these tensors."""
    for name, build in PEERS.get(loss, {}).items():
        try:
            peer = build(**options)
            peer(*tensors).sum().backward()
        except Exception as error:  # a package that is missing, or refuses the device: both leave it out
            print(f"{name} is not measured for {loss}: {str(error).splitlines()[0] if str(error) else error!r}")
        else:
            yield name, peer
