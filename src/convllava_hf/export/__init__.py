"""Takes checkpoints to other runtimes: ONNX Runtime, OpenVINO, the browser, llama.cpp."""
