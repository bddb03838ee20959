"""What metrics say of models that come and go."""

from tome_server.observability.metrics import Metrics


def test_a_model_out_of_service_is_no_longer_described_but_its_counts_stay() -> None:
    metrics = Metrics()
    for model in ("one", "two"):
        metrics.serving(model, "vit", "cpu", "float32", "price", (0, 2, 4), 98)
        metrics.slo_met.labels(model).inc()
    metrics.retired("one")
    value = metrics.registry.get_sample_value
    for name in ("tome_merge_r_limit", "tome_latency_drift_ratio", "tome_queue_depth"):
        assert value(name, {"model": "one"}) is None
        assert value(name, {"model": "two"}) is not None
    assert value("tome_slo_met_total", {"model": "one"}) == 1
    # Back with another grid, its r are counted in that.
    metrics.merge_r.labels("one").observe(2)
    metrics.serving("one", "vit", "cpu", "float32", "price", (0, 3), 98)
    assert value("tome_merge_r_bucket", {"model": "one", "le": "3.0"}) == 0
    assert value("tome_merge_r_bucket", {"model": "one", "le": "2.0"}) is None
    assert value("tome_merge_r_limit", {"model": "one"}) == 3
    assert value("tome_slo_met_total", {"model": "one"}) == 1


def test_what_a_replaced_model_still_answers_is_counted_in_its_successors_buckets() -> None:
    metrics = Metrics()
    metrics.serving("vit", "vit", "cpu", "float32", "price", (0, 2, 4), 8)
    metrics.of_model("vit").merge_r.observe(2)
    metrics.serving("vit", "vit", "cpu", "float32", "price", (0, 3), 6)
    metrics.of_model("vit").merge_r.observe(3)

    def within(r: int) -> float | None:
        return metrics.registry.get_sample_value("tome_merge_r_bucket", {"model": "vit", "le": f"{r}.0"})

    assert [within(r) for r in (0, 2, 3, 6)] == [0, None, 1, 1]


def test_a_model_that_is_loaded_again_has_gauges_again() -> None:
    metrics = Metrics()
    for depth in (5, 7):
        metrics.serving("vit", "vit", "cpu", "float32", "price", (0, 2), 8)
        metrics.of_model("vit").queue_depth.set(depth)
        assert metrics.registry.get_sample_value("tome_queue_depth", {"model": "vit"}) == depth
        metrics.retired("vit")
        assert metrics.registry.get_sample_value("tome_queue_depth", {"model": "vit"}) is None
