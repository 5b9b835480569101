"""The Open Inference Protocol v2 over HTTP, with Triton's binary tensors: types, wire format and routes. Knows neither keys nor Ray."""
