"""The Open Inference Protocol, version 2: what its tensors and parameters mean to the engine, whatever carries them."""
