"""torchtitan behind its adapter: the same curve where it is installed, one clear line where it is not."""

from __future__ import annotations

import importlib.util

import pytest

from stages.errors import InputError
from stages.parallel import titan
from tests.helpers.distributed import run_distributed
from tests.helpers.stage_jobs import change, pretrain_job, read_metrics, run_job


def _both(jobs, rank, world):
    for job in jobs:
        run_job(job, rank, world)


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="needs the extra `titan`")
@pytest.mark.parametrize("replicate", [1, 2])
def test_its_mesh_and_clipping_give_the_same_curve(tmp_path, replicate):
    ours = pretrain_job(tmp_path, clip_norm=0.05, replicate=replicate)
    theirs = change(ours, library="torchtitan", output_dir=str(tmp_path / "theirs"))
    run_distributed(_both, 2 * replicate, args=([ours, theirs],))
    for row, wanted in zip(read_metrics(theirs), read_metrics(ours), strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((wanted["loss"], wanted["grad_norm"]), rel=1e-6)


def test_where_it_is_missing_the_error_says_what_to_install(tmp_path, monkeypatch):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match=r"pip install torchtitan==0.2.2 triton .*set parallel.library=torch"):
        run_job(pretrain_job(tmp_path, library="torchtitan"))


def test_another_version_is_refused(monkeypatch):
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.0")
    with pytest.raises(InputError, match=r"found version 0.3.0; expected 0.2.2"):
        titan.check_installed()
