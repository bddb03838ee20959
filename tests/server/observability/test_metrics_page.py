"""docs/metrics.md is what the code says."""

from pathlib import Path

from tests.server.api.rpc.wire import exposition
from tests.server_process import ServerProcess
from tome_server.observability.metrics import Metrics
from tome_server.observability.metrics_page import page

PAGE = Path(__file__).parents[3] / "docs/metrics.md"
ONLY_WITH_TLS = {"tome_tls_certificate_expiry_timestamp_seconds"}


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run: make reference"


def test_the_page_lists_what_a_server_serves_and_nothing_else(server: ServerProcess) -> None:
    served = {line.split()[2] for line in exposition(server.metrics_url).splitlines() if line.startswith("# TYPE ")}
    listed = {name for family in Metrics().families for name in (family.name, *family.series)}
    # The client library says when each counter began.
    served = {name for name in served if not name.endswith("_created")}
    assert served <= listed
    missing = {family.name for family in Metrics().families if not served & {family.name, *family.series}}
    assert missing == ONLY_WITH_TLS
