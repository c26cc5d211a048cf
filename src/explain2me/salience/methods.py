"""THE TABLE of salience methods: one row a method. Config and stage 1 read these rows.

To add a method, write one file in ``salience/`` (or none, for a library's) and one row here. This module imports
nothing, so that the config can be checked before PyTorch is there.
"""

import pkgutil
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One way to make a salience map.

    Attributes:
        name: as in configs.
        label: for people.
        explainer: ``module:name`` of a context manager made from (model, layer); inside its block
            ``explain(images, choose)`` returns maps (N, K, h, w) >= 0 and logits, from one forward pass.
        passes: forward passes for an image.
        tells_classes_apart: whether the map depends on the class that is explained.
        source: where it was published.
    """

    name: str
    label: str
    explainer: str
    passes: int
    tells_classes_apart: bool
    source: str

    def load(self) -> Any:
        """Import the explainer."""
        return pkgutil.resolve_name(self.explainer)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("gradcam", "Grad-CAM", "explain2me.salience.gradcam:GradCAM", 1, True, "Selvaraju et al. 2017"),
    )
}
"""Every method by its name; the first is the default."""
