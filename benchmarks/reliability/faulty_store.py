"""An S3 store on this machine (moto's server), and a proxy before it that fails as networks and loaded services do."""

import http.client
import os
import random
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("503", "cut", "gone", "slow")
BUCKET = "bucket"


@contextmanager
def s3_store(patch):
    """A store with a bucket, as environment variables name it; yields its port."""
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "whence", "AWS_SECRET_ACCESS_KEY": "whence", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    try:
        yield port
    finally:
        S3FileSystem.clear_instance_cache()
        server.stop()


class Faults:
    """What a proxy does to requests: every so many on average fail, in one of `FAULTS`."""

    def __init__(self, every, seed=0, kinds=FAULTS):
        self.every, self.kinds, self.dice = every, kinds, random.Random(seed)
        self.injected = dict.fromkeys(kinds, 0)
        self.lock = threading.Lock()

    def next(self):
        """The fault of the next request, or None."""
        with self.lock:
            if self.dice.random() * self.every >= 1:
                return None
            kind = self.dice.choice(self.kinds)
            self.injected[kind] += 1
            return kind


@contextmanager
def faulty(port, faults):
    """A proxy before a store; yields its port."""

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = faults.next()
            if fault == "503":
                self.send_response(503, "Slow Down")
                answer = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer if self.command != "HEAD" else b"")
                return
            if fault == "slow":
                time.sleep(0.2)
            there = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            there.request(self.command, self.path, body, dict(self.headers))
            answer = there.getresponse()
            data = answer.read()
            there.close()
            if fault == "gone":  # it was done, and nobody heard of it
                self.close_connection = True
                return
            self.send_response(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if fault == "cut" and len(data) > 1 else data)
            if fault == "cut":
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def endpoint(patch, port):
    """Let what follows ask a store at another port."""
    from s3fs import S3FileSystem

    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    S3FileSystem.clear_instance_cache()


def stored(prefix):
    """Bytes of every object below a prefix, by relative name."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
    names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {
        name.removeprefix(f"{prefix}/"): client.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names
    }
