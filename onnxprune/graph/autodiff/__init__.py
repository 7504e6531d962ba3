"""Reverse mode as an ONNX graph: gradients that run wherever onnxruntime runs."""

from onnxprune.graph.autodiff.gradient import GRADIENT, TARGET, WEIGHT, Link, Tap, gradient_model
from onnxprune.graph.autodiff.reverse import differentiate
from onnxprune.graph.autodiff.rules import MissingGradient, Tape

__all__ = ["GRADIENT", "TARGET", "WEIGHT", "Link", "MissingGradient", "Tap", "Tape", "differentiate", "gradient_model"]
