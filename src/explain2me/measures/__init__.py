"""The five measures of section 3 of the paper, as pure functions on tensors, one file for each subsection.

To add a measure, write a file here and a row in ``statistics/scores.py``; a new kind of perturbation is an entry of
``PERTURBATIONS`` in ``run/conditions.py``.
"""

from explain2me.measures.checks import is_dead, is_flat
from explain2me.measures.entropy import entropy
from explain2me.measures.focus import blur_both, blur_by_salience
from explain2me.measures.noise import NOISES, gaussian_noise, salt_and_pepper, turbulence, uniform_blend
from explain2me.measures.resilience import TRANSFORMS, Transform, resilience, shift_distance
from explain2me.measures.similarity import SIMILARITIES, pearson, spearman, ssim, ssim_windowed, top_k_iou
from explain2me.measures.stability import pairs, stability, stability_matrix

__all__ = [
    "NOISES",
    "SIMILARITIES",
    "TRANSFORMS",
    "Transform",
    "blur_both",
    "blur_by_salience",
    "entropy",
    "gaussian_noise",
    "is_dead",
    "is_flat",
    "pairs",
    "pearson",
    "resilience",
    "salt_and_pepper",
    "shift_distance",
    "spearman",
    "ssim",
    "ssim_windowed",
    "stability",
    "stability_matrix",
    "top_k_iou",
    "turbulence",
    "uniform_blend",
]
