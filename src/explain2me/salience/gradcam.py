"""Exact Grad-CAM for any image classifier, at about the cost of the bare forward pass.

The forward pass runs without gradients up to one tensor A, by default the tensor that enters global pooling. There it
is cut: A becomes a leaf of the autograd graph, so that only the head after A is differentiated.
:mod:`explain2me.salience.layers` finds A, :mod:`explain2me.salience.cut` makes the cut.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from explain2me.errors import LayerError
from explain2me.salience.cut import Cut
from explain2me.salience.grids import Grid
from explain2me.salience.layers import CallInput, ModuleTensor, find_layer, named_module, refuse_compiled


class GradCAMResult(NamedTuple):
    """Raw maps (after ReLU, not scaled, native resolution) and the logits of the same forward pass.

    float32; float64 for a float64 model.
    """

    maps: Float[Tensor, "N ... h w"]
    logits: Float[Tensor, "N num_logits"]


def gradcam(activations: Float[Tensor, "N C h w"], gradients: Float[Tensor, "N C h w"]) -> Float[Tensor, "N h w"]:
    """Grad-CAM of each image: ``ReLU(sum_k a_k A_k)``, where a_k is the spatial mean of d(score) / dA_k.

    At least 0, not scaled; high where the activations increase the score. All zero where no cell increases it, which is
    possible for a correct prediction too. Half precision is summed in float32. Selvaraju et al. 2017, eq. 1 and 2.

    Args:
        activations: A, of one layer.
        gradients: of the score of the explained class with respect to A.

    Raises:
        ValueError: the two shapes differ, or are not (N, C, h, w).

    >>> activations = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])
    >>> gradients = torch.tensor([[[[2.0, 2.0]], [[-1.0, -1.0]]]])
    >>> gradcam(activations, gradients)
    tensor([[[0., 4.]]])
    """
    if activations.ndim != 4 or activations.shape != gradients.shape:
        raise ValueError(
            "activations and gradients must have the same shape (N, C, h, w), "
            f"got {tuple(activations.shape)} and {tuple(gradients.shape)}; take both from the same layer and batch"
        )
    weights = _at_least_float32(gradients).mean((2, 3), keepdim=True)
    return (_at_least_float32(activations) * weights).sum(1).relu()


def predicted_classes(logits: Float[Tensor, "N num_logits"]) -> Int[Tensor, " N"]:
    """Predicted class of each image: the largest logit; for a single logit, class 1 where it is above 0.

    ValueError where the shape is not (N, num_logits).

    >>> predicted_classes(torch.tensor([[0.1, 2.0], [3.0, -1.0]]))
    tensor([1, 0])
    >>> predicted_classes(torch.tensor([[-0.5], [0.5]]))
    tensor([0, 1])
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits must have shape (N, num_logits), got {tuple(logits.shape)}; give one row for each image"
        )
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def choose_predicted(logits: Float[Tensor, "N num_logits"]) -> Int[Tensor, "N 1"]:
    """Choose the predicted class of each image; the usual ``choose`` of an explainer.

    >>> choose_predicted(torch.tensor([[0.1, 2.0], [3.0, -1.0]]))
    tensor([[1],
            [0]])
    """
    return predicted_classes(logits)[:, None]


class GradCAM:
    """Salience maps of a classifier: ``with GradCAM(model) as cam: maps, logits = cam(images)``.

    Inside the block the model is in evaluation mode; leaving the block restores the mode of every module, also after an
    exception. Hooks exist only during a call. Parameters, their ``grad`` and ``requires_grad``, and the random number
    generators stay unchanged. A call works inside ``torch.no_grad()`` and ``torch.inference_mode()`` too. Under
    ``torch.autocast``, a model with float32 weights runs in float32 after A.

    Args:
        model: takes images (N, 3, H, W), returns logits (N, num_logits), or (N,) for a single logit; also accepts an
            output with a field or key ``logits``. With a single logit the score of class 1 is the logit, that of class
            0 its negative.
        layer: ``"auto"`` or the dotted name of a module.

            A name takes the output of the module: (N, C, h, w), (N, h, w, C), or tokens (N, L, C) on a grid, without
            class and register tokens. Where a module is called several times, the last call counts.

            ``"auto"`` takes the tensor that enters the last global pooling; without global pooling, the last map that
            is flattened; with a class token, the tokens after the first norm of the last block. A pooling written out
            as separate functions (generalised mean: x^p, mean, root) is cut at its mean, so the map is that of x^p.

    After a call, the attribute ``layer`` describes the tensor that was used.

    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> _ = nn.init.constant_(model[2].weight, 1.0)
    >>> with GradCAM(model) as cam:
    ...     maps, logits = cam(torch.tensor([[[[1.0, -3.0]]]]))
    >>> maps, cam.layer
    (tensor([[[0.5000, 0.0000]]]), 'auto: input of adaptive_avg_pool2d (N, 1, 1, 2)')
    """

    def __init__(self, model: nn.Module, layer: str = "auto") -> None:
        self.model = model
        self.layer = layer
        self._requested = layer
        self._modes: dict[nn.Module, bool] | None = None
        self._float32 = True
        self._auto_places: dict[tuple[int, ...], CallInput | ModuleTensor] = {}

    def __enter__(self) -> Self:
        if self._modes is not None:
            raise RuntimeError("this GradCAM is open already; make a second GradCAM(model) for a nested block")
        if self._requested != "auto":
            named_module(self.model, self._requested)
        refuse_compiled(self.model, self._requested)
        self._float32 = all(p.dtype == torch.float32 for p in self.model.parameters() if p.is_floating_point())
        self._modes = {module: module.training for module in self.model.modules()}
        for module in self._modes:
            module.training = False  # not eval(), which some models override with changes that would stay
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        modes, self._modes = self._modes or {}, None
        for module, training in modes.items():
            module.training = training

    def __call__(self, images: Float[Tensor, "N 3 H W"], classes: Int[Tensor, "N ..."] | None = None) -> GradCAMResult:
        """Compute the maps of ``classes`` from one forward pass.

        Args:
            images: preprocessed images (N, 3, H, W), N at least 1.
            classes: (N,) for one class of each image, with maps (N, h, w); (N, K) for K of them, with maps
                (N, K, h, w); None takes the predicted class.

        Raises:
            ValueError: wrong shape or type, a class that the model does not have, or a model that returns no logits.
            LayerError: the forward pass does not reach the layer, the layer has no spatial map, or the logits do not
                depend on it.
        """
        if classes is None:
            maps, logits = self.explain(images, choose_predicted)
            return GradCAMResult(maps[:, 0], logits)
        _check_classes(classes, images)
        maps, logits = self.explain(images, lambda _: classes.reshape(len(classes), -1))
        return GradCAMResult(maps[:, 0] if classes.ndim == 1 else maps, logits)

    def explain(self, images: Float[Tensor, "N 3 H W"], choose: Callable[[Tensor], Tensor]) -> GradCAMResult:
        """Compute the maps (N, K, h, w) of classes that depend on the logits, from one forward pass.

        ``choose`` takes the logits (N, num_logits), and returns the classes (N, K). Errors are those of a call.
        """
        _check_images(images)
        if self._modes is None:
            raise RuntimeError("GradCAM works only inside its block; write `with GradCAM(model) as cam: cam(images)`")
        with torch.inference_mode(False):
            if images.is_inference():  # it has neither gradients nor a version counter, which the cut needs
                images = images.clone()
            place = self._place(images)
            with torch.no_grad(), _rng_and_autocast_restored(images):
                cut = Cut(leave_autocast=self._float32)
                with _branch_errors(cut, images):
                    output = place.run(self.model, images, cut)
                scores = _logits(output, len(images))
            leaf, grid = cut.leaf_and_grid(place.layer)
            self.layer = cut.layer
            logits = _at_least_float32(scores.detach())
            classes = choose(logits)
            _check_classes(classes, images, num_logits=logits.shape[1])
            with torch.autocast(images.device.type, enabled=False):  # a backward pass must not round to bfloat16
                maps = _maps(_signed(scores, classes.to(scores.device)), classes, leaf, grid, self.layer)
        return GradCAMResult(maps, logits)

    def _place(self, images: Tensor) -> CallInput | ModuleTensor:
        if self._requested != "auto":
            return ModuleTensor(self._requested)
        size = tuple(images.shape[1:])
        if size not in self._auto_places:
            with _rng_and_autocast_restored(images):
                self._auto_places[size] = find_layer(self.model, images)
        return self._auto_places[size]


def _maps(
    scores: Float[Tensor, "N K"], classes: Int[Tensor, "N K"], leaf: Tensor, grid: Grid, layer: str
) -> Float[Tensor, "N K h w"]:
    if not scores.requires_grad:
        raise LayerError(
            f"the logits have no gradient with respect to the {layer}; name a layer that they depend on and that the model does "
            f"not run inside torch.no_grad()"
        )
    maps: list[Tensor] = []
    for k, column in enumerate(classes.unbind(1)):
        same = next((j for j in range(k) if torch.equal(classes[:, j], column)), None)
        maps.append(_map(scores[:, k], leaf, grid, layer) if same is None else maps[same])
    return torch.stack(maps, 1)


def _map(score: Float[Tensor, " N"], leaf: Tensor, grid: Grid, layer: str) -> Float[Tensor, "N h w"]:
    (gradients,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True, allow_unused=True)
    if gradients is None:
        raise LayerError(f"the logits do not depend on the {layer}; name a layer that they depend on")
    cells = grid.spread(gradients)
    if grid.num_prefix and not cells.any() and gradients.any():
        raise LayerError(
            f"the logits depend on the class token of the {layer} only, not on its grid; "
            "name a layer inside or before the last block, such as its first norm, or take 'auto'"
        )
    return gradcam(grid.spread(leaf.detach()), cells)


def _signed(logits: Float[Tensor, "N num_logits"], classes: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Score (N, K) of each class: its logit; for a single logit, +logit for class 1 and -logit for class 0."""
    return logits * (2 * classes - 1) if logits.shape[1] == 1 else logits.gather(1, classes)


def _logits(output: object, num_images: int) -> Float[Tensor, "N num_logits"]:
    """Extract the logits from the output of a model."""
    tensor = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"the model must return logits (N, num_logits), got {_kind(output)}; wrap it in a module that returns them"
        )
    if tensor.ndim == 0 and num_images == 1:  # a model with one logit may end with .squeeze()
        tensor = tensor[None]
    logits = tensor[:, None] if tensor.ndim == 1 else tensor.flatten(1) if tensor.shape[2:].numel() == 1 else tensor
    if logits.ndim != 2 or len(logits) != num_images or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(
            f"the model must return logits of shape ({num_images}, num_logits), got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}; give an image classifier"
        )
    return logits


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        raise ValueError(
            f"images must be floating point of shape (N, C, H, W), N at least 1, got {images.dtype} of shape "
            f"{tuple(images.shape)}; preprocess uint8 images (Detector.preprocess), give one image as images[None]"
        )


def _check_classes(classes: Tensor, images: Tensor, *, num_logits: int | None = None) -> None:
    shapes = (2,) if num_logits is not None else (1, 2)
    integer = not (classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool)
    if not integer or classes.ndim not in shapes or len(classes) != len(images) or classes.numel() == 0:
        raise ValueError(
            f"classes must be integers of shape {'(N,) or ' if 1 in shapes else ''}(N, K) with N = {len(images)}, "
            f"got {classes.dtype} of shape {tuple(classes.shape)}; give one row for each image"
        )
    if num_logits is None:
        return
    num_classes = max(num_logits, 2)
    if classes.min() < 0 or classes.max() >= num_classes:
        raise ValueError(
            f"classes must be in 0..{num_classes - 1} for {num_logits} logits, got values from {int(classes.min())} to "
            f"{int(classes.max())}; number the classes from 0"
        )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _kind(output: object) -> str:
    more = f" with the keys {list(output)}" if isinstance(output, Mapping) else ""
    more = f" of {len(output)}" if isinstance(output, tuple | list) else more
    return f"a {type(output).__name__}{more}"


@contextlib.contextmanager
def _branch_errors(cut: Cut, images: Tensor) -> Iterator[None]:
    """Explain the type error of a layer on one of several branches.

    After the cut the pass continues in float32; another branch may still have the half precision of autocast.
    """
    autocast = torch.is_autocast_enabled(images.device.type)
    try:
        yield
    except RuntimeError as error:
        about_types = any(word in str(error) for word in ("dtype", "scalar type", "bias type"))
        missing = isinstance(error, NotImplementedError)
        if missing or not (about_types and autocast and cut.leave_autocast and cut.leaf is not None):
            raise
        raise LayerError(
            f"the pass cannot continue in float32 after the {cut.layer} ({error!s:.120}); where it is one of several branches, "
            f"name a layer after they meet; otherwise take 'auto', or run in float32"
        ) from error


@contextlib.contextmanager
def _rng_and_autocast_restored(images: Tensor) -> Iterator[None]:
    """Restore the random state and autocast, which a model or the cut may change."""
    kind = images.device.type
    autocast = torch.is_autocast_enabled(kind)
    with torch.random.fork_rng([images.device] if kind == "cuda" else []):
        try:
            yield
        finally:
            torch.set_autocast_enabled(kind, autocast)
