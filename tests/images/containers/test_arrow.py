"""Arrow files that would be followed out of their bounds."""

import numpy as np
from container_files import image_table, kind_of, write_saved

from explain2me.images.reading import read_file


def test_wrong_offsets_in_an_arrow_file_are_not_followed(tmp_path):
    table = image_table([b"A" * 1000, b"B" * 1000, b"C" * 1000])
    path = write_saved(tmp_path / "saved", table, batch_rows=3) / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    offsets = np.array([0, 1000, 2000, 3000], "<i4").tobytes()
    assert whole.count(offsets) == 1
    path.write_bytes(whole.replace(offsets, np.array([0, 1000, 2**31 - 9, 3000], "<i4").tobytes()))
    assert kind_of(lambda: read_file(path / "1"))[0] == "unreadable"
