"""Find the tensor of a forward pass that salience is computed from, and cut the pass there.

``find_layer`` passes one image through the model and finds the *last* call that removes the spatial axes: a global
pooling, a flatten, or the reading of a class token. It needs no list of architectures. Axes: N images, C channels,
h w grid, L tokens (prefix tokens, then the grid).
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from explain2me.errors import LayerError
from explain2me.salience.cut import Tap, axes_of
from explain2me.salience.grids import Grid, Size, collapsed_grid, named_grid, token_grid
from explain2me.text import nearest

QUERIES = {"__get__", "dim", "size", "numel", "stride", "is_contiguous"}
"""Functions that ask for the shape or layout of a tensor, such as ``x.shape``; no gradient flows through them."""
INDEXING = {"__getitem__", "select", "index_select", "narrow", "unbind", "split", "chunk", "tensor_split"}


@dataclass(frozen=True)
class CallInput:
    """An argument of a function call.

    Attributes:
        position: of the argument among the tensors of the call, from 0.
        shape: of the argument without its first axis.
        count: number of the call, from 1, among those with this function, position and shape.
        layer: description.
    """

    function: str
    position: int
    shape: tuple[int, ...]
    count: int
    grid: Grid
    layer: str

    def run(self, model: nn.Module, images: Tensor, cut: Tap) -> Any:
        """Output of the model, with the pass cut at this tensor."""
        with _CutCall(self, len(images), cut):
            return model(images)


@dataclass(frozen=True)
class ModuleTensor:
    """The output of a module, or its first input; a grid of None is derived from the shape."""

    name: str
    side: Literal["output", "input"] = "output"
    grid: Grid | None = None
    prefix: str = ""

    @property
    def layer(self) -> str:
        """Description."""
        return f"{self.prefix}{self.side} of {self.name}"

    def run(self, model: nn.Module, images: Tensor, cut: Tap) -> Any:
        """Output of the model, with the pass cut at this tensor; the hook exists only during the pass."""

        def cut_at(features: object) -> Tensor:
            if not isinstance(features, Tensor):
                raise LayerError(f"the {self.layer} must be one tensor, got a {type(features).__name__}; {_ADVICE}")
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
    """Raise LayerError for a layer in a compiled part of the model, where neither hooks nor function modes run.

    For ``"auto"``, no part may be compiled.
    """
    for name, module in model.named_modules():
        compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        if compiled and (layer == "auto" or f"{layer}.".startswith(f"{name}." if name else "")):
            raise LayerError(
                f"layer {layer!r} cannot be read: {name or type(model).__name__!r} is compiled; give the model from "
                "before torch.compile, or name a layer and compile only parts before it"
            )


_ADVICE = "name a layer before pooling and flattening, or take 'auto'"


def named_module(model: nn.Module, name: str) -> nn.Module:
    """The module with this dotted name; a LayerError offers the nearest names where there is none."""
    modules = {key: module for key, module in model.named_modules() if key}
    if name not in modules:
        raise LayerError(f"{type(model).__name__} has no layer {name!r}; {nearest(name, [*modules, 'auto'])}")
    return modules[name]


def find_layer(model: nn.Module, images: Float[Tensor, "N 3 H W"]) -> CallInput | ModuleTensor:
    """Find the tensor for ``layer="auto"`` with one pass of one image (two for a class-token transformer).

    Raises:
        LayerError: no call at the end of the forward pass removes the spatial axes of a map.
    """
    image = images[:1]
    watch = _Watch(_size(image), num_prefix_tokens(model))
    with torch.no_grad(), contextlib.ExitStack() as hooks, watch:
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(watch.enter).remove)
                hooks.callback(module.register_forward_hook(watch.leaver(name)).remove)
        model(image)
    if watch.token_read and (block := _last_block(model, image)):
        return block
    if watch.place is None or watch.convolved:
        raise LayerError(
            f"layer 'auto': no map of more than one cell is pooled, flattened or read by a class token at the end of "
            f"{type(model).__name__} for images ({axes_of(image)}); give larger images, or name a layer, "
            f"for example one of {', '.join(repr(name) for name, _ in list(model.named_children())[-4:])}"
        )
    return watch.place


Call = tuple[str, int, tuple[int, ...]]  # function, position and shape of an argument


class _Use(NamedTuple):
    """First use of a tensor since it was last written: as the argument of the ``number``-th such call."""

    tensor: weakref.ref[Tensor]
    version: int
    call: Call
    number: int


class _Watch(TorchFunctionMode):
    """Watch every function call on tensors, and keep the last one that removes the spatial axes.

    A module that removes them without such a call (attention pooling) counts as one call.
    """

    def __init__(self, size: Size, num_prefix: int | None) -> None:
        super().__init__()
        self.place: CallInput | ModuleTensor | None = None
        self.token_read = False  # whether a class token was read after the place
        self.convolved = False  # whether a spatial convolution follows the place, so it is no final pooling
        self._size = size
        self._num_prefix = num_prefix
        self._num_events = 0
        self._events_at_entry: list[int] = []
        self._counts: Counter[Call] = Counter()
        self._first_uses: dict[int, _Use] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = _name(func)
        features = _features(name, args, kwargs, num_images=1)
        for position, tensor in features:
            self._count(name, position, tensor)
        output = func(*args, **(kwargs or {}))
        may_collapse = True
        if name == "conv2d":
            kernel, *_ = (weight.shape[2:] for weight in list(_tensors(args))[1:])
            if kernel.numel() > 1:
                self.convolved = True
                self._num_events += 1
            may_collapse = bool(features) and features[0][1].shape[2:] == kernel
        first = output[0] if isinstance(output, tuple | list) and output else output
        if may_collapse and isinstance(first, Tensor) and first.is_floating_point():
            for _, tensor in features:
                self._check_output(name, tensor, tuple(first.shape))
        return output

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._events_at_entry.append(self._num_events)

    def leaver(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            features = inputs[0] if inputs else None
            has_events = self._num_events > self._events_at_entry.pop()
            if has_events or not isinstance(features, Tensor) or not isinstance(output, Tensor):
                return
            shape = tuple(features.shape)
            if len(shape) not in (3, 4):
                return
            grid = collapsed_grid(shape, tuple(output.shape), self._size, self._num_prefix)
            if grid is not None:
                self._set_place(ModuleTensor(name, "input", grid, "auto: "))

        return leave

    def _set_place(self, place: CallInput | ModuleTensor) -> None:
        self.place, self.token_read, self.convolved = place, False, False
        self._num_events += 1

    def _count(self, name: str, position: int, tensor: Tensor) -> None:
        call = (name, position, tuple(tensor.shape[1:]))
        self._counts[call] += 1
        use = self._first_uses.get(id(tensor))
        if use is None or use.tensor() is not tensor or use.version != tensor._version:
            self._first_uses[id(tensor)] = _Use(weakref.ref(tensor), tensor._version, call, self._counts[call])

    def _check_output(self, name: str, tensor: Tensor, output: tuple[int, ...]) -> None:
        """Set the place if this call removed the spatial axes of the tensor, or note that it read a class token."""
        shape = tuple(tensor.shape)
        if name in INDEXING:
            grid = token_grid(shape[1], self._size, self._num_prefix) if len(shape) == 3 else None
            prefixes = ((), (1,), (grid.num_prefix,)) if grid and grid.num_prefix else ()
            if output in {(1, *tokens, shape[2]) for tokens in prefixes}:
                self.token_read = True
                self._num_events += 1
        elif grid := collapsed_grid(shape, output, self._size, self._num_prefix):
            use = self._first_uses[id(tensor)]
            self._set_place(CallInput(*use.call, use.number, grid, f"auto: input of {name}"))


class _CutCall(TorchFunctionMode):
    """Cut at a ``CallInput``, and replace the tensor in every later call by the one after the cut."""

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
            self._cut_at_place(args, kwargs)
        if self._old is not None:
            args = tuple(self._replaced(value) for value in args)
            kwargs = {key: self._replaced(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _cut_at_place(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
        place = self._place
        for position, tensor in _features(place.function, args, kwargs, num_images=self._num_images):
            if position == place.position and tensor.shape[1:] == place.shape:
                self._count += 1
                if self._count == place.count:
                    self._old, self._new = tensor, self._cut.at(tensor, place.grid, place.layer)
                    return

    def _replaced(self, value: Any) -> Any:
        if value is self._old:
            return self._new
        return type(value)(self._replaced(item) for item in value) if type(value) in (tuple, list) else value


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def _features(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None, *, num_images: int
) -> list[tuple[int, Tensor]]:
    """The arguments that can be features of the images, each with its position among the tensors of the call."""
    if name in QUERIES:
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
    """The tokens of the last transformer block: after its first norm, or where they enter it.

    Not its output, because after the last block only the class token reaches the logits.
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
    """Number of tokens before the grid, if the model has this attribute (timm), else None."""
    number = getattr(model, "num_prefix_tokens", None)
    return number if isinstance(number, int) else None


def _size(images: Tensor) -> Size:
    return images.shape[2], images.shape[3]
