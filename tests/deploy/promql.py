"""PromQL expressions taken apart."""

import promql_parser

from tome_server.observability.metrics import Metrics

# Every series that a server has.
SERVED = {name for family in Metrics().families for name in family.series}


def parsed(expression: str) -> promql_parser.Expr:
    """Parse an expression, as Grafana completes it: its own variables stand for durations."""
    for variable in ("$__rate_interval", "$__range", "$__interval"):
        expression = expression.replace(variable, "5m")
    return promql_parser.parse(expression)


def selected(expression: str) -> dict[str, list[promql_parser.VectorSelector]]:
    """Return an expression's selectors by the series' name."""
    found: dict[str, list[promql_parser.VectorSelector]] = {}

    def note(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name, f"a selector without a name in {expression}"
            found.setdefault(node.name, []).append(node)

    promql_parser.walk(parsed(expression), note)
    return found
