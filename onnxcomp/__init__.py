"""onnxcomp: makes a trained ONNX model smaller and faster, and proves it."""
