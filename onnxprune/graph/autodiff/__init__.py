"""Reverse mode as an ONNX graph: gradients that run wherever onnxruntime runs."""

from onnxprune.graph.autodiff.gradient import ADJOINT, GRADIENT, TARGET, WEIGHT, Link, Tap, adjoint_model, gradient_model
from onnxprune.graph.autodiff.reverse import differentiate
from onnxprune.graph.autodiff.rules import MissingGradient, NoGradient, Tape

__all__ = [
    "ADJOINT",
    "GRADIENT",
    "TARGET",
    "WEIGHT",
    "Link",
    "MissingGradient",
    "NoGradient",
    "Tap",
    "Tape",
    "adjoint_model",
    "differentiate",
    "gradient_model",
]
