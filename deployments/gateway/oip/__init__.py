"""The Open Inference Protocol v2 over HTTP with Triton's binary tensors: types, wire format, routes. Knows neither keys nor Ray."""
