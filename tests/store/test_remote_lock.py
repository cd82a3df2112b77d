"""Of two writers of a run on an object store one is refused, and told of the other; the dead are followed."""

import json
import socket
import threading
import time
import warnings

import fsspec
import pytest
from s3_server import bucket, s3_server

from streamfisher.errors import RemoteError, RunError
from streamfisher.store import remote_lock
from streamfisher.store.remote_lock import RemoteLock


@pytest.fixture(params=["memory", "s3"])
def url(request):
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]
        yield "memory://bucket/run.zarr"
        memory.store.clear()
    else:
        with s3_server():
            bucket("bucket")
            yield "s3://bucket/run.zarr"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(remote_lock, "_BEAT", 0.05)
    monkeypatch.setattr(remote_lock, "_STALE", 0.5)


def place(url):
    return fsspec.core.url_to_fs(url, use_listings_cache=False)


def turns(url):
    filesystem, root = place(url)
    return sorted(name.rpartition("/")[2] for name in filesystem.ls(f"{root}/writers", detail=False))


def record(url, turn=1, **changes):
    """Write the turn of a process on another host that gave its last sign of life just now, but for `changes`."""
    filesystem, root = place(url)
    content = {"host": "elsewhere", "pid": 4711, "boot": "x", "token": "t", "beat": 3, "time": 0, "released": False}
    filesystem.pipe_file(f"{root}/writers/{turn:06d}.json", json.dumps(content | changes).encode())


def test_the_second_writer_is_refused_and_told_of_the_first(url):
    with RemoteLock(url):
        with pytest.raises(RunError, match=rf"written by process \d+ on {socket.gethostname()}.*sign of life"):
            RemoteLock(url).__enter__()
        assert turns(url) == ["000001.json"]
    with RemoteLock(url) as lock:
        assert turns(url) == ["000002.json"]
        lock.check()


def test_of_many_that_come_at_once_one_gets_it(url, monkeypatch):
    """All have looked and seen nobody before any of them writes."""
    count, got, refused = 6, [], []
    ready = threading.Barrier(count)
    plain = RemoteLock._create
    monkeypatch.setattr(RemoteLock, "_require_conditions", lambda self: None)
    monkeypatch.setattr(RemoteLock, "_create", lambda self, turn: (ready.wait(30), plain(self, turn)))

    def come():
        lock = RemoteLock(url)
        try:
            lock.__enter__()
            got.append(lock)
        except RunError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == count - 1
    got[0].__exit__(None, None, None)


def test_one_who_slept_between_looking_and_writing_is_refused(url, monkeypatch):
    """Another came, left its turn, and a third one came, which removed the turn that the sleeper then makes."""
    sleeper = RemoteLock(url)
    plain = RemoteLock._create

    def sleep_first(turn):
        with RemoteLock(url):
            pass
        third.__enter__()
        assert turns(url) == ["000002.json"]
        plain(sleeper, turn)

    third = RemoteLock(url)
    monkeypatch.setattr(sleeper, "_create", sleep_first)
    with pytest.raises(RunError, match="is being written by"):
        sleeper.__enter__()
    assert turns(url) == ["000002.json"]
    third.__exit__(None, None, None)
    assert third.lost is None


def test_a_writer_that_died_on_this_host_is_followed_at_once(url):
    boot = remote_lock._boot()
    record(url, host=socket.gethostname(), boot=boot, pid=2**22 + 1, token="dead")
    with RemoteLock(url) as lock:
        assert lock.before == "dead" and turns(url) == ["000002.json"]


def test_a_writer_elsewhere_that_gave_a_sign_of_life_just_now_is_not_waited_for(url):
    record(url, time=int(time.time()))
    with pytest.raises(RunError, match="process 4711 on elsewhere"):
        RemoteLock(url).__enter__()


def test_a_writer_elsewhere_that_is_silent_is_followed(url, quick):
    record(url, time=int(time.time()) - 10)
    with warnings.catch_warnings(record=True) as said, RemoteLock(url):
        assert turns(url) == ["000002.json"]
    assert [str(one.message).partition("; ")[2] for one in said][-1] == "taking its turn over."


def test_a_writer_elsewhere_that_lives_is_left_alone_whatever_its_clock_says(url, quick, monkeypatch):
    record(url, time=int(time.time()) - 600)
    monkeypatch.setattr(remote_lock, "_LONG_AGO", 3600)
    alive = threading.Timer(0.1, lambda: record(url, time=int(time.time()) - 600, beat=4))
    alive.start()
    with warnings.catch_warnings(), pytest.raises(RunError, match="process 4711 on elsewhere"):
        warnings.simplefilter("ignore")
        RemoteLock(url).__enter__()
    alive.join()


def test_a_writer_that_was_taken_for_dead_finds_out_and_stops(url, quick):
    with pytest.raises(RunError, match=r"was taken over by process 4711 on elsewhere"), RemoteLock(url) as lock:
        record(url, turn=2)
        lock._heart.join(10)
        with pytest.raises(RunError, match="was taken over"):
            lock.check()
    assert json.loads(place(url)[0].cat_file(f"{place(url)[1]}/writers/000002.json"))["host"] == "elsewhere"


def test_one_that_slept_looks_before_it_goes_on(url, monkeypatch):
    with pytest.raises(RunError, match="was taken over by process 4711"), RemoteLock(url) as lock:
        lock.check()
        record(url, turn=2)
        lock.check()  # it has looked just now
        lock._seen -= 3600
        lock.check()


def test_a_turn_is_renewed(url, quick):
    with RemoteLock(url) as lock:
        time.sleep(0.5)
        assert lock._read(1)["beat"] >= 2
    assert lock._read(1)["released"]


@pytest.mark.parametrize("how", ["takes no condition", "heeds none"])
def test_a_store_without_conditional_puts_is_refused(url, how, monkeypatch):
    filesystem = place(url)[0]
    plain = type(filesystem).pipe_file

    def put(self, path, value, mode="overwrite", **more):
        if how == "takes no condition" and mode == "create":
            raise NotImplementedError("no such mode")
        return plain(self, path, value)

    monkeypatch.setattr(type(filesystem), "pipe_file", put)
    if "s3" in url:  # its instances have a synchronous form of their own
        monkeypatch.setattr(filesystem, "pipe_file", put.__get__(filesystem))
        plain = lambda self, path, value: filesystem.call_s3(  # noqa: E731
            "put_object", Bucket="bucket", Key=path.removeprefix("bucket/"), Body=value
        )
    with pytest.raises(RunError, match=r"has no conditional puts.*--no-lock"):
        RemoteLock(url).__enter__()
    with RemoteLock(url, locked=False) as lock:
        lock.check()


def test_a_store_that_does_not_answer_holds_no_lock(url, monkeypatch):
    lock = RemoteLock(url)

    def lost(self, *args, **options):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(lock, "_create", lambda turn: lost(None))
    with pytest.raises(OSError):
        lock.__enter__()
    filesystem = place(url)[0]
    monkeypatch.setattr(filesystem, "ls", lambda *args, **options: lost(None))
    with pytest.raises(RemoteError, match="does not answer"):
        RemoteLock(url).__enter__()
