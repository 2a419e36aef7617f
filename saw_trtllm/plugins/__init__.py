"""The library of TensorRT plugins, and a layer's fields and inputs."""
