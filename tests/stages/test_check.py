"""What `check` refuses before anything is explained."""

import pytest

from explain2me.config.load import load_config
from explain2me.errors import Explain2MeError
from explain2me.stages.check import check


@pytest.mark.parametrize(("column", "name"), [("label", ",real,"), ("source", ",gan_b,")])
def test_the_word_for_totals_is_no_label_or_source(write_config, rewrite_manifest, column, name):
    manifest = rewrite_manifest(lambda text: text.replace(name, ",all,"))
    with pytest.raises(Explain2MeError, match=f"the {column} 'all' means all of them; rename it"):
        check(load_config(write_config(data=f'manifest = "{manifest}"')))
