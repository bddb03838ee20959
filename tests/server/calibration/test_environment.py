from pathlib import Path

from tome_server.calibration import environment


def test_a_processor_that_does_not_say_its_name_goes_by_its_kind(tmp_path: Path) -> None:
    assert environment._cpu_name(tmp_path / "gone") is None
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert environment._cpu_name(tmp_path / "cpuinfo") is None
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Processor  \n\nmodel name\t: B\n")
    assert environment._cpu_name(tmp_path / "cpuinfo") == "A Processor"
