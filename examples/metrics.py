"""How good class probabilities are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from pyro_ssvi.diagnostics import class_calibration_error


def measures(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, negative log likelihood, top-label and class-wise calibration errors.

    :param probs: ``[N, classes]``.
    :param labels: int64 ``[N]``.
    """
    classes = probs.shape[-1]
    return {
        "accuracy": float(multiclass_accuracy(probs, labels, classes, average="micro")),
        "nll": float(F.nll_loss(probs.clamp(min=1e-12).log(), labels)),
        "ece": float(multiclass_calibration_error(probs, labels, classes, n_bins=15)),
        "class_ece": float(class_calibration_error(probs, labels)),
    }
