from pathlib import Path

import pytest

from tome_server.api.rpc.access import address
from tome_server.api.tokens import Tokens
from tome_server.errors import ConfigError

ONE, TWO, THREE = "first-token-0123456789", "second/token+0123456789==", "third_token~0123456789"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"# of the two front ends\n{ONE}\n\n  {TWO}  \n")
    return file


def replace(file: Path, text: str) -> None:
    """Exchange a file as a careful operator does: at once, by another."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def test_each_token_of_the_file_has_a_holder_of_its_own(file: Path) -> None:
    tokens = Tokens(file)
    first, second = tokens.holder(f"Bearer {ONE}"), tokens.holder(f"bearer  {TWO}")
    assert first
    assert second
    assert first != second
    assert first == tokens.holder(f"BEARER {ONE}".encode())
    assert ONE not in first


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", ONE, f"Basic {ONE}", f"Bearer {ONE}x", f"Bearer {ONE[:-1]}", f"Bearer {THREE}",
     f"Bearer {ONE} {TWO}", "Bearer # of the two front ends", "Bearer ünïcode", b"Bearer \xff"],
)  # fmt: skip
def test_anything_else_is_nobodys(file: Path, header: str | bytes | None) -> None:
    assert Tokens(file).holder(header) is None


def test_a_changed_file_holds_from_the_next_call_on(file: Path) -> None:
    tokens = Tokens(file)
    assert tokens.holder(f"Bearer {ONE}")
    replace(file, f"{TWO}\n{THREE}\n")
    assert tokens.holder(f"Bearer {ONE}") is None
    assert tokens.holder(f"Bearer {TWO}")
    assert tokens.holder(f"Bearer {THREE}")


def test_an_emptied_file_leaves_no_token_valid(file: Path) -> None:
    tokens = Tokens(file)
    replace(file, "# all revoked\n")
    assert tokens.holder(f"Bearer {ONE}") is None


@pytest.mark.parametrize("harm", ["gone", "short", "words"])
def test_a_file_that_does_not_serve_is_said_once_and_changes_nothing(
    file: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = Tokens(file)
    if harm == "gone":
        file.unlink()
    else:
        replace(file, f"{THREE}\n{'short' if harm == 'short' else 'what is this sentence'}\n")
    for _ in range(2):
        assert tokens.holder(f"Bearer {ONE}")
        assert tokens.holder(f"Bearer {THREE}") is None
    (said,) = (record.message for record in caplog.records)
    assert said.startswith("the tokens were not exchanged, those before stay valid: ")
    assert "sentence" not in said
    replace(file, THREE)
    assert tokens.holder(f"Bearer {THREE}")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "holds no tokens"),
        ("# nothing\n\n", "holds no tokens"),
        (f"{ONE}\nshort\n", "tokens:2: a token has at least 16 characters"),
        (f"{ONE}, {TWO}\n", "tokens:1: a token is letters, digits and"),
        (None, "tokens: No such file or directory"),
    ],
)
def test_a_file_without_use_stops_the_start(file: Path, text: str | None, what: str) -> None:
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ConfigError, match=what) as caught:
        Tokens(file)
    assert ONE not in str(caught.value)


@pytest.mark.parametrize(
    ("peer", "same"),
    [
        ("ipv4:10.0.0.1:5000", "ipv4:10.0.0.1"),
        ("ipv6:%5Bfe80::1%5D:5000", "ipv6:[fe80::1]"),
        ("ipv6:[::1]:5000", "ipv6:[::1]"),
        ("unix:/run/tome.sock", "unix:/run/tome.sock"),
    ],
)
def test_a_client_without_token_is_known_by_its_address(peer: str, same: str) -> None:
    assert address(peer) == same
