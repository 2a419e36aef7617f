"""Asks a server's ensemble for one token now and then, to know that requests still go through it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request

from saw_trtllm.serve import names

#: Seconds without a token after which the canary asks.
_PERIOD = 30.0

#: Series that grow only while texts do: of this project's model, and of TensorRT-LLM's repository.
_PROGRESS = re.compile(r'^(?:saw_generated_tokens_total|nv_inference_count\{model="postprocessing").*$', re.MULTILINE)

#: The request: TensorRT-LLM's ensemble wants the words, where empty ones are none.
_REQUEST = {"text_input": "a", "max_tokens": 1, "bad_words": "", "stop_words": ""}

#: Never through a proxy.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Canary:
    """Watches a server from a thread of its own.

    While texts grow, or requests are answered, it stays silent: users are not disturbed, and an idle server's
    statistics have two small requests more each minute.

    Parameters
    ----------
    url, metrics : str
        Where the server takes HTTP, and where its metrics are.
    timeout : float
        Seconds without an answer or a token after which the server counts as stuck; 0 asks only once.

    Attributes
    ----------
    answered : bool
        Whether the first request went through.
    failure : str or None
        Why the server is unfit, in words that follow "tritonserver ".
    """

    def __init__(self, url: str, metrics: str, timeout: float) -> None:
        self._url = f"{url}/v2/models/{names.ENSEMBLE}/generate"
        self._metrics = metrics
        self._timeout = timeout
        self._closed = threading.Event()
        self.answered = False
        self.failure: str | None = None

    def start(self, patience: float) -> None:
        """Ask for the first time, with so many seconds to answer, and then go on watching."""
        threading.Thread(target=self._run, args=(patience,), name="saw-canary", daemon=True).start()

    def stop(self) -> None:
        """Ask no more. A request that is out ends with the server."""
        self._closed.set()

    def _run(self, patience: float) -> None:
        error = self._ask(patience)
        if error is not None:
            self.failure = f"failed its first request: {error}"
            return
        self.answered = True
        if self._timeout:
            self._watch()

    def _watch(self) -> None:
        progress, alive = self._progress(), time.monotonic()
        while not self._closed.wait(min(_PERIOD, self._timeout)):
            now = self._progress()
            error = None if now != progress else self._ask(self._timeout)
            if error is None or self._progress() != progress:
                progress, alive = self._progress(), time.monotonic()
            elif time.monotonic() - alive > self._timeout:
                self.failure = f"gave neither an answer nor a token for {time.monotonic() - alive:.0f} s: {error}"
                return

    def _ask(self, patience: float) -> str | None:
        """What went wrong with a request, if anything."""
        try:
            with _open(urllib.request.Request(self._url, json.dumps(_REQUEST).encode()), timeout=patience) as response:
                response.read()
        except urllib.error.HTTPError as e:
            text = e.read().decode("utf-8", "replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]
            return " ".join(text.split())
        except TimeoutError:
            return f"no answer within {patience:.0f} s"
        except (OSError, http.client.HTTPException) as e:
            return str(getattr(e, "reason", e)) or type(e).__name__
        return None

    def _progress(self) -> list[str]:
        with contextlib.suppress(OSError, http.client.HTTPException), _open(self._metrics, timeout=5) as response:
            return _PROGRESS.findall(response.read().decode())
        return []
