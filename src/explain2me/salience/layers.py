"""Which tensor of a forward pass salience is read from, and how the pass is cut there.

``find_layer`` watches one image pass through the model and looks for the *last* call that takes the spatial axes away:
a global pooling, a flatten, or the reading of a class token. No list of architectures is kept. ``Cut`` is what happens
to that tensor in the passes that count. Axes: N images, C channels, h w grid, L tokens (prefix tokens, then the grid).
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from explain2me.errors import LayerError
from explain2me.salience.grids import Grid, Size, collapsed_grid, named_grid, token_grid
from explain2me.text import nearest

ASKING = {"__get__", "dim", "size", "numel", "stride", "is_contiguous"}  # x.shape and the like: no gradient passes


INDEXING = {"__getitem__", "select", "index_select", "narrow", "unbind", "split", "chunk", "tensor_split"}


@dataclass
class Cut:
    """The tensor at which one forward pass is cut: no gradients before it, gradients behind it.

    Args:
        leave_autocast: run what lies behind the cut in float32, so that logits and gradients are not rounded.
    """

    leave_autocast: bool
    leaf: Tensor | None = None
    grid: Grid | None = None
    layer: str = ""
    _version: int = field(default=0, init=False)

    def at(self, features: Tensor, grid: Grid, layer: str) -> Tensor:
        """Cut here, or here again: the last cut counts. Returns the tensor with which the pass goes on."""
        if self.leave_autocast and torch.is_autocast_enabled(features.device.type):
            torch.set_autocast_enabled(features.device.type, False)
            features = features.float()
        torch.set_grad_enabled(True)
        self.leaf = features.detach().requires_grad_()
        self.grid, self.layer, self._version = grid, f"{layer} ({_axes(features)})", features._version
        return self.leaf.clone()  # in-place functions behind the cut (DenseNet's ReLU) must not reach the leaf

    def finished(self, layer: str) -> tuple[Tensor, Grid]:
        """The leaf and its grid once the pass is over."""
        if self.leaf is None or self.grid is None:
            raise LayerError(
                f"layer {layer!r} was not reached in the forward pass; name a layer that every image passes through"
            )
        if self.leaf._version != self._version:
            raise LayerError(f"the tensor at {self.layer} is overwritten in place later on; name the layer behind it")
        return self.leaf, self.grid


class Tap(Protocol):
    """What is done with the tensor at a place; a :class:`Cut`, or one that only keeps it."""

    def at(self, features: Tensor, grid: Grid, layer: str) -> Tensor:
        """Take the tensor, with its grid and its place in words; returns the tensor with which the pass goes on."""
        ...


@dataclass(frozen=True)
class CallInput:
    """A tensor given to a function: the ``count``-th call of ``function`` with such a shape at such a position."""

    function: str
    position: int
    shape: tuple[int, ...]
    count: int
    grid: Grid
    layer: str

    def run(self, model: nn.Module, images: Tensor, cut: Tap) -> Any:
        """The model's output, the pass cut at this tensor."""
        with _CutCall(self, len(images), cut):
            return model(images)


@dataclass(frozen=True)
class ModuleTensor:
    """The output of a module, or its first input."""

    name: str
    side: Literal["output", "input"] = "output"
    grid: Grid | None = None  # None: read from the shape
    prefix: str = ""

    @property
    def layer(self) -> str:
        """In words."""
        return f"{self.prefix}{self.side} of {self.name}"

    def run(self, model: nn.Module, images: Tensor, cut: Tap) -> Any:
        """The model's output, the pass cut at this tensor; hooked only meanwhile."""

        def cut_at(features: object) -> Tensor:
            if not isinstance(features, Tensor):
                raise LayerError(f"the {self.layer} is a {type(features).__name__}, not one tensor; {_ADVICE}")
            grid = self.grid or named_grid(tuple(features.shape), _size(images), num_prefix_tokens(model))
            if grid is None or len(features) != len(images):
                shape = tuple(features.shape)
                raise LayerError(f"the {self.layer} has shape {shape}, which is not a spatial map; {_ADVICE}")
            return cut.at(features, grid, self.layer)

        module = named_module(model, self.name)
        if self.side == "output":
            hook = module.register_forward_hook(lambda _, inputs, output: cut_at(output))
        else:
            hook = module.register_forward_pre_hook(lambda _, inputs: (cut_at(inputs[0]), *inputs[1:]))
        try:
            return model(images)
        finally:
            hook.remove()


def refuse_compiled(model: nn.Module, layer: str) -> None:
    """LayerError where ``layer`` lies in a compiled part of the model: neither hook nor function is seen in there."""
    for name, module in model.named_modules():
        compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        if compiled and (layer == "auto" or f"{layer}.".startswith(f"{name}." if name else "")):
            raise LayerError(
                f"layer {layer!r} cannot be read: {name or type(model).__name__!r} is compiled; give the model as it was "
                "before torch.compile, or compile only parts that come before a layer which you name"
            )


_ADVICE = "name a layer before pooling and flattening, or take 'auto'"


def named_module(model: nn.Module, name: str) -> nn.Module:
    """The module with this dotted name; LayerError with the nearest names where there is none."""
    modules = {key: module for key, module in model.named_modules() if key}
    if name not in modules:
        raise LayerError(f"{type(model).__name__} has no layer {name!r}; {nearest(name, [*modules, 'auto'])}")
    return modules[name]


def find_layer(model: nn.Module, images: Float[Tensor, "N 3 H W"]) -> CallInput | ModuleTensor:
    """The tensor that ``layer="auto"`` means, found in one pass of one image (two for a class-token transformer).

    Raises:
        LayerError: nothing in the forward pass takes spatial axes away.
    """
    image = images[:1]
    watch = _Watch(_size(image), num_prefix_tokens(model))
    with torch.no_grad(), contextlib.ExitStack() as hooks, watch:
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(watch.enter).remove)
                hooks.callback(module.register_forward_hook(watch.leaver(name)).remove)
        model(image)
    if watch.token_read:
        block = _last_block(model, image)
        if block is not None:
            return block
    if watch.place is None or watch.convolved:
        raise LayerError(
            f"layer 'auto': no map of more than one cell is pooled, flattened or read by a class token at the end of "
            f"{type(model).__name__} for images ({_axes(image)}); give larger images, or name a layer, "
            f"for example one of {', '.join(repr(name) for name, _ in list(model.named_children())[-4:])}"
        )
    return watch.place


class _Watch(TorchFunctionMode):
    """Sees every function that is called on tensors, and keeps the last that takes the spatial axes away.

    A module that takes them away by no such function (attention pooling) counts as one.
    """

    def __init__(self, size: Size, num_prefix: int | None) -> None:
        super().__init__()
        self.place: CallInput | ModuleTensor | None = None
        self.token_read = False  # after the place a class token was read
        self.convolved = False  # after the place the model went on as a spatial one: that was no pooling of the end
        self._size = size
        self._num_prefix = num_prefix
        self._num_seen = 0
        self._seen_at_entry: list[int] = []
        self._counts: Counter[tuple[str, int, tuple[int, ...]]] = Counter()
        self._first_uses: dict[int, tuple[weakref.ref[Tensor], int, tuple[str, int, tuple[int, ...]], int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = _name(func)
        used = _features(name, args, kwargs, num_images=1)
        for position, tensor in used:
            self._count(name, position, tensor)
        output = func(*args, **(kwargs or {}))
        whole = True
        if name == "conv2d":
            kernel, *_ = (weight.shape[2:] for weight in list(_tensors(args))[1:])
            if kernel.numel() > 1:
                self.convolved = True
                self._num_seen += 1
            whole = bool(used) and used[0][1].shape[2:] == kernel
        first = output[0] if isinstance(output, tuple | list) and output else output
        if whole and isinstance(first, Tensor) and first.is_floating_point():
            for _, tensor in used:
                self._judge(name, tensor, tuple(first.shape))
        return output

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen_at_entry.append(self._num_seen)

    def leaver(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            features = inputs[0] if inputs else None
            new = self._num_seen > self._seen_at_entry.pop()
            if new or not isinstance(features, Tensor) or not isinstance(output, Tensor) or features.ndim not in (3, 4):
                return
            grid = collapsed_grid(tuple(features.shape), tuple(output.shape), self._size, self._num_prefix)
            if grid is not None:
                self._take(ModuleTensor(name, "input", grid, "auto: "))

        return leave

    def _take(self, place: CallInput | ModuleTensor) -> None:
        self.place, self.token_read, self.convolved = place, False, False
        self._num_seen += 1

    def _count(self, name: str, position: int, tensor: Tensor) -> None:
        call = (name, position, tuple(tensor.shape[1:]))
        self._counts[call] += 1
        known = self._first_uses.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1] != tensor._version:  # new, or overwritten in place
            self._first_uses[id(tensor)] = (weakref.ref(tensor), tensor._version, call, self._counts[call])

    def _judge(self, name: str, tensor: Tensor, output: tuple[int, ...]) -> None:
        shape = tuple(tensor.shape)
        if name in INDEXING:
            grid = token_grid(shape[1], self._size, self._num_prefix) if len(shape) == 3 else None
            if grid and grid.num_prefix and output in {(1, *read, shape[2]) for read in ((), (1,), (grid.num_prefix,))}:
                self.token_read = True
                self._num_seen += 1
            return
        grid = collapsed_grid(shape, output, self._size, self._num_prefix)
        if grid is None:
            return
        _, _, (function, position, rest), count = self._first_uses[id(tensor)]
        self._take(CallInput(function, position, rest, count, grid, f"auto: input of {name}"))


class _CutCall(TorchFunctionMode):
    """Cuts at a ``CallInput``; every later call that is given the same tensor gets the cut one."""

    def __init__(self, place: CallInput, num_images: int, cut: Tap) -> None:
        super().__init__()
        self._place = place
        self._num_images = num_images
        self._cut = cut
        self._count = 0
        self._old: Tensor | None = None
        self._new: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._old is None and _name(func) == self._place.function:
            self._look(args, kwargs)
        if self._old is not None:
            args = tuple(self._swapped(value) for value in args)
            kwargs = {key: self._swapped(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        place = self._place
        for position, tensor in _features(place.function, args, kwargs, num_images=self._num_images):
            if position == place.position and tensor.shape[1:] == place.shape:
                self._count += 1
                if self._count == place.count:
                    self._old, self._new = tensor, self._cut.at(tensor, place.grid, place.layer)
                    return

    def _swapped(self, value: Any) -> Any:
        if value is self._old:
            return self._new
        return type(value)(self._swapped(item) for item in value) if type(value) in (tuple, list) else value


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def _features(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None, *, num_images: int
) -> list[tuple[int, Tensor]]:
    """The arguments that can hold features of the images, and which tensor of the call each one is."""
    if name in ASKING:
        return []
    return [
        (position, tensor)
        for position, tensor in enumerate(_tensors((*args, *(kwargs or {}).values())))
        if tensor.ndim in (3, 4)
        and len(tensor) == num_images
        and tensor.is_floating_point()
        and not isinstance(tensor, nn.Parameter)
    ]


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from _tensors(value)


def _last_block(model: nn.Module, image: Tensor) -> ModuleTensor | None:
    """The tokens of the last transformer block that reads them: behind its first norm, or as they enter it.

    In front of the last block, because behind it only the class token reaches the logits.
    """
    size, num_prefix = _size(image), num_prefix_tokens(model)
    last: dict[str, Any] = {"block": None, "tokens": None, "norm": None}

    def enter_block(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            tokens = inputs[0] if inputs else None
            if not isinstance(tokens, Tensor) or tokens.ndim != 3 or len(tokens) != 1:
                return
            if token_grid(tokens.shape[1], size, num_prefix):
                last.update(block=name, tokens=tokens, norm=None)

        return hook

    def leave_norm(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if last["norm"] is None and last["tokens"] is not None and inputs and inputs[0] is last["tokens"]:
                last["norm"] = name

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if _is_norm(module):
                hooks.callback(module.register_forward_hook(leave_norm(name)).remove)
            elif isinstance(module, nn.Sequential | nn.ModuleList):
                for key, child in module.named_children():
                    if any(_is_norm(part) for part in child.modules() if part is not child):
                        hooks.callback(child.register_forward_pre_hook(enter_block(f"{name}.{key}")).remove)
        model(image)
    if last["norm"] is not None:
        return ModuleTensor(last["norm"], prefix="auto: ")
    return None if last["block"] is None else ModuleTensor(last["block"], "input", prefix="auto: ")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def num_prefix_tokens(model: nn.Module) -> int | None:
    """The number of tokens in front of the grid where the model says it (timm), else None."""
    number = getattr(model, "num_prefix_tokens", None)
    return number if isinstance(number, int) else None


def _size(images: Tensor) -> Size:
    return images.shape[2], images.shape[3]


def _axes(tensor: Tensor) -> str:
    return ", ".join(["N", *map(str, tensor.shape[1:])])
