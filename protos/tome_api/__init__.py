"""What the server and its clients share: the protocols' messages; how durations, targets, traces and output are written."""
