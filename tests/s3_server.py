"""A server of S3 in this process (moto), for tests that take one."""

import contextlib
import logging
import os
import urllib.request

import pytest

SETTINGS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server():
    """Yield the environment in which programs find an S3 server of this process, and set it here too."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(port=0, ip_address="127.0.0.1", verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = SETTINGS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"")  # what an earlier server held stays
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        yield settings
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        server.stop()


def bucket(name):
    """Make a bucket and return the filesystem that it is in."""
    import s3fs

    filesystem = s3fs.S3FileSystem(use_listings_cache=False)
    filesystem.mkdir(name)
    return filesystem
