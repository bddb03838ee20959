import json

import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu import main, measure


def test_all_but_graphs_can_be_tried_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--dtype", "float32", "--model", "deit_tiny_patch16_224", "--compile", "none"]
    main([*arguments, "--batch", "1", "--r", "0,13", "--rounds", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    ours = [f"{kind} {r}" for kind in ("ours", "served", "served ahead") for r in (0, 13)]
    assert [row["side"] for row in report["rows"]] == ["timm", *ours]
    assert all(row["ms"] > 0 for row in report["rows"])
    assert report["rows"][1]["vs_first"] == [1, 1, 1]
    assert report["command"].endswith("--rounds 1 --json")


def test_the_table_has_what_the_report_has(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--dtype", "float32", "--model", "deit_tiny_patch16_224", "--compile", "none"]
    main([*arguments, "--batch", "1", "--r", "13", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "model: deit_tiny_patch16_224" in lines
    assert [line.split(" | ")[1] for line in lines if line.startswith("| 1 |")] == [
        "timm", "ours 13", "served 13", "served ahead 13",
    ]  # fmt: skip


def test_ours_attend_as_in_a_server_and_timms_as_torch_prefers() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert not gpu._as_served(torch.backends.cuda.cudnn_sdp_enabled)()
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_side_is_compared_with_its_own_kind_at_the_first_r_and_with_timms_faster_side() -> None:
    took = {
        "timm": [4.0, 4.0, 4.0],
        "timm compiled": [3.0, 3.0, 3.0],
        "graph 0": [3.0, 2.0, 4.0],
        "graph 13": [1.5, 1.0, 2.0],
    }
    rows = {row.side: row for row in gpu._rows(64, 0, took)}
    assert rows["timm"].vs_first is None
    assert rows["timm"].vs_timm == (0.75, 0.75, 0.75)
    assert rows["graph 13"].vs_first == (2, 2, 2)
    assert rows["graph 13"].vs_timm[1] == 2
    assert rows["graph 13"].images_per_second == 64 / 1.5


def test_every_side_is_timed_in_every_round() -> None:
    called: list[str] = []
    took = measure({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3)
    assert {name: len(values) for name, values in took.items()} == {"a": 3, "b": 3}
    assert set(called) == {"a", "b"}
