"""torch.compile for the part of a model that comes before the tensor that is explained.

What lies behind the cut stays as it is: neither hooks nor the cut are seen inside compiled code.
"""

import contextlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from explain2me.errors import LayerError
from explain2me.salience.gradcam import GradCAM
from explain2me.salience.grids import Grid
from explain2me.salience.layers import ModuleTensor

TOLERANCE = 0.05
"""Largest difference of a map, as a share of its maximum, between the model as it was and compiled."""


class Compiled(nn.Module):
    """A part of a model, compiled; function modes, with which the cut is found, do not reach into it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

        def run(*args: Any, **kwargs: Any) -> Any:  # a module would be compiled to a module
            return part(*args, **kwargs)

        # PyTorch compiles a code object eight times at most: each part has its own
        own = FunctionType(run.__code__.replace(), globals(), closure=run.__closure__)
        self._run = torch.compile(own, dynamic=False)

    def __getattr__(self, name: str) -> Any:
        """Of the part where it is not our own: models read attributes of their parts (timm's ViTs ``grid_size``)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the part."""
        with torch._C.DisableTorchFunction():
            return self._run(*args, **kwargs)


def compile_before(model: nn.Module, images: Tensor, layer: str = "auto") -> int:
    """Compile, in place, the largest parts of a model that are over when the explained tensor is reached.

    Args:
        model: in evaluation mode.
        images: preprocessed images (N, 3, H, W); batches of other sizes are compiled again.
        layer: as for :class:`GradCAM`.

    Returns:
        How many parts were compiled.

    Raises:
        LayerError: there is no compiler, or the compiled model gives another map or explains another tensor.
    """
    before = {name for name, _ in model.named_modules()} - _unfinished(model, images, layer)
    with GradCAM(model, layer) as cam:
        maps, logits = cam(images)
        found = cam.layer
    parts = _largest(model, "", before)
    for name in parts:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Compiled(model.get_submodule(name)))
    try:
        with GradCAM(model, layer) as cam:
            compiled_maps, compiled_logits = cam(images, logits.argmax(1) if logits.shape[1] > 1 else None)
    except Exception as error:
        raise LayerError(
            f"{type(model).__name__} cannot be compiled before {found} ({' '.join(str(error).split())[:300]}); set "
            f"compute.compile = false; on a CPU a C++ compiler is needed"
        ) from error
    scale = maps.abs().max().clamp_min(1e-12)
    if (
        cam.layer != found
        or float((maps - compiled_maps).abs().max() / scale) > TOLERANCE
        or not torch.allclose(logits, compiled_logits, rtol=TOLERANCE, atol=TOLERANCE * float(logits.abs().max()))
    ):
        raise LayerError(
            f"{type(model).__name__} compiled gives other maps than before; set compute.compile = false, and report it"
        )
    return len(parts)


class _Tap:
    """Keeps the names of the modules that are not over when the tensor is reached."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.unfinished: set[str] = set()
        self.reached = False

    def at(self, features: Tensor, grid: Grid, layer: str) -> Tensor:
        self.reached = True
        self.unfinished |= self.running
        return features


def _unfinished(model: nn.Module, images: Tensor, layer: str) -> set[str]:
    tap = _Tap()

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            tap.running.add(name)
            if tap.reached:
                tap.unfinished.add(name)

        return hook

    def leave(name: str) -> Callable[..., None]:
        return lambda *_: tap.running.discard(name)

    with GradCAM(model, layer) as cam:
        place = cam._place(images)
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for name, module in model.named_modules():
                hooks.callback(module.register_forward_pre_hook(enter(name), prepend=True).remove)
                hooks.callback(module.register_forward_hook(leave(name)).remove)
            place.run(model, images, tap)
    if layer == "auto" and isinstance(place, ModuleTensor):
        tap.unfinished.add(place.name)  # wrapped, it would be found under another name
    return tap.unfinished


def _largest(module: nn.Module, prefix: str, before: set[str]) -> list[str]:
    """Names of the largest modules with weights that are over before the cut."""
    found: list[str] = []
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if not any(True for _ in child.parameters()):
            continue
        container = isinstance(child, nn.ModuleList | nn.ModuleDict)  # is never called itself
        found += [full] if full in before and not container else _largest(child, f"{full}.", before)
    return found
