"""`python -m tome_server` is `tome-server`."""

from tome_server.cli.main import main

if __name__ == "__main__":
    main()
