"""The log tells what happened, a run can be followed from elsewhere, and --fsync flushes before it marks."""

import json
import os
import warnings

import pytest
import tiny_models
from command_line import cli
from tiny_runs import make_run

import streamfisher as sf
from streamfisher.cli.watch import follow
from streamfisher.runtime import RunLog, durable, read_log
from streamfisher.runtime import run_log as runlog


def test_a_run_logs_its_units_grams_and_stages(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    run.spectrum("none")
    lines, end = read_log(run.path)
    assert end == (run.path / "log.jsonl").stat().st_size
    assert [(line["stage"], line["event"]) for line in lines if line["event"] in ("start", "end")] == [
        ("collect", "start"),
        ("collect", "end"),
        ("grams", "start"),
        ("grams", "end"),
    ]
    units = [line for line in lines if line["event"] == "unit"]
    assert [line["samples"] for line in units] == [[0, 7], [8, 15], [16, 23]]
    assert all(line["samples_per_s"] > 0 and line["rank"] == 0 and line["pid"] == os.getpid() for line in units)
    assert {line["gram"] for line in lines if line["event"] == "gram"} == set(run.parameters)


def test_what_ended_a_run_is_in_its_log_with_its_message(tmp_path):
    with pytest.raises(sf.errors.NonFiniteError):
        sf.collect(
            tiny_models.regression(),
            tiny_models.vectors(nan_at=5),
            tmp_path / "run.zarr",
            config=sf.SpectralConfig(chunk_size=2),
        )
    last = read_log(tmp_path / "run.zarr")[0][-1]
    assert (last["event"], last["error"]) == ("failed", "NonFiniteError")
    assert "sample 5: the loss is nan" in last["message"]
    assert any(where.startswith("passes.py") for where in last["where"])


def test_warnings_are_logged_and_still_shown(tmp_path):
    with pytest.warns(UserWarning, match="careful"), RunLog(tmp_path, "collect"):
        warnings.warn("careful", stacklevel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = []
        warnings.showwarning = lambda message, *_: shown.append(str(message))
        with RunLog(tmp_path, "collect"):
            warnings.warn("careful now", stacklevel=1)
    assert shown == ["careful now"]
    assert [line["message"] for line in read_log(tmp_path)[0] if line["event"] == "warning"][-1] == "careful now"


def test_torn_lines_and_links_do_no_harm(tmp_path):
    with RunLog(tmp_path, "collect"):
        runlog.event("unit", unit=1)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "un\n[1, 2]\n' + "[" * 100_000 + '\n{"event": "whole"}\n{"event": "not yet')
    lines, _ = read_log(tmp_path)
    assert [line["event"] for line in lines] == ["start", "unit", "end", "whole"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").symlink_to(tmp_path / "target")
    with pytest.warns(UserWarning, match="cannot be written"), RunLog(tmp_path / "other", "collect"):
        runlog.event("unit", unit=1)
    assert not (tmp_path / "target").exists()


def test_a_run_is_followed_until_it_is_complete(tmp_path):
    path, shown = tmp_path / "run.zarr", []
    steps = [
        lambda: make_run(path),
        lambda: None,
        lambda: sf.open_run(path).build_grams(),
    ]
    assert follow(path, shown.append, sleep=lambda _: steps.pop(0)())
    assert shown[0].endswith("not there yet")
    assert any("24 of 24 samples, 0 of 4 Grams" in line for line in shown)
    assert "24 of 24 samples, 4 of 4 Grams" in shown[-1] and not steps


def test_a_run_that_fails_is_not_followed_for_ever(tmp_path, capsys):
    data = "tiny_models:vectors_with_nan_in_sample_5"
    assert cli("run", "tiny_models:regression", data, "--out", tmp_path / "run.zarr", "--chunk-size", 2, "--quiet") == 3
    assert cli("info", tmp_path / "run.zarr", "--watch", "--interval", "0.01") == 2
    shown = capsys.readouterr().out
    assert "4 of 8 samples" in shown and "failed: sample 5" in shown
    assert cli("info", tmp_path / "run.zarr", "--watch", "--interval", "0") == 2
    assert "--interval 0.0" in capsys.readouterr().err


def test_silence_is_said_once(tmp_path):
    run, now, shown = make_run(tmp_path / "run.zarr"), [0.0], []

    def sleep(_):
        now[0] += 200.0
        if now[0] > 1500:
            run.build_grams()

    assert follow(run.path, shown.append, sleep=sleep, clock=lambda: now[0])
    assert sum("nothing has changed for 300 s" in line for line in shown) == 1


def files(run):
    return {str(path) for path in run.rglob("*") if path.is_file() and path.suffix != ".json"}


@pytest.mark.parametrize("options", [{}, {"representation": "factors"}, {"store_centered": True}])
def test_everything_a_marker_stands_for_is_flushed_before_it(options, tmp_path, monkeypatch):
    flushed, marked = [set()], []
    sync, write, place = durable.sync_filesystem, durable.write_json, durable.put_in_place

    def watched(folder):
        sync(folder)
        flushed[0] = files(tmp_path)

    def look(path):
        here = {name for name in files(tmp_path) if not name.endswith((".jsonl", "lock", ".partial"))}
        if not path.name.startswith("manifest.copy"):  # it stands for nothing
            marked.append((path.name, here - flushed[0]))

    def watched_write(path, content):
        look(path)
        write(path, content)

    def watched_place(partial, path):
        look(path)
        place(partial, path)

    monkeypatch.setattr(durable, "sync_filesystem", watched)
    monkeypatch.setattr(durable, "write_json", watched_write)
    monkeypatch.setattr(durable, "put_in_place", watched_place)
    monkeypatch.setattr("streamfisher.collection.waves.write_threads", lambda: 1)  # nothing of the next unit between
    run = make_run(tmp_path / "run.zarr", fsync=True, n_workers=1, **options)
    run.spectrum("none")
    run.eigenvectors("global", 2, block_structure="none")
    names = [name for name, _ in marked]
    expected = {"manifest.json", "rows-000002.json", "gram-first.weight.json", "finished.json"}
    assert expected <= set(names)
    assert [(name, left) for name, left in marked if left] == []


def test_without_fsync_only_markers_are_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "sync_filesystem", lambda folder: pytest.fail("flushed"))
    make_run(tmp_path / "run.zarr").spectrum("none")
    assert json.loads((tmp_path / "run.zarr" / "manifest.json").read_text())["config"]["fsync"] is False
