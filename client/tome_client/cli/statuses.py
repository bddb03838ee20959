"""Exit statuses of `tome-client`, beside 0, 1 for a failure and 2 for a wrong command line."""

INTERRUPTED = 130
"""After Ctrl-C."""

PIPE_CLOSED = 141
"""The status that a shell reports for a command that SIGPIPE ended: the reader of its output, such as `head`, is
done."""
