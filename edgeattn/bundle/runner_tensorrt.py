"""The TensorRT part of run.py; being written."""
