"""TLS, and clients that read slowly or not at all."""

import json
import logging
import shutil
import socket
import ssl
import subprocess
import time

import httpx
import pytest

from saw_trtllm.cli import serve as saw_serve
from saw_trtllm.serve.openai.app import make_app
from saw_trtllm.serve.openai.model import ServedModel
from tests.support.example import EXAMPLE
from tests.support.openai_server import serving, wait_until_idle
from tests.support.rejection import rejected

LONG = {"model": "exact", "prompt": "def main():", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def errors(caplog):
    """What the server logs that is more than a warning."""
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "saw_trtllm")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno > logging.WARNING]
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def connected(url):
    """A connection to the server."""
    url = httpx.URL(url)
    return socket.create_connection((url.host, url.port), timeout=60)


def posted(body, length=None):
    """A request for a text as it is sent; its body may be said to have another length."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n{body}".encode()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key, and a certificate for localhost that it has signed itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return key, cert


def test_texts_over_tls(certificate, llms):
    key, cert = certificate
    app = make_app([ServedModel("exact", llms["exact"], EXAMPLE)])
    with serving(app, ssl_keyfile=str(key), ssl_certfile=str(cert)) as url:
        assert url.startswith("https://")
        body = {**LONG, "max_tokens": 8}
        with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=cert), timeout=60) as client:
            whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            streamed = client.post("/v1/completions", json={**body, "stream": True}).text
        assert text_of(streamed) == whole
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health", timeout=60)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):  # hung up on, or reset
            httpx.get(f"{url.replace('https', 'http')}/health", timeout=60)


@pytest.mark.parametrize("wrong", ["missing", "another key", "no key", "no certificate"])
def test_a_certificate_that_cannot_be_used(wrong, certificate, engine, tmp_path, capsys):
    key, cert = certificate
    flags = {
        "missing": ["--ssl_keyfile", key, "--ssl_certfile", tmp_path / "none"],
        "another key": ["--ssl_keyfile", cert, "--ssl_certfile", cert],
        "no key": ["--ssl_keyfile", key],
        "no certificate": ["--ssl_ca_certs", cert],
    }[wrong]
    argv = ["--engine_dir", engine("fp16"), "--kv_cache_max_tokens", "256", "--port", "0", *flags]
    assert "--ssl_certfile" in rejected(capsys, saw_serve.main, *argv)


def text_of(stream):
    """The text of a stream's events."""
    events = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_who_does_not_read_holds_up_nobody_and_loses_nothing(url, llms):
    llm, host = llms["exact"], httpx.URL(url)
    body = json.dumps({**LONG, "stream": True, "logprobs": 5}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(60)
        slow.connect((host.host, host.port))
        slow.sendall(head.encode() + body)
        assert b"200 OK" in slow.recv(512)
        with httpx.Client(base_url=url, timeout=60) as client:
            quick = client.post("/v1/completions", json={**LONG, "max_tokens": 4}).json()
            assert quick["usage"]["completion_tokens"] == 4
            wait_until_idle(llm, 120)  # the text is whole, and its blocks are free, before anything of it is read
            whole = client.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
        received = b""
        while piece := slow.recv(1 << 16):
            received += piece
    pieces = [json.loads(line[6:]) for line in received.split(b"\n") if line.startswith(b"data: {")]
    assert whole.endswith("".join(piece["choices"][0]["text"] for piece in pieces))
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("length", "status"), [(1 << 40, 413), (10**19, 413), ("-1", 400), ("many", 400), ("", 400), (10**20, 400)]
)
def test_a_length_that_cannot_be_is_no_error_of_the_server(url, errors, length, status):
    with connected(url) as connection:
        connection.sendall(posted("{}", length))
        assert connection.recv(1 << 16).startswith(f"HTTP/1.1 {status} ".encode())
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200  # what was logged has been by then
    assert errors() == []


@pytest.mark.parametrize("rest", [b"no HTTP\r\n\r\n", None])
def test_a_connection_that_ends_under_several_requests_ends_them(url, llms, errors, rest):
    """By what is no HTTP, as the rest of a body that was longer than it said; or because the client leaves."""
    llm = llms["exact"]
    before = llm.stats().generated_tokens_total
    with connected(url) as connection:
        connection.sendall(posted(json.dumps({**LONG, "max_tokens": 2000, "stream": True})) * 2)
        while not llm.stats().used_blocks:
            time.sleep(0.005)
        if rest is not None:
            connection.sendall(rest)
            while connection.recv(1 << 16):
                pass
    wait_until_idle(llm)
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200
    assert errors() == []
    assert llm.stats().generated_tokens_total - before < 2000
