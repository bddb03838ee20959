import pytest

from tome_api.targets import Address, addresses, is_this_machine


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("vision.example:8500", [("vision.example", "8500")]),
        ("vision.example", [("vision.example", "443")]),
        ("10.0.0.1:8500", [("10.0.0.1", "8500")]),
        ("[::1]:8500", [("::1", "8500")]),
        ("[::1]", [("::1", "443")]),
        ("::1", [("::1", "443")]),
        ("dns:vision.example:8500", [("vision.example", "8500")]),
        ("dns:///vision.example:8500", [("vision.example", "8500")]),
        ("dns://10.0.0.53/vision.example:8500", [("vision.example", "8500")]),
        ("dns:///[::1]:8500", [("::1", "8500")]),
        ("ipv4:10.0.0.1:8500", [("10.0.0.1", "8500")]),
        ("ipv4:10.0.0.1:1,10.0.0.2", [("10.0.0.1", "1"), ("10.0.0.2", "443")]),
        ("ipv4:///10.0.0.1:1", [("10.0.0.1", "1")]),
        ("ipv6:[::1]:1,[2001:db8::1]:2", [("::1", "1"), ("2001:db8::1", "2")]),
        ("ipv6:%5B::1%5D:1", [("::1", "1")]),
        ("unix:/run/tome.sock", []),
        ("unix:///run/tome.sock", []),
        ("unix-abstract:tome", []),
        ("", [("", "443")]),
    ],
)
def test_a_targets_addresses_are_those_that_grpc_reads(target: str, named: list[tuple[str, str]]) -> None:
    assert addresses(target) == tuple(Address(*one) for one in named)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST", "localhost.", "tome.localhost", "127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1",
     "0.0.0.0", "::"],
)  # fmt: skip
def test_loopback_is_this_machine_however_it_is_written(host: str) -> None:
    assert is_this_machine(host)


@pytest.mark.parametrize(
    "host", ["", "vision.example", "localhost.example", "notlocalhost", "128.0.0.1", "::2", "::ffff:10.0.0.1", "127"]
)
def test_other_hosts_are_not(host: str) -> None:
    assert not is_this_machine(host)
