"""What the server and its clients share: the messages of both protocols, and how durations and traces are written."""
