"""What a server tells of itself, and what is no generation."""

from collections import Counter

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from saw_trtllm import __version__
from tests.support.openai_server import serving_engines

USER = {"role": "user", "content": "write a class"}


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server[0], timeout=60) as http:
        yield http


def samples(http):
    """Each value by its name and its model or code, summed over the other labels."""
    found = Counter()
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if "le" not in sample.labels:
                found[sample.name, sample.labels.get("model") or sample.labels.get("code")] += sample.value
    return found


def test_metrics_count_what_was_served(http):
    before = samples(http)
    answer = http.post("/v1/completions", json={"model": "exact", "prompt": "def f(", "max_tokens": 5}).json()
    http.post("/v1/completions", json={"nothing": 1})
    after = samples(http)

    def grown(name, model="exact"):
        return after[name, model] - before[name, model]

    assert grown("saw_requests_total") == 1
    assert grown("saw_prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert grown("saw_generation_tokens_total") >= answer["usage"]["completion_tokens"]
    assert grown("saw_time_to_first_token_seconds_count") == 1
    assert grown("saw_request_seconds_count") == 1
    assert grown("saw_finished_total") == 1
    assert grown("saw_errors_total", "missing_required_parameter") == 1
    assert (after["saw_requests_running", "exact"], after["saw_kv_blocks_max", "exact"]) == (0, 4096 // 32)


def test_what_was_found_again_is_in_the_usage_and_the_metrics(http):
    """A prompt that comes again is found in whole chunks, since the server's texts are deterministic."""
    body = {"model": "exact", "prompt": [10 + i % 80 for i in range(600)], "max_tokens": 4}
    http.post("/v1/completions", json=body)
    before = samples(http)
    usage = http.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 512
    after = samples(http)
    assert after["saw_reused_tokens_total", "exact"] - before["saw_reused_tokens_total", "exact"] == 512
    found = after["saw_reused_tokens_total", "exact"] / after["saw_prompt_tokens_total", "exact"]
    assert after["saw_hit_rate", "exact"] == pytest.approx(found)
    for name in ("stored", "loaded", "disk_written", "disk_read"):
        assert after[f"saw_{name}_blocks_total", "exact"] == after[f"saw_{name}_bytes_total", "exact"] == 0


def test_health_ends_with_the_engine(engine):
    with serving_engines({"example": engine("saw_int4")}) as (url, [model]):
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        model.llm.shutdown()
        assert httpx.get(f"{url}/health", timeout=60).status_code == 503
        response = httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=60)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")


def test_version_and_cache(http):
    assert http.get("/version").json() == {"version": __version__}
    [saw, exact] = http.get("/kv").json()["models"]
    assert (saw["kv"], exact["kv"]) == ("saw_int4", "fp16")
    assert exact["kv_bytes_per_token"] == exact["fp16_bytes_per_token"]
    assert saw["fp16_bytes_per_token"] / saw["kv_bytes_per_token"] == pytest.approx(3.76, abs=0.01)


def test_tokens_there_and_back(http, llms):
    def tokenize(**body):
        return http.post("/tokenize", json=body).json()

    tokenizer = llms["example"].tokenizer
    answer = tokenize(prompt="def f():", return_token_strs=True)
    assert answer["tokens"] == tokenizer.encode("def f():")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 2048)
    assert "".join(answer["token_strs"][1:]) == "def f():"
    assert tokenize(prompt="def f():", add_special_tokens=False)["tokens"] == answer["tokens"][1:]
    assert tokenize(messages=[USER])["tokens"] == llms["example"].chat_prompt([USER])["prompt_token_ids"]
    assert tokenize(prompt="x", messages=[USER])["error"]["param"] == "prompt"
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "<|begin_of_text|>def f():"}
    assert http.post("/detokenize", json={"tokens": [5000]}).json()["error"]["param"] == "tokens"


def test_pages_of_other_sites_are_kept_out_unless_named(http):
    headers = {"origin": "http://elsewhere", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in http.options("/v1/completions", headers=headers).headers
