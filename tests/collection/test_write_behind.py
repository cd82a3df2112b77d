"""Gradients are written while the next ones are computed: nothing is marked that is not there, and little waits."""

import errno
import threading
import time

import numpy as np
import pytest
import tiny_models
import torch

from streamfisher import SpectralConfig, collect, verify
from streamfisher.planning import run_layout
from streamfisher.sinks.write_behind import WriteBehind
from streamfisher.store.chunks import ChunkWriter
from streamfisher.store.run_store import RunStore

HELD = ["dense", "factors"]


def collected(path, **options):
    options = {"chunk_size": 2, "keep_gradients": ("*",), **options}
    return collect(tiny_models.causal(), tiny_models.sequences(8), path, config=SpectralConfig(**options))


def rows(run):
    return {name: run.store.rows.columns(name, 0, run.parameters[name]) for name in run.parameters}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


class TestUnits:
    """`WriteBehind` alone."""

    def test_a_unit_ends_after_its_last_piece_and_another_may_end_first(self):
        ended, go = [], threading.Event()
        with WriteBehind(threads=2) as writer:
            slow, fast = writer.begin("slow"), writer.begin("fast")
            slow.add(go.wait)
            slow.end(lambda: ended.append("slow"))
            fast.add(lambda: None)
            fast.end(lambda: ended.append("fast"))
            while not ended:
                time.sleep(0.001)
            assert ended == ["fast"]
            go.set()
            writer.settle()
            assert ended == ["fast", "slow"]

    def test_a_unit_without_pieces_ends_at_once(self):
        ended = []
        with WriteBehind(threads=1) as writer:
            writer.begin("empty").end(lambda: ended.append("empty"))
        assert ended == ["empty"]

    def test_it_is_behind_while_pieces_are_not_written(self):
        go = threading.Event()
        with WriteBehind(threads=1) as writer:
            assert not writer.is_behind
            unit = writer.begin("unit")
            unit.add(go.wait)
            unit.end(lambda: None)
            assert writer.is_behind
            go.set()
            writer.settle()
            assert not writer.is_behind

    def test_whoever_brings_more_than_there_is_room_for_waits(self):
        go, through = threading.Event(), []
        with WriteBehind(threads=1, room=10) as writer:
            unit = writer.begin("a unit")
            writer.make_room(100)  # alone, anything fits
            unit.add(go.wait, 8)
            writer.make_room(2)
            waiting = threading.Thread(target=lambda: (writer.make_room(3), through.append(True)))
            waiting.start()
            waiting.join(0.1)
            assert not through
            go.set()
            waiting.join(10)
            assert through
            unit.end(lambda: None)

    def test_a_piece_that_fails_keeps_its_unit_from_ending_and_no_other(self):
        ended, released = [], []

        def full():
            raise OSError(errno.ENOSPC, "No space left on device", "/run/c/1")

        with pytest.raises(OSError, match="while samples 4 to 7 were written") as caught, WriteBehind(1) as writer:
            for start in (0, 4, 8):
                unit = writer.begin(f"samples {start} to {start + 3}")
                unit.add(full if start == 4 else lambda: None)
                unit.end(lambda start=start: ended.append(start), lambda start=start: released.append(start))
                time.sleep(0.05 if start == 4 else 0)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == "/run/c/1"
        assert 0 in ended and 4 not in ended
        assert {0, 4} <= set(released)  # buffers come free whatever becomes of their unit

    def test_an_end_that_fails_is_raised_too(self):
        def fails():
            raise ValueError("no marker")

        with pytest.raises(ValueError, match="no marker"), WriteBehind(threads=1) as writer:
            writer.begin("samples 0 to 3").end(fails)
            writer.settle()

    def test_an_error_of_the_pass_leaves_complete_units_written_and_drops_the_one_at_hand(self):
        ended, pieces = [], []
        with pytest.raises(KeyboardInterrupt), WriteBehind(threads=1) as writer:
            whole, half = writer.begin("whole"), writer.begin("half")
            whole.add(lambda: time.sleep(0.05))
            whole.end(lambda: ended.append("whole"))
            half.add(lambda: pieces.append("half"))
            raise KeyboardInterrupt
        assert ended == ["whole"]
        assert pieces == []


@pytest.mark.parametrize("held", HELD)
def test_a_disk_that_fails_one_write_is_named_with_its_samples_and_the_run_goes_on_to_the_same_bits(
    held, tmp_path, monkeypatch
):
    whole = collected(tmp_path / "whole.zarr", representation=held)
    write, count = ChunkWriter.write, []

    def failing(self, array, index, values):
        count.append(1)
        if len(count) == 12:
            raise OSError(errno.EIO, "Input/output error", str(array))
        return write(self, array, index, values)

    path = tmp_path / "run.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(ChunkWriter, "write", failing)
        with pytest.raises(OSError, match=r"Input/output error while samples \d+ to \d+ were written"):
            collected(path, representation=held)
    store = RunStore(path)
    marked = store.markers.done_units()
    assert 0 < len(store.units) - len(marked) <= 4
    for unit in store.units:
        if unit.index in marked:
            for name in store.parameters:
                store.rows.check_chunks(name, unit)
    assert same(rows(collected(path, representation=held)), rows(whole))


@pytest.mark.parametrize("held", HELD)
def test_a_slow_disk_holds_the_pass_up_instead_of_filling_the_memory(held, tmp_path, monkeypatch):
    write, going, most = ChunkWriter.write, [0], [0]
    lock = threading.Lock()
    mark = RunStore.write_unit

    def slow(self, *arguments):
        time.sleep(0.005)
        return write(self, *arguments)

    begin = WriteBehind.begin

    def begun(self, what):
        with lock:
            going[0] += 1
            most[0] = max(most[0], going[0])
        return begin(self, what)

    def marked(self, record):
        mark(self, record)
        with lock:
            going[0] -= 1

    monkeypatch.setattr(ChunkWriter, "write", slow)
    monkeypatch.setattr(WriteBehind, "begin", begun)
    monkeypatch.setattr(RunStore, "write_unit", marked)
    run = collected(tmp_path / "run.zarr", representation=held, memory_budget="2GB")
    assert run.store.unit_buffers == 2
    assert most[0] <= 2, "one unit is computed while at most one other is written"


def test_writing_goes_on_while_gradients_are_computed(tmp_path, monkeypatch):
    """The first unit cannot be written before the second one is computed: side by side, both are."""
    write, second = ChunkWriter.write, threading.Event()
    begin = WriteBehind.begin

    def begun(self, what):
        if not what.startswith("samples 0 "):
            second.set()
        return begin(self, what)

    def waiting(self, *arguments):
        assert second.wait(60), "the pass waits for the disk"
        return write(self, *arguments)

    monkeypatch.setattr(ChunkWriter, "write", waiting)
    monkeypatch.setattr(WriteBehind, "begin", begun)
    collected(tmp_path / "run.zarr", representation="dense")


def test_where_memory_is_short_of_a_second_unit_there_is_one_and_the_bits_are_the_same(tmp_path, monkeypatch):
    twice = collected(tmp_path / "two.zarr", representation="dense")
    with monkeypatch.context() as patch:
        patch.setattr(run_layout, "written_behind", lambda sizes, limits, keep, segments, waves: (waves, 1))
        once = collected(tmp_path / "one.zarr", representation="dense")
    assert (twice.store.unit_buffers, once.store.unit_buffers) == (2, 1)
    assert same(rows(twice), rows(once))


def test_rounded_rows_are_what_verify_expects(tmp_path):
    assert verify(collected(tmp_path / "run.zarr", representation="dense", bitround=7)) == []


@pytest.mark.slow
def test_parameters_of_several_chunks_are_written_in_pieces(tmp_path):
    """Three parameters of 1.6 million numbers, 4 samples a unit: chunks of 16 MiB, two of each parameter."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1264, 1264, bias=False) for _ in range(3)), torch.nn.Linear(1264, 2))
    data = torch.utils.data.TensorDataset(torch.randn(6, 1264), torch.tensor([0, 1] * 3))
    config = SpectralConfig(chunk_size=4, representation="dense", keep_gradients=("*",))
    run = collect(model, data, tmp_path / "run.zarr", config=config)
    assert len(list((run.path / "gradients" / "0.weight" / "c" / "0").iterdir())) == 2
    for name in ("0.weight", "2.weight"):
        found = run.store.rows.columns(name, 0, run.parameters[name])
        for number, (x, y) in enumerate(data):
            loss = torch.nn.functional.cross_entropy(model(x[None]), y[None])
            expected = torch.autograd.grad(loss, model.get_parameter(name))[0].reshape(-1)
            np.testing.assert_allclose(found[number], expected, rtol=1e-4, atol=1e-7)
    assert verify(run) == []


@pytest.mark.slow
def test_a_disk_that_stalls_for_half_a_minute_costs_half_a_minute(tmp_path, monkeypatch):
    write, stalled = ChunkWriter.write, []

    def stalling(self, *arguments):
        if not stalled:
            stalled.append(True)
            time.sleep(30)
        return write(self, *arguments)

    monkeypatch.setattr(ChunkWriter, "write", stalling)
    run = collected(tmp_path / "run.zarr", representation="dense")
    assert stalled and verify(run) == []
