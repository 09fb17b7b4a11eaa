"""ONNX graphs: exported, stored in float16, executed. For every target whose artifacts are made of them."""
