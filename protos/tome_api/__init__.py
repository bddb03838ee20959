"""What the server and its clients share: both protocols' messages, and how durations, traces and output are written."""
