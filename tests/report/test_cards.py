"""Model cards."""


def test_cards_hold_whole_sentences(reported):
    text = next((reported.folder / "report" / "model-cards").rglob("model-card.md")).read_text()
    (line,) = (line for line in text.splitlines() if "so few runs make the interval" in line)
    assert line.endswith(".")
