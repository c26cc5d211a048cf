"""Images to salience maps."""

from explain2me.salience.compiling import compile_before
from explain2me.salience.gradcam import GradCAM, GradCAMResult, gradcam, predicted_classes

__all__ = ["GradCAM", "GradCAMResult", "compile_before", "gradcam", "predicted_classes"]
