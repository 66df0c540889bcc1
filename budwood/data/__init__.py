"""Texts and token ids for calibration and evaluation, cut into windows of one length."""

from budwood.data.evaluation import evaluation_windows
from budwood.data.windows import Windows, calibration_windows

__all__ = ["Windows", "calibration_windows", "evaluation_windows"]
