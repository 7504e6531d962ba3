"""Calibration data: read it, cut it into batches, run a model over it, and keep sums that merge."""

from onnxprune.calibration.checks import check_labels
from onnxprune.calibration.data import Batch, CalibrationData
from onnxprune.calibration.source import load_calibration
from onnxprune.calibration.statistics import Statistics
from onnxprune.calibration.stream import collect, stream

__all__ = ["Batch", "CalibrationData", "Statistics", "check_labels", "collect", "load_calibration", "stream"]
