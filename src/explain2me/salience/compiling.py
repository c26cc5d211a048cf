"""Compile the part of a model before the explained tensor.

The part after the explained tensor is not compiled: hooks and cuts do not work in compiled code.
"""

import contextlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from explain2me.errors import LayerError
from explain2me.salience.gradcam import GradCAM, choose_predicted
from explain2me.salience.grids import Grid
from explain2me.salience.layers import ModuleTensor
from explain2me.salience.methods import Explainer

TOLERANCE = 0.05
"""Largest difference of a map before and after compiling, as a share of its maximum; for logits, relative and absolute."""


class Compiled(nn.Module):
    """A compiled part of a model. Function modes, which find the cut, do not reach into it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

        def run(*args: Any, **kwargs: Any) -> Any:  # a module would be compiled to a module
            return part(*args, **kwargs)

        # PyTorch compiles a code object at most eight times, so each part has its own code object
        copy = FunctionType(run.__code__.replace(), globals(), closure=run.__closure__)
        self._run = torch.compile(copy, dynamic=False)

    def __getattr__(self, name: str) -> Any:
        """The attribute of the part: models read attributes of their parts (timm's ViTs ``grid_size``)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled part."""
        with torch._C.DisableTorchFunction():
            return self._run(*args, **kwargs)


def compile_before(
    model: nn.Module,
    images: Tensor,
    layer: str = "auto",
    *,
    make_explainer: Callable[[nn.Module, str], Explainer] = GradCAM,
) -> int:
    """Compile, in place, the largest parts of a model that end before the explained tensor; gives their number.

    Args:
        model: in evaluation mode.
        images: preprocessed images (N, 3, H, W); other batch sizes are compiled again.
        layer: as for :class:`GradCAM`.
        make_explainer: explains the model before and after; the maps must stay the same.

    Raises:
        LayerError: compiling fails, or the compiled model gives other maps or logits, or explains another tensor.
    """
    before = {name for name, _ in model.named_modules()} - _unfinished(model, images, layer)
    with make_explainer(model, layer) as explainer:
        maps, logits = explainer.explain(images, choose_predicted)
        explained = explainer.layer
    parts = _largest(model, "", before)
    for name in parts:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Compiled(model.get_submodule(name)))
    classes = choose_predicted(logits)
    try:
        with make_explainer(model, layer) as explainer:
            compiled_maps, compiled_logits = explainer.explain(images, lambda _: classes)
    except Exception as error:
        raise LayerError(
            f"{type(model).__name__} cannot be compiled before {explained} ({' '.join(str(error).split())[:300]}); set "
            f"compute.compile = false, or install a C++ compiler, which torch.compile needs on a CPU"
        ) from error
    if explainer.layer != explained or not _same(maps, compiled_maps, logits, compiled_logits):
        raise LayerError(
            f"{type(model).__name__} does not give the same maps, logits and explained tensor when compiled; set "
            f"compute.compile = false, and report it"
        )
    return len(parts)


def _same(maps: Tensor, compiled_maps: Tensor, logits: Tensor, compiled_logits: Tensor) -> bool:
    """Whether maps and logits differ by no more than rounding."""
    difference = float((maps - compiled_maps).abs().max() / maps.abs().max().clamp_min(1e-12))
    largest = float(logits.abs().max())
    return difference <= TOLERANCE and torch.allclose(logits, compiled_logits, rtol=TOLERANCE, atol=TOLERANCE * largest)


class _Tap:
    """Collects the names of the modules that are still running at the explained tensor."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.unfinished: set[str] = set()
        self.reached = False

    def at(self, features: Tensor, grid: Grid, layer: str) -> Tensor:
        self.reached = True
        self.unfinished |= self.running
        return features


def _unfinished(model: nn.Module, images: Tensor, layer: str) -> set[str]:
    """Names of the modules that end after the explained tensor."""
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
        tap.unfinished.add(place.name)  # once compiled, the search would find it under another name
    return tap.unfinished


def _largest(module: nn.Module, prefix: str, before: set[str]) -> list[str]:
    """Names of the largest modules with weights that end before the cut."""
    names: list[str] = []
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if not any(True for _ in child.parameters()):
            continue
        container = isinstance(child, nn.ModuleList | nn.ModuleDict)  # never called itself
        names += [full] if full in before and not container else _largest(child, f"{full}.", before)
    return names
