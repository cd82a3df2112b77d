"""Several ranks write one run below a URL: one locks, brings and sends, and the bytes are those of one process."""

import shutil
import subprocess
import threading
from types import SimpleNamespace

import fsspec
import pytest
import torch.distributed as dist
from rank_processes import bytes_of, command, finished, launch, wait_for
from s3_server import bucket, s3_server

import streamfisher as sf
from streamfisher.errors import ConfigError, StreamfisherError
from streamfisher.runtime import ranks as ranks_module
from streamfisher.store import written

URL = "memory://bucket/run.zarr"
KEPT = ["--keep-gradients", "all"]


def objects(store, root):
    names = [name.removeprefix(f"{root}/") for name in store.find(root)]
    return {name: store.cat(f"{root}/{name}") for name in names if "/c/" in name or name == "spectrum.json"}


def chunks_of(out):
    return {name: content for name, content in bytes_of(out).items() if not name.startswith("mean")}


@pytest.mark.slow
def test_ranks_that_are_killed_and_go_on_elsewhere_write_the_bytes_of_one_process(tmp_path):
    local = tmp_path / "local.zarr"
    finished(launch(1, command(local, "slow", "thirty_vectors", *KEPT), SECONDS="0"))
    with s3_server() as settings:
        store = bucket("runs")
        staging = tmp_path / "staging"
        out = command("s3://runs/ranks.zarr", "slow", "thirty_vectors", *KEPT, "--staging", str(staging))
        first = launch(2, out, SECONDS="0.2", **settings)
        markers = staging / "ranks.zarr" / "done"
        wait_for(lambda: store.exists("runs/ranks.zarr/done") and len(list(markers.glob("rows-*.json"))) > 4)
        subprocess.run(["pkill", "-KILL", "-f", str(staging)], check=True)
        first.communicate()
        assert 0 < len([name for name in store.find("runs/ranks.zarr/done") if "/rows-" in name]) < 15
        shutil.rmtree(staging)
        errors = launch(3, out, SECONDS="0", **settings)
        _, said = errors.communicate(timeout=300)
        assert errors.returncode == 0, said[-3000:]
        assert said.count("The run is at s3://runs/ranks.zarr") == 1
        there = objects(store, "runs/ranks.zarr")
        here = chunks_of(local)
        assert {name: there[name] for name in here} == here
        assert sf.verify(sf.open_run("s3://runs/ranks.zarr")) == []
    assert not staging.exists()


_COLLECT = """
import rank_models, streamfisher as sf
config = sf.SpectralConfig(chunk_size=2, device="cpu")
run = sf.collect(rank_models.slow(), rank_models.thirty_vectors(), "s3://runs/api.zarr", config=config)
print("lambda", run.spectrum("none").global_.eigenvalues[0])
"""


@pytest.mark.slow
def test_collect_returns_on_every_rank_once_the_run_is_sent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_COLLECT)
    with s3_server() as settings:
        bucket("runs")
        printed = finished(launch(2, [str(script)], SECONDS="0", TMPDIR=str(tmp_path), **settings))
    first, second = [line for line in printed.splitlines() if line.startswith("lambda")]
    assert first == second


Ranks = ranks_module.Ranks


class Elsewhere(Ranks):
    """A rank on a host that does not see the folders of rank 0."""

    def share(self, name, value=None):
        _, token = super().share(name, value)
        return ["/no/such/folder/run.zarr", token]


def test_a_rank_that_does_not_see_the_staging_folder_says_so_on_all_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    store, errors = dist.HashStore(), {}

    def rank(index, kind):
        state = SimpleNamespace(process_index=index, num_processes=2)
        try:
            with kind(state, timeout=60, store=store) as ranks, written(URL, ranks=ranks):
                errors[index] = None
        except StreamfisherError as error:
            errors[index] = str(error)

    other = threading.Thread(target=rank, args=(1, Elsewhere))
    other.start()
    rank(0, Ranks)
    other.join()
    assert errors[1].startswith("rank 1 on ") and "does not see rank 0's /no/such/folder" in errors[1]
    assert "rank 1 failed: ConfigError: rank 1 on " in errors[0]
    with fsspec.filesystem("memory").open("/bucket/run.zarr/writers/000001.json") as file:
        assert b'"released": true' in file.read()


def test_ranks_take_no_staging_budget_and_other_writers_take_no_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="is to be written by 2 ranks"), written(URL):
        pass
    ranks = SimpleNamespace(count=2, index=0, is_main=True)
    refused = pytest.raises(ConfigError, match=r"--staging-budget 1GB: of 2 ranks.*leave it out")
    with refused, written(URL, budget="1GB", ranks=ranks):
        pass
