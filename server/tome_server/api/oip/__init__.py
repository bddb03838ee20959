"""The Open Inference Protocol, version 2, independent of the transport: its tensors, parameters and descriptions."""
