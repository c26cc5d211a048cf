"""A part file is whole, or it is refused."""

import pytest

from explain2me.errors import RunFolderError
from explain2me.run.files import write_parquet
from explain2me.run.packs import read_parquet
from explain2me.run.parts import read_part
from explain2me.run.plan import plan


@pytest.mark.parametrize("damage", ["row doubled", "row lost", "images moved", "conditions moved"])
def test_a_part_that_is_not_whole_is_never_reshaped(finished_run, tmp_path, damage):
    table = read_parquet(plan(finished_run)[0].path(finished_run.folder))
    count = len(table)
    rows = {
        "row doubled": [0, *range(count)],
        "row lost": list(range(count - 1)),
        "images moved": [1, 0, *range(2, count)],
        "conditions moved": [*range(count // 2, count), *range(count // 2)],
    }[damage]
    write_parquet(table.take(rows), tmp_path / "part.parquet")
    with pytest.raises(RunFolderError, match="does not hold each image once for each of its 16 conditions"):
        read_part(tmp_path / "part.parquet")
