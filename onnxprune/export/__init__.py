"""Folders of transformers models to ONNX, checked against torch. The only room that imports torch and transformers, and only when used."""
