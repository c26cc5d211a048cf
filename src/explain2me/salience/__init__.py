"""Images to salience maps."""

from explain2me.salience.gradcam import GradCAM, GradCAMResult, gradcam, predicted_classes

__all__ = ["GradCAM", "GradCAMResult", "gradcam", "predicted_classes"]
