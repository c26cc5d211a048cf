"""What `check` refuses before anything is explained."""

import shutil

import pyarrow as pa
import pytest

from explain2me.config.load import load_config
from explain2me.errors import Explain2MeError
from explain2me.images.listing import Listing
from explain2me.images.select import Selection
from explain2me.stages.check import check


@pytest.mark.parametrize(("column", "name"), [("label", ",real,"), ("source", ",gan_b,")])
def test_the_word_for_totals_is_no_label_or_source(write_config, rewrite_manifest, column, name):
    manifest = rewrite_manifest(lambda text: text.replace(name, ",all,"))
    with pytest.raises(Explain2MeError, match=f"the {column} 'all' means all of them; rename it"):
        check(load_config(write_config(data=f'manifest = "{manifest}"')))


def test_the_true_class_as_target_needs_labels(write_config):
    config = load_config(write_config(), ['salience.target="true"'])
    selection = Selection(pa.table({"label": pa.nulls(2, pa.string())}), (), Listing({}))
    with pytest.raises(Explain2MeError, match=r"salience\.target = 'true' needs labels"):
        check(config, selection)


@pytest.mark.parametrize(
    ("detectors", "files"), [(("a_", "a"), ("b", "_b")), (("a", "A"), ("b", "b"))], ids=["separator", "case"]
)
def test_two_runs_that_would_share_a_folder_are_refused(
    write_config, weights, detector_table, tmp_path, detectors, files
):
    table = ""
    for number, (detector, file) in enumerate(zip(detectors, files, strict=True)):
        path = tmp_path / str(number) / f"{file}.safetensors"
        path.parent.mkdir()
        shutil.copy(weights / f"seed{number}.safetensors", path)
        table += detector_table(detector, str(path))
    config = load_config(write_config(detectors=table, measures="stability = false"))
    with pytest.raises(
        Explain2MeError, match=r"would share the folder maps/model=.*; rename a detector or a checkpoint"
    ):
        check(config)
