"""What the server and its clients share: the protocols' messages, and how settings, targets and output are written."""
