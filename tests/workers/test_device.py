"""The number of threads is that of the run, wherever it is resumed."""

import torch

from explain2me.config.load import load_config
from explain2me.workers import Engine, run_tasks
from explain2me.workers.device import with_device


def test_the_number_of_threads_belongs_to_the_run(finished_run, write_config):
    config = load_config(write_config())
    threads = finished_run.config.compute.threads
    assert threads == max(1, torch.get_num_threads())
    more = config.model_copy(update={"compute": config.compute.model_copy(update={"workers": 4})})
    assert with_device(more, finished_run.config).compute.threads == threads
    seen = []
    before = torch.get_num_threads()
    list(run_tasks(lambda _: seen.append(torch.get_num_threads()), [1, 2], Engine(threads=2)))
    assert seen == [2, 2]
    assert torch.get_num_threads() == before
