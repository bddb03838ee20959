"""Models that come with the package, one folder each."""

from pathlib import Path

BUNDLED = Path(__file__).parent
