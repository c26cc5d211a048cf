"""run.json records the versions of what made a run."""

import json

from explain2me.stages.begin import begin_run


def test_the_versions_that_resume_a_run_are_recorded(copied_run, monkeypatch):
    monkeypatch.setattr("explain2me.stages.begin.versions", lambda: {"torch": "99"})
    for _ in range(2):
        begin_run(copied_run.config, copied_run.folder)
    record = json.loads((copied_run.folder / "run.json").read_text())
    assert record["later_versions"] == [{"torch": "99"}]
    assert record["versions"] == copied_run.record["versions"]
