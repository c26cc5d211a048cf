"""Cut one forward pass at a tensor, which becomes a leaf of the autograd graph."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from explain2me.errors import LayerError
from explain2me.salience.grids import Grid


@dataclass
class Cut:
    """Cut one forward pass at a tensor: no gradients before it, gradients after it.

    With ``leave_autocast`` the pass runs in float32 after the cut, so that logits and gradients are not rounded.
    """

    leave_autocast: bool
    leaf: Tensor | None = None
    grid: Grid | None = None
    layer: str = ""
    _version: int = field(default=0, init=False)

    def at(self, features: Tensor, grid: Grid, layer: str) -> Tensor:
        """Cut at ``features``, and return the tensor that replaces them; of several cuts the last counts."""
        if self.leave_autocast and torch.is_autocast_enabled(features.device.type):
            torch.set_autocast_enabled(features.device.type, False)
            features = features.float()
        torch.set_grad_enabled(True)
        self.leaf = features.detach().requires_grad_()
        self.grid, self.layer, self._version = grid, f"{layer} ({axes_of(features)})", features._version
        return self.leaf.clone()  # in-place functions after the cut (DenseNet's ReLU) must not change the leaf

    def leaf_and_grid(self, layer: str) -> tuple[Tensor, Grid]:
        """The leaf and its grid after the pass; LayerError where it did not reach the layer, or overwrote the tensor."""
        if self.leaf is None or self.grid is None:
            raise LayerError(
                f"layer {layer!r} was not reached in the forward pass; name a layer that every forward pass calls"
            )
        if self.leaf._version != self._version:
            raise LayerError(f"the {self.layer} is overwritten in place later; name the layer after it")
        return self.leaf, self.grid


class Tap(Protocol):
    """Receives the tensor at a place in the forward pass; a :class:`Cut`, or an object that only stores it."""

    def at(self, features: Tensor, grid: Grid, layer: str) -> Tensor:
        """Receive the tensor, its grid and its description, and return the tensor that replaces it."""
        ...


def axes_of(tensor: Tensor) -> str:
    """The shape of a tensor for a message, with N for the first axis.

    >>> axes_of(torch.zeros(4, 512, 7, 7))
    'N, 512, 7, 7'
    """
    return ", ".join(["N", *map(str, tensor.shape[1:])])
