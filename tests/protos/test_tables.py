from tome_api.tables import table


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_with_their_last() -> None:
    rows = [("a", "1.0", ""), ("longer", "10.0", "x")]
    assert table(("name", "n", "note"), rows, right=[1]) == (
        "name       n  note\na        1.0\nlonger  10.0  x"
    )  # fmt: skip


def test_a_table_may_have_no_header() -> None:
    assert table((), [("name", "a"), ("ready", "yes")]) == "name   a\nready  yes"
