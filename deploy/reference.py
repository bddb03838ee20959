"""Writes what is made from the server's settings: their table in docs/operations.md, their part of the chart's schema.

python deploy/reference.py           # --check only says whether both are as they must be
"""

import json
import sys
from pathlib import Path

from tome_server.config.reference import settings_schema, settings_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/operations.md"
SCHEMA = ROOT / "deploy/helm/tome-serving/values.schema.json"
BEGIN, END = "<!-- settings: made by `make reference` -->", "<!-- end of settings -->"
# Settings that must agree with the chart's manifests: it writes them itself, from values of its own.
CHARTS_OWN = ("listen", "metrics", "device", "profiles", "drain_timeout", "rest", "tls", "auth")


def page() -> str:
    """Return the page with the table of settings as it must be."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n\n{settings_table()}\n{END}{rest.split(END)[1]}"


def schema() -> str:
    """Return the chart's schema with the part of the settings as it must be."""
    whole = json.loads(SCHEMA.read_text())
    settings = settings_schema()
    del settings["$schema"]
    settings["description"] = "Settings of the server, but for those that the chart sets from values of its own."
    settings["properties"] = {k: v for k, v in settings["properties"].items() if k not in CHARTS_OWN}
    whole["properties"]["config"] = settings
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def main(check: bool) -> int:
    """Write both, or return 1 and name those that are not as they must be."""
    stale = {path: text for path, text in ((PAGE, page()), (SCHEMA, schema())) if path.read_text() != text}
    for path, text in stale.items():
        if not check:
            path.write_text(text)
        print(f"{path.relative_to(ROOT)} {'is out of date; run `make reference`' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] == ["--check"]))
