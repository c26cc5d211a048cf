"""What every refusal on the command line has in common."""


def refused(result: tuple[int, str, str], *messages: str) -> None:
    """Exit code 2 and one line, of bearable length and without control characters, that says these things."""
    code, _, errors = result
    assert code == 2, errors
    assert errors.startswith("explain2me: ")
    assert errors.count("\n") == 1
    assert len(errors) < 3000
    assert errors[:-1].isprintable()
    for message in messages:
        assert message in errors
