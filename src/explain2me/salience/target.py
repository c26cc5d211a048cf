"""Which class each map explains: that of ``salience.target``, and the class that is held fixed."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from explain2me.salience.gradcam import predicted_classes


def classes_to_explain(
    target: str,
    names: Sequence[str],
    logits: Float[Tensor, "N num_logits"],
    labels: Int[Tensor, " N"],
    clean_classes: Int[Tensor, " N"] | None,
) -> Int[Tensor, "N 2"]:
    """Classes that the two maps of each image explain.

    The first is the class that ``salience.target`` names: the predicted class of this very image, its label, or one
    class. The second is held fixed: for a perturbed image the class that its clean map explains, ``clean_classes``; for
    a clean image (``clean_classes`` None) its label, or the first class where it has none.
    """
    predicted = predicted_classes(logits)
    labels = labels.to(predicted)
    if target == "predicted":
        explained = predicted
    elif target == "true":
        explained = labels
    else:
        explained = torch.full_like(predicted, names.index(target))
    fixed = clean_classes if clean_classes is not None else torch.where(labels < 0, explained, labels)
    return torch.stack([explained, fixed], dim=1)
