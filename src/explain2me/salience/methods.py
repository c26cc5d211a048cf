"""THE TABLE of salience methods, one row for each; the config and stage 1 read it.

To add a method, write one file in ``salience/`` (or none, for a library's method) and one row here. This module imports
no other module of the library and no heavy package, so a config is checked before PyTorch is imported.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor, nn


class Explainer(Protocol):
    """A context manager made from (model, layer); it explains images inside its block.

    ``layer`` names the explained layer once :meth:`explain` has returned.
    """

    layer: str

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def explain(self, images: "Tensor", choose: "Callable[[Tensor], Tensor]") -> "tuple[Tensor, Tensor]":
        """Maps (N, K, h, w) >= 0 of preprocessed images (N, 3, H, W), and logits (N, num_logits).

        Args:
            images: preprocessed.
            choose: logits -> classes (N, K) to explain.
        """


@dataclass(frozen=True)
class Method:
    """One way to make a salience map.

    Attributes:
        name: in configs.
        label: in reports.
        explainer: ``module:name`` of an :class:`Explainer`.
        passes: number of forward passes for each image.
        tells_classes_apart: whether the map depends on the explained class.
        source: where the method was published.
    """

    name: str
    label: str
    explainer: str
    passes: int
    tells_classes_apart: bool
    source: str

    def load(self) -> "Callable[[nn.Module, str], Explainer]":
        """Import the explainer."""
        return pkgutil.resolve_name(self.explainer)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("gradcam", "Grad-CAM", "explain2me.salience.gradcam:GradCAM", 1, True, "Selvaraju et al. 2017"),
    )
}
"""Every method by its name; the first one is the default."""
