"""Which of several equally accurate image classifiers to trust: five salience measures over whole datasets."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explain2me.detectors.load import Detector, load_detector
    from explain2me.errors import Explain2MeError
    from explain2me.report.notebook import open_run
    from explain2me.run.folder import Run
    from explain2me.salience.gradcam import GradCAM

__version__ = "0.1.0.dev0"
__all__ = ["Detector", "Explain2MeError", "GradCAM", "Run", "__version__", "load_detector", "open_run"]

_HOMES = {
    "Detector": "detectors.load",
    "Explain2MeError": "errors",
    "GradCAM": "salience.gradcam",
    "Run": "run.folder",
    "load_detector": "detectors.load",
    "open_run": "report.notebook",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``explain2me --help`` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'explain2me' has no attribute {name!r}")
    return getattr(importlib.import_module(f"explain2me.{_HOMES[name]}"), name)
