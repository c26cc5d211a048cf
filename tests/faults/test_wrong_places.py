"""Places that cannot be written and files that are cut off: one line each."""

from pathlib import Path

import pytest
from refused import refused


@pytest.mark.parametrize("what", ["below a file", "not writable"])
def test_a_place_that_cannot_be_written_is_one_line(call, write_config, tmp_path, what):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run" if what == "below a file" else Path("/proc/explain2me")
    refused(call("run", write_config(), "--out", out))


def test_a_truncated_score_file_is_one_line(call, copied_run):
    path = min((copied_run.folder / "scores").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    refused(call("summarise", copied_run.folder), path.name)
