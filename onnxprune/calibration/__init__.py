"""Calibration data: read it, cut it into batches, run a model over it, and keep sums that merge."""

from onnxprune.calibration.checks import check_labels
from onnxprune.calibration.data import Batch, CalibrationData
from onnxprune.calibration.source import load_calibration
from onnxprune.calibration.statistics import Statistics

__all__ = ["Batch", "CalibrationData", "Statistics", "check_labels", "load_calibration"]
