"""`python -m tome_client` is `tome-client`."""

import sys

from tome_client.cli import main

if __name__ == "__main__":
    sys.exit(main())
