"""What clients speak: gRPC, HTTP, and what the Open Inference Protocol means whichever carries it."""
