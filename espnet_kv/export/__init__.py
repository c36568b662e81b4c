"""Export of a streaming model as an ONNX graph whose caches are inputs and outputs."""
