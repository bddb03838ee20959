"""What the server and its clients share: the protocols' messages, and the grammar of settings, targets and commands."""
