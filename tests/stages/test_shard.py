"""One shard: its precision, and what it says when memory is short."""

import pytest
import torch

from explain2me import GradCAM
from explain2me.errors import Explain2MeError
from explain2me.run.plan import plan
from explain2me.stages.begin import begin_run
from explain2me.stages.shards.commit import commit_shard
from explain2me.stages.shards.rows import exact_convolutions


def test_a_gpu_without_memory_left_is_one_line(finished_run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory\nand so on")

    run = begin_run(finished_run.config, tmp_path / "run")
    monkeypatch.setattr(GradCAM, "explain", fail)
    with pytest.raises(Explain2MeError, match=r"^CUDA out of memory; what is committed stays\. .* compute\.batch_size"):
        commit_shard(run.folder, plan(run)[0])


def test_float32_on_cuda_is_not_tf32():
    class OnCuda:
        device = torch.device("cuda")

    before = torch.backends.cudnn.allow_tf32
    with exact_convolutions(OnCuda()):  # type: ignore[arg-type]
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.enabled
    assert torch.backends.cudnn.allow_tf32 == before
