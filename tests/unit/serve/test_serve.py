"""The Triton models' logic, without Triton."""

import gc
import itertools
import logging
import os
import threading

import numpy as np
import pytest

from saw_trtllm import LLM, GuidedDecodingParams, KvCacheConfig, SamplingParams
from saw_trtllm.errors import EngineError, RankError, RequestError
from saw_trtllm.runtime.stats import Stats
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve import ensemble, metrics, names, tensorrt_llm
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.postprocessing import PostprocessingModel
from saw_trtllm.serve.preprocessing import PreprocessingModel
from saw_trtllm.serve.request import parse
from saw_trtllm.serve.tensorrt_llm import TensorrtLlmModel
from saw_trtllm.serve.triton import load_model
from tests.support.example import EXAMPLE
from tests.support.fakes.triton import Request, SeriesRecorder, i32, model_config, pb_utils, strings
from tests.support.tolerance import EPS
from tests.support.turns import held_steps

PROMPT = "def read_config(path):"
UNICODE = "naïve café, 日本語 and 🎉👩‍🚀 emoji"
SAMPLED = {"temperature": np.float32(5), "runtime_top_k": 1000, "seed": 1}


@pytest.fixture(scope="module")
def engine_dir(engine):
    return engine("saw_int4")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(EXAMPLE)


@pytest.fixture(scope="module")
def llm(engine_dir):
    with LLM(engine_dir, kv_cache_config=KvCacheConfig(deterministic=True)) as llm:
        yield llm


@pytest.fixture(scope="module", autouse=True)
def addresses():
    """Every model of these tests is a server of its own; an ensemble asks the one that was made last."""
    numbers, address = itertools.count(), "\0saw_test_{}_{}"
    with pytest.MonkeyPatch.context() as patch:
        last = []

        def made(model):
            last[:] = [address.format(os.getpid(), next(numbers))]
            return last[0]

        patch.setattr(tensorrt_llm, "engine_address", made)
        patch.setattr(ensemble, "engine_address", lambda model: last[0])
        yield


@pytest.fixture(scope="module")
def model(engine_dir):
    model = TensorrtLlmModel(
        pb_utils, Parameters(gpt_model_path=engine_dir, stats_check_period_ms=10, deterministic=True)
    )
    yield model
    model.finalize()


@pytest.fixture(scope="module")
def preprocessing():
    return PreprocessingModel(pb_utils, Parameters(tokenizer_dir=EXAMPLE))


@pytest.fixture(scope="module")
def postprocessing():
    return PostprocessingModel(pb_utils, Parameters(tokenizer_dir=EXAMPLE))


def llm_inputs(ids, max_tokens=8, **more):
    """Inputs of tensorrt_llm for one prompt."""
    tensors = {"input_ids": i32(ids), "input_lengths": i32([len(ids)]), "request_output_len": i32([max_tokens])}
    return tensors | {k: v if isinstance(v, np.ndarray) else np.array([[v]]) for k, v in more.items()}


def code_of(response):
    return response.error and response.error.code


# preprocessing


def test_preprocessing_tokenizes_and_fills_up(preprocessing, tokenizer):
    prompts = ["a", UNICODE]
    request = Request({"QUERY": strings(*[[p] for p in prompts]), "REQUEST_OUTPUT_LEN": i32([3], [4])})
    [response] = preprocessing.execute([request])
    expected = [tokenizer.encode(p) for p in prompts]
    out = response.tensors
    assert out["REQUEST_INPUT_LEN"].tolist() == [[len(e)] for e in expected]
    assert [row[: len(e)].tolist() for row, e in zip(out["INPUT_ID"], expected, strict=True)] == expected
    assert out["INPUT_ID"].shape == (2, max(map(len, expected)))
    assert out["REQUEST_OUTPUT_LEN"].tolist() == [[3], [4]]
    assert out["OUT_END_ID"].tolist() == [[tokenizer.eos_ids[0]]] * 2


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"QUERY": strings([""])}, "the prompt is empty"),
        ({"QUERY": strings([b"ok \xff\xfe"])}, "the prompt is not valid UTF-8 at byte 3"),
        ({"QUERY": strings(["x"]), "BAD_WORDS_DICT": strings([b"\xff"])}, "bad_words is not valid UTF-8"),
        ({"QUERY": strings(["x"]), "STOP_WORDS_DICT": strings([b"\xff"])}, "stop_words is not valid UTF-8"),
    ],
)
def test_preprocessing_answers_a_bad_request_and_the_others(preprocessing, tensors, sentence):
    good = Request({"QUERY": strings(["x"]), "REQUEST_OUTPUT_LEN": i32([1])})
    bad = Request({"REQUEST_OUTPUT_LEN": i32([1]), **tensors})
    responses = preprocessing.execute([good, bad, good])
    assert [code_of(r) for r in responses] == [None, "INVALID_ARG", None]
    assert sentence in responses[1].error.message


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"priority": 1, "timeout": 5, "triton_enable_empty_final_response": True}, None),
        ({"Streaming": False}, None),  # TensorRT-LLM's own client sends it with every request
        ({"user": "me", "model": "llama"}, None),
        ({"temprature": 0.5}, "temprature, which this model does not know: if the input temperature is meant"),
        ({"max_new_tokens": 5}, "max_new_tokens, which this model does not know: if the input max_tokens is meant"),
        ({"lora_task_id": 1}, "lora_task_id is not supported"),
        ({"user": "me", "lora_config": "{}"}, "lora_config is not supported"),
    ],
)
def test_request_parameters_that_may_have_been_meant_as_options_are_rejected(preprocessing, parameters, sentence):
    tensors = {"QUERY": strings(["x"]), "REQUEST_OUTPUT_LEN": i32([1])}
    [response] = preprocessing.execute([Request(tensors, **parameters)])
    assert code_of(response) == (sentence and "INVALID_ARG")
    assert sentence is None or sentence in response.error.message


def test_preprocessing_gives_all_that_tensorrt_llms_does(preprocessing, model):
    # Who calls the three models in turn hands these on.
    out = preprocessing.tokenize({"QUERY": strings(["x"], ["y z"]), "REQUEST_OUTPUT_LEN": i32([2], [2])})
    assert out.keys() == {t.name for t in names.PREPROCESSING_MODEL.outputs}
    assert out["STOP_WORDS_IDS"].shape == out["BAD_WORDS_IDS"].shape == (2, 2, 0)
    assert out["EMBEDDING_BIAS"].shape == (2, 0)
    assert out["DECODER_INPUT_ID"].tolist() == out["OUT_PAD_ID"].tolist()
    assert out["REQUEST_DECODER_INPUT_LEN"].tolist() == [[1], [1]]
    tensors = {
        "input_ids": out["INPUT_ID"],
        "input_lengths": out["REQUEST_INPUT_LEN"],
        "request_output_len": out["REQUEST_OUTPUT_LEN"],
        "stop_words_list": out["STOP_WORDS_IDS"],
        "bad_words_list": out["BAD_WORDS_IDS"],
        "embedding_bias": out["EMBEDDING_BIAS"],
        "decoder_input_ids": out["DECODER_INPUT_ID"],
        "decoder_input_lengths": out["REQUEST_DECODER_INPUT_LEN"],
    }
    [responses] = run(model, Request(tensors))
    assert [code_of(r) for r in responses] == [None, None]


def test_a_prompt_that_is_too_long_is_not_tokenized_to_its_end(engine_dir, monkeypatch):
    model = PreprocessingModel(pb_utils, Parameters(gpt_model_path=engine_dir))
    encode = model._tokenizer.encode

    def encode_some(text, *args):
        assert len(text) < 10**6
        return encode(text, *args)

    monkeypatch.setattr(model._tokenizer, "encode", encode_some)
    prompts = strings(["x"], ["word " * 10**6])
    [response] = model.execute([Request({"QUERY": prompts, "REQUEST_OUTPUT_LEN": i32([1], [1])})])
    assert code_of(response) == "INVALID_ARG"
    assert "5000000 bytes, too many for the 2047 tokens" in response.error.message


def test_a_batch_is_never_filled_up_beyond_the_longest_prompt_that_fits(engine_dir):
    model = PreprocessingModel(pb_utils, Parameters(gpt_model_path=engine_dir))
    prompts = strings(*[["x"]] * 63, ["x1" * 4000])
    [response] = model.execute([Request({"QUERY": prompts, "REQUEST_OUTPUT_LEN": i32(*[[1]] * 64)})])
    assert code_of(response) == "INVALID_ARG"
    assert "tokens and the engine takes 2047" in response.error.message


@pytest.mark.parametrize("kind", ["stop", "bad"])
def test_words_survive_the_way_through_word_lists(preprocessing, tokenizer, kind):
    words = ["\n\n", "", UNICODE, "end"]
    request = {"QUERY": strings(["x"], ["y"]), "REQUEST_OUTPUT_LEN": i32([1], [1])}
    lists = preprocessing.tokenize(request | {f"{kind.upper()}_WORDS_DICT": strings(words, ["", "", "", "stop"])})
    inputs = {"input_ids": i32([1], [1]), "input_lengths": i32([1], [1]), "request_output_len": i32([1], [1])}
    parsed = parse(inputs | {f"{kind}_words_list": lists[f"{kind.upper()}_WORDS_IDS"]})
    expected = [[tokenizer.encode(w, False) for w in words if w], [tokenizer.encode("stop", False)]]
    assert [getattr(g.params, f"{kind}_token_sequences") for g in parsed] == expected


# postprocessing


def test_a_text_is_handed_on(postprocessing, tokenizer):
    """It is the runtime's: what the tokens alone would give lacks what came before them."""
    tensors = {"TOKENS_BATCH": i32([tokenizer.encode("a", False)]), "SEQUENCE_LENGTH": i32([1])}
    assert postprocessing.detokenize(tensors | {"TEXT": strings([UNICODE])}).tolist() == [UNICODE.encode()]
    assert postprocessing.detokenize(tensors | {"TEXT": np.empty((1, 0), object)}).tolist() == [b"a"]


def test_postprocessing_without_options_decodes(postprocessing, tokenizer):
    ids = tokenizer.encode(UNICODE, False)
    [response] = postprocessing.execute(
        [Request({"TOKENS_BATCH": i32([ids], [ids]).reshape(2, 1, -1), "SEQUENCE_LENGTH": i32([len(ids)], [2])})]
    )
    assert response.tensors["OUTPUT"].tolist() == [UNICODE.encode(), tokenizer.decode(ids[:2]).encode()]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"SEQUENCE_LENGTH": i32([1])}, "the request has no TOKENS_BATCH: the model postprocessing needs it"),
        ({"TOKENS_BATCH": i32([[66]])}, "the request has no SEQUENCE_LENGTH"),
        ({"TOKENS_BATCH": i32().reshape(0, 1, 3), "SEQUENCE_LENGTH": i32().reshape(0, 1)}, "TOKENS_BATCH has no rows"),
        ({"TOKENS_BATCH": i32([[66]]), "SEQUENCE_LENGTH": i32([1], [1])}, "SEQUENCE_LENGTH has 2 rows for 1 prompts"),
        ({"TOKENS_BATCH": i32([66]), "SEQUENCE_LENGTH": i32([1])}, "TOKENS_BATCH has the shape [1, 1]: it must be"),
        ({"TOKENS_BATCH": i32([[66], [67]]), "SEQUENCE_LENGTH": i32([1])}, "it must have one beam"),
        ({"TOKENS_BATCH": i32([[66]]), "SEQUENCE_LENGTH": i32([2])}, "SEQUENCE_LENGTH goes from 2 to 2"),
        ({"TOKENS_BATCH": i32([[66]]), "SEQUENCE_LENGTH": i32([-1])}, "SEQUENCE_LENGTH goes from -1 to -1"),
        ({"TOKENS_BATCH": i32([[66, -5]]), "SEQUENCE_LENGTH": i32([2])}, "TOKENS_BATCH holds the token -5"),
        (
            {"TOKENS_BATCH": i32([[66]]), "SEQUENCE_LENGTH": i32([1]), "TEXT": strings(["a", "b"])},
            "TEXT holds 2 strings for 1 texts",
        ),
    ],
)
def test_inputs_that_do_not_fit_together_get_one_sentence(postprocessing, tensors, sentence):
    [response] = postprocessing.execute([Request(tensors)])
    assert code_of(response) == "INVALID_ARG"
    assert sentence in response.error.message


def test_a_failure_of_the_model_itself_is_one_sentence(postprocessing, monkeypatch):
    monkeypatch.setattr(postprocessing, "detokenize", lambda tensors: {}["a\nb"])
    [response] = postprocessing.execute([Request({"TOKENS_BATCH": i32([[66]]), "SEQUENCE_LENGTH": i32([1])})])
    assert code_of(response) == "INTERNAL"
    assert response.error.message == r"the model failed (KeyError: 'a\nb')"


# Requests


def test_options_become_sampling_params():
    options = {
        "temperature": np.float32(0.5),
        "runtime_top_k": 5,
        "runtime_top_p": np.float32(0.25),
        "seed": np.uint64(2**64 - 1),
        "min_tokens": 2,
        "repetition_penalty": np.float32(1.5),
        "presence_penalty": np.float32(0.5),
        "frequency_penalty": np.float32(0.125),
        "end_id": -1,
        "pad_id": 0,
        "stop_words": strings(["", "end", UNICODE]),
        "stop_words_list": np.array([[[7, 8, 9, 0], [1, 3, -1, -1]]]),
        "bad_words": strings(["", "never"]),
        "bad_words_list": np.array([[[4, 5], [2, -1]]]),
        "return_log_probs": True,
        "return_perf_metrics": False,
        "streaming": True,
        "beam_width": 1,
        "len_penalty": np.float32(0),
        "num_return_sequences": 3,
        "return_num_output_tokens": True,
    }
    [g] = parse(llm_inputs([3, 4, 5], **options))
    assert g.params == SamplingParams(
        max_tokens=8,
        min_tokens=2,
        temperature=0.5,
        top_k=5,
        top_p=0.25,
        seed=2**64 - 1,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.125,
        end_id=-1,
        stop=["end", UNICODE],
        stop_token_sequences=[[7], [8, 9]],
        bad=["never"],
        bad_token_sequences=[[4, 5]],
        n=3,
        logprobs=True,
    )
    assert (g.prompt, g.streaming, g.include_input) == ([3, 4, 5], True, False)
    assert (g.return_num_input_tokens, g.return_num_output_tokens) == (False, True)


@pytest.mark.parametrize(
    ("kind", "guide", "expected"),
    [
        ("json", None, {"json_object": True}),
        ("json_schema", '{"type": "integer"}', {"json": '{"type": "integer"}'}),
        ("regex", "a+", {"regex": "a+"}),
    ],
)
def test_a_guide_becomes_guided_decoding(kind, guide, expected):
    options = {"guided_decoding_guide_type": strings([kind])}
    options |= {} if guide is None else {"guided_decoding_guide": strings([guide])}
    [g] = parse(llm_inputs([3], **options))
    assert g.params.guided_decoding == GuidedDecodingParams(**expected)


def test_prompts_of_the_same_salt_find_each_other(model, tokenizer):
    ids = tokenizer.encode(PROMPT) + [5, 6, 7] * 200

    def reused(**options):
        [[response]] = run(model, Request(llm_inputs(ids, 2, return_num_reused_tokens=True, **options)))
        return response.tensors["num_reused_tokens"].item()

    first, theirs = strings(["a tenant's"]), strings(["another's"])
    assert [reused(cache_salt=salt) for salt in (first, theirs, first)] == [0, 0, 512]


def test_defaults_are_greedy_and_0_switches_top_k_and_top_p_off():
    [g] = parse(llm_inputs([3], max_tokens=4))
    assert g.params == SamplingParams(max_tokens=4)
    assert g.params.greedy
    [g] = parse(llm_inputs([3], max_tokens=4, runtime_top_k=0, runtime_top_p=np.float32(0)))
    assert g.params == SamplingParams(max_tokens=4)


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({"temperature": np.float32(0.7)}, True),
        ({"temperature": np.float32(0.7), "runtime_top_k": 0, "runtime_top_p": np.float32(0)}, True),
        ({"temperature": np.float32(0.7), "runtime_top_k": 40}, False),
        ({"temperature": np.float32(0.7), "runtime_top_p": np.float32(0.9)}, False),
    ],
)
def test_a_temperature_without_top_k_and_top_p_is_greedy(options, greedy):
    # As in TensorRT-LLM's executor, whose top_k and top_p are 0 by default: it takes that for top_k 1.
    assert parse(llm_inputs([3], max_tokens=4, **options))[0].params.greedy is greedy


@pytest.mark.parametrize(
    ("default", "options", "included"),
    [
        (False, {}, True),
        (True, {}, False),
        (True, {"exclude_input_in_output": False}, True),
        (False, {"exclude_input_in_output": True}, False),
        (False, {"streaming": True}, False),
        (False, {"streaming": True, "exclude_input_in_output": False}, False),
    ],
)
def test_when_the_prompt_is_part_of_the_output(default, options, included):
    [g] = parse(llm_inputs([3], **options), exclude_input_in_output=default)
    assert g.include_input is included


@pytest.mark.parametrize(
    ("older", "newer", "field"), [("min_length", "min_tokens", "min_tokens"), ("random_seed", "seed", "seed")]
)
def test_older_names(older, newer, field):
    assert getattr(parse(llm_inputs([3], **{older: 4}))[0].params, field) == 4
    assert getattr(parse(llm_inputs([3], **{older: 4, newer: 4}))[0].params, field) == 4
    with pytest.raises(RequestError, match=f"{newer} is 5 and {older}, its older name, 4"):
        parse(llm_inputs([3], **{older: 4, newer: 5}))


BAD_INPUTS = [
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": -5}, "max_tokens is -5"),
    ({"temperature": np.float32("nan")}, "temperature is nan"),
    ({"temperature": np.float32("inf")}, "temperature is inf"),
    ({"temperature": np.float32(-1)}, "temperature is -1"),
    ({"runtime_top_k": -1}, "top_k is -1"),
    ({"runtime_top_p": np.float32(1.5)}, "top_p is 1.5"),
    ({"repetition_penalty": np.float32(0)}, "repetition_penalty is 0"),
    ({"min_tokens": 9}, "min_tokens is 9"),
    ({"guided_decoding_guide": strings(["a"])}, "type is None and guided_decoding_guide is given"),
    ({"guided_decoding_guide_type": strings(["regex"])}, "type is 'regex' and guided_decoding_guide is not"),
    ({"guided_decoding_guide_type": strings(["ebnf_grammar"])}, "give json alone, or json_schema or regex with one"),
    ({"beam_width": 4}, "beam_width is 4, which is not supported"),
    ({"num_return_sequences": 0}, "n is 0"),
    ({"return_perf_metrics": True}, "return_perf_metrics is True, which is not supported: the server's metrics have"),
    ({"len_penalty": np.float32(0.5)}, "len_penalty is 0.5"),
    ({"bad_words_list": np.array([[[5], [2]]])}, "bad_words_list ends its words at"),
    ({"stop_words_list": np.array([[[5, 6], [2, 1]]])}, "stop_words_list ends its words at"),
    ({"stop_words_list": np.array([[[5, 6], [1, 3]]])}, "stop_words_list ends its words at"),
    ({"stop_words": strings([b"\xff"])}, "stop_words is not valid UTF-8"),
    ({"stop_words": strings(["x" * 300_000])}, "stop holds 1 stops of 300000 bytes in all"),
    ({"prompt": strings([b"\xff"])}, "prompt is not valid UTF-8"),
    ({"input_lengths": 4}, "input_lengths is 4"),
    ({"input_lengths": -1}, "input_lengths is -1"),
    ({"input_lengths": 0}, "the prompt is empty"),
    ({"streaming": np.array([[True], [False]])}, "streaming has 2 rows for 1 prompts"),
    ({"ids": [70] * 3000}, "the prompt has 3000 tokens"),
    ({"max_tokens": 2048}, "max_tokens 2048"),
    ({"ids": [5000]}, "5000"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD_INPUTS)
def test_bad_input_is_answered_in_one_sentence(model, options, sentence):
    options = dict(options)
    request = Request(llm_inputs(options.pop("ids", [70, 71]), options.pop("max_tokens", 8), **options))
    model.execute([request])
    [response] = request.sender.wait_final()
    assert code_of(response) == "INVALID_ARG"
    assert sentence in response.error.message
    assert "\n" not in response.error.message


# tensorrt_llm


def run(model, *requests, waited_for=None):
    model.execute(list(requests))
    return [r.sender.wait_final() for r in (requests if waited_for is None else waited_for)]


def text_of(postprocessing, responses):
    """What the ensemble makes of the responses of tensorrt_llm."""
    step = names.STEPS[-1]
    wiring = {ours: theirs for theirs, ours in names.STEPS[1].outputs.items()}
    text = b""
    for r in responses:
        assert r.error is None, r.error.message
        [out] = postprocessing.execute([Request({k: r.tensors[wiring[v]] for k, v in step.inputs.items()})])
        text += out.tensors["OUTPUT"][0]
    return text.decode()


@pytest.mark.parametrize("prompt", [PROMPT, UNICODE])
@pytest.mark.parametrize(
    "options",
    [
        {},
        SAMPLED,
        {"stop_words": strings(["e", "zz"])},
        {"end_id": -1},
    ],
    ids=lambda o: "-".join(o) or "greedy",
)
def test_text_is_that_of_the_runtime(model, llm, postprocessing, tokenizer, prompt, options):
    ids = tokenizer.encode(prompt)
    params = parse(llm_inputs(ids, 24, **options))[0].params
    expected = llm.generate(ids, params).outputs[0]
    streamed, whole, with_prompt = run(
        model,
        Request(llm_inputs(ids, 24, streaming=True, **options)),
        Request(llm_inputs(ids, 24, exclude_input_in_output=True, **options)),
        Request(llm_inputs(ids, 24, **options)),
    )
    assert text_of(postprocessing, streamed) == expected.text
    assert text_of(postprocessing, whole) == expected.text
    assert text_of(postprocessing, with_prompt) == tokenizer.decode(ids) + expected.text
    assert [t for r in streamed for t in r.tensors["output_ids"][0, 0]] == expected.token_ids
    assert with_prompt[0].tensors["output_ids"][0, 0].tolist() == ids + expected.token_ids
    assert len(whole) == len(with_prompt) == 1


def test_the_output_begins_with_the_prompt_as_it_was_sent(model, llm, postprocessing, tokenizer):
    """A client cuts the prompt's length off; the tokens' text would lack the special ones."""
    prompt = f"<|end_of_text|>{PROMPT}"
    ids = tokenizer.encode(prompt)
    assert tokenizer.decode(ids) == PROMPT
    text = llm.generate(prompt, SamplingParams(max_tokens=8)).outputs[0].text
    whole, streamed = run(
        model,
        Request(llm_inputs(ids, prompt=prompt.encode())),
        Request(llm_inputs(ids, prompt=prompt.encode(), streaming=True)),
    )
    assert text_of(postprocessing, whole) == prompt + text
    assert text_of(postprocessing, streamed) == text


@pytest.mark.parametrize(
    "options",
    [{}, {"stop_words": strings(["e", "zz"])}, SAMPLED],
)
def test_pieces_that_have_piled_up_go_out_as_one(model, llm, postprocessing, tokenizer, options):
    """While Triton takes no response, a text goes on; its pieces make the next one."""
    ids, options = (
        tokenizer.encode(UNICODE),
        {**options, "end_id": -1, "return_log_probs": True, "return_generation_logits": True},
    )
    params = parse(llm_inputs(ids, 60, **options))[0].params
    expected = llm.generate(ids, params).outputs[0]
    slow, fast = (Request(llm_inputs(ids, 60, streaming=True, **options)) for _ in range(2))
    slow.sender.taken.clear()
    run(model, slow, fast, waited_for=[fast])
    slow.sender.taken.set()
    streamed = slow.sender.wait_final()
    assert text_of(postprocessing, streamed) == expected.text
    assert [t for r in streamed for t in r.tensors["output_ids"][0, 0]] == expected.token_ids
    logprobs = [x for r in streamed for x in r.tensors["output_log_probs"][0, 0]]
    assert logprobs == pytest.approx(expected.logprobs, rel=EPS)
    logits = np.concatenate([r.tensors["generation_logits"][0, 0] for r in streamed])
    np.testing.assert_array_equal(logits, expected.generation_logits)
    assert len(streamed) <= max(3, len(expected.token_ids) // 2)


def test_results_that_were_asked_for(model, llm, tokenizer):
    ids = tokenizer.encode(PROMPT)
    asked = ("log_probs", "context_logits", "generation_logits")
    asked += ("num_input_tokens", "num_output_tokens", "num_reused_tokens")
    options = {f"return_{name}": True for name in asked}
    whole, streamed, plain = run(
        model,
        Request(llm_inputs(ids, 6, **options)),
        Request(llm_inputs(ids, 6, streaming=True, **options)),
        Request(llm_inputs(ids, 6)),
    )
    expected = llm.generate(
        ids, SamplingParams(max_tokens=6, logprobs=True, return_context_logits=True, return_generation_logits=True)
    )
    completion = expected.outputs[0]
    results = {t.name for t in names.RESULTS}
    assert not results & plain[0].tensors.keys()
    assert results - whole[0].tensors.keys() == {"batch_index", "sequence_index"}
    out = whole[0].tensors
    np.testing.assert_array_equal(out["context_logits"], expected.context_logits[None])
    np.testing.assert_array_equal(out["generation_logits"], completion.generation_logits[None, None])
    np.testing.assert_allclose(out["output_log_probs"], [[completion.logprobs]], rtol=EPS)
    np.testing.assert_allclose(out["cum_log_probs"], [[sum(completion.logprobs)]], rtol=EPS)
    assert (out["num_input_tokens"].tolist(), out["num_output_tokens"].tolist()) == ([[len(ids)]], [[6]])
    assert out["num_reused_tokens"].tolist() == [[0]]  # a prompt whose logits are wanted is computed whole
    pieces = [r.tensors for r in streamed]
    np.testing.assert_allclose(
        np.concatenate([p["output_log_probs"][0, 0] for p in pieces]), completion.logprobs, rtol=EPS
    )
    np.testing.assert_allclose(pieces[-1]["cum_log_probs"], [[sum(completion.logprobs)]], rtol=EPS)
    assert sum(p["num_output_tokens"].item() for p in pieces) == 6
    # Each response has the logits of its own tokens; the prompt's come once.
    logits = [p["generation_logits"] for p in pieces]
    assert [p.shape[:3] for p in logits] == [(1, 1, p["output_ids"].shape[2]) for p in pieces]
    np.testing.assert_array_equal(np.concatenate([p[0, 0] for p in logits]), completion.generation_logits)
    assert ["context_logits" in p for p in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("streaming", [False, True])
def test_several_prompts_in_one_request(model, llm, preprocessing, postprocessing, streaming):
    prompts = [PROMPT, "The module provides", "x"]
    pre = preprocessing.tokenize(
        {"QUERY": strings(*[[p] for p in prompts]), "REQUEST_OUTPUT_LEN": i32([5], [10], [15])}
    )
    tensors = {
        "input_ids": pre["INPUT_ID"],
        "input_lengths": pre["REQUEST_INPUT_LEN"],
        "request_output_len": pre["REQUEST_OUTPUT_LEN"],
        "streaming": np.full((3, 1), streaming),
        "exclude_input_in_output": np.full((3, 1), True),
    }
    [responses] = run(model, Request(tensors))
    assert streaming or len(responses) == 3
    for i, (prompt, max_tokens) in enumerate(zip(prompts, (5, 10, 15), strict=True)):
        mine = [r for r in responses if r.tensors["batch_index"].tolist() == [[i]]]
        assert all(r.tensors["sequence_index"].tolist() == [[0]] for r in mine)
        expected = llm.generate(prompt, SamplingParams(max_tokens=max_tokens)).outputs[0].text
        assert text_of(postprocessing, mine) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_several_texts_for_each_of_several_prompts(model, llm, postprocessing, tokenizer, streaming):
    ids = tokenizer.encode(PROMPT)
    options = {**SAMPLED, "num_return_sequences": 2, "exclude_input_in_output": True}
    two = {k: np.repeat(v, 2, axis=0) for k, v in llm_inputs(ids, 8, streaming=streaming, **options).items()}
    two["input_lengths"][1] -= 1
    [responses] = run(model, Request(two))
    assert streaming or len(responses) == 4
    for i, prompt in enumerate((ids, ids[:-1])):
        params = parse(llm_inputs(prompt, 8, **options))[0].params
        for n, expected in enumerate(llm.generate(prompt, params).outputs):
            place = {"batch_index": [[i]], "sequence_index": [[n]]}
            mine = [r for r in responses if {k: r.tensors[k].tolist() for k in place} == place]
            assert text_of(postprocessing, mine) == expected.text


def test_bad_words_do_not_come(model, llm, postprocessing, tokenizer):
    ids = tokenizer.encode(PROMPT)
    free = llm.generate(ids, SamplingParams(max_tokens=24)).outputs[0]
    run_of_two, word = free.token_ids[3:5], free.text.split()[0]
    lists = np.array([[run_of_two, [2, -1]]], np.int32)
    [by_word], [by_run] = run(
        model,
        Request(llm_inputs(ids, 24, bad_words=strings(["", word]), exclude_input_in_output=True)),
        Request(llm_inputs(ids, 24, bad_words_list=lists, exclude_input_in_output=True)),
    )
    assert word in free.text
    assert word not in text_of(postprocessing, [by_word]).split()
    tokens = by_run.tensors["output_ids"][0, 0].tolist()
    assert tokens[:4] == free.token_ids[:4]
    assert run_of_two not in [tokens[i : i + 2] for i in range(len(tokens))]


def test_one_bad_prompt_spoils_its_request_only(model, llm, postprocessing, tokenizer):
    ids = tokenizer.encode(PROMPT)
    two = {k: np.repeat(v, 2, axis=0) for k, v in llm_inputs(ids, 8, streaming=True).items()}
    two["request_output_len"][1] = 0
    bad, good = run(model, Request(two), Request(llm_inputs(ids, 8, streaming=True)))
    assert [code_of(r) for r in bad] == ["INVALID_ARG"]
    assert text_of(postprocessing, good) == llm.generate(PROMPT, SamplingParams(max_tokens=8)).outputs[0].text


def test_many_requests_at_once(model, llm, postprocessing, tokenizer):
    prompts = [f"{i} {PROMPT}" for i in range(48)]
    requests = [Request(llm_inputs(tokenizer.encode(p), 6, streaming=True)) for p in prompts]
    answers = run(model, *requests)
    expected = llm.generate(prompts, SamplingParams(max_tokens=6))
    assert [text_of(postprocessing, a) for a in answers] == [e.outputs[0].text for e in expected]


LONG = {"max_tokens": 1500, "streaming": True, "end_id": -1}


def cancel_by_sender(model, request):
    request.sender.cancelled = True


def cancel_by_id(model, request):
    run(model, Request(llm_inputs([1], stop=True), request_id="mine"))


@pytest.mark.parametrize(("cancel", "code"), [(cancel_by_sender, "CANCELLED"), (cancel_by_id, None)])
def test_cancellation(model, tokenizer, cancel, code):
    ids = tokenizer.encode(PROMPT)
    request = Request(llm_inputs(ids, **LONG), request_id="mine")
    other = Request(llm_inputs(ids, 40, streaming=True, end_id=-1), request_id="another")
    with held_steps(model._llm, first=20) as held:
        model.execute([request, other])
        request.sender.wait_responses(1)
        cancel(model, request)
        assert held.aborted.wait(60)
    responses = request.sender.wait_final()
    assert [code_of(r) for r in responses[:-1]] == [None] * (len(responses) - 1)
    assert code_of(responses[-1]) == code
    assert len(responses) < 1500
    ids_of_other = [t for r in other.sender.wait_final() for t in r.tensors["output_ids"][0, 0]]
    assert len(ids_of_other) == 40


def test_stop_of_an_unknown_request_is_harmless(model):
    [[response]] = run(model, Request(llm_inputs([1], stop=True), request_id="no such"))
    assert response.error is None
    assert response.tensors == {}


def test_failure_of_the_runtime_is_answered(engine_dir, tokenizer, monkeypatch):
    model = TensorrtLlmModel(pb_utils, Parameters(gpt_model_path=engine_dir))
    ids = tokenizer.encode(PROMPT)
    execute = model._llm._core._executor.execute
    monkeypatch.setattr(model._llm._core._executor, "execute", lambda *a: 1 / 0)
    [failed] = run(model, Request(llm_inputs(ids)))
    assert failed[-1].error.message
    assert code_of(failed[-1]) == EngineError.triton_code
    monkeypatch.setattr(model._llm._core._executor, "execute", execute)
    [fine] = run(model, Request(llm_inputs(ids)))
    assert fine[0].error is None
    model.finalize()


def test_more_requests_than_may_wait_are_unavailable(engine_dir, tokenizer):
    """Those of one request too; those that wait are answered."""
    model = TensorrtLlmModel(pb_utils, Parameters(gpt_model_path=engine_dir, max_queue_size=2))
    requests = [Request(llm_inputs(tokenizer.encode(PROMPT), 4)) for _ in range(4)]
    with held_steps(model._llm) as held:
        model.execute(requests[:1])
        assert held.begun.wait(60)
        model.execute(requests[1:])
        full = requests[3].sender.wait_final()[-1]
    assert code_of(full) == "UNAVAILABLE"
    assert "2 requests wait already, and max_queue_size is 2" in full.error.message
    for request in requests[:3]:
        assert request.sender.wait_final()[0].error is None
    model.finalize()


def test_a_rank_that_is_lost_is_told_from_what_a_client_did(engine_dir, tokenizer, monkeypatch):
    model = TensorrtLlmModel(pb_utils, Parameters(gpt_model_path=engine_dir))
    executor, steps = model._llm._core._executor, itertools.count()
    execute = executor.execute

    def lose(*args):
        if next(steps) == 2:  # a text that has begun
            raise RankError("rank 1 was lost")
        return execute(*args)

    monkeypatch.setattr(executor, "execute", lose)
    request = Request(llm_inputs(tokenizer.encode(PROMPT), 4))
    model.execute([request])
    final = request.sender.wait_final()[-1]
    assert code_of(final) == "UNAVAILABLE"
    assert final.error.message.startswith("rank 1 was lost while it computed this request: send it again")
    model.finalize()


def test_finalize_ends_what_runs(engine_dir, tokenizer):
    model = TensorrtLlmModel(pb_utils, Parameters(gpt_model_path=engine_dir))
    running = Request(llm_inputs(tokenizer.encode(PROMPT), **LONG))
    model.execute([running])
    running.sender.wait_responses(1)
    model.finalize()
    assert code_of(running.sender.wait_final()[-1]) == "UNAVAILABLE"
    late = Request(llm_inputs([70]))
    model.execute([late])
    assert code_of(late.sender.wait_final()[-1]) == "UNAVAILABLE"
    assert not [t for t in threading.enumerate() if t.name == "saw-serve" and not t.is_alive()]


@pytest.fixture
def own_log(monkeypatch):
    """A model takes over the package's log, for Triton's; other tests want it back."""
    log = logging.getLogger("saw_trtllm")
    for name, value in {"handlers": [], "propagate": True, "level": log.level}.items():
        monkeypatch.setattr(log, name, value)


@pytest.mark.usefixtures("own_log")
def test_a_full_collection_does_not_look_at_what_a_server_began_with():
    """It holds up steps and answers, in proportion to what it looks at."""
    try:
        load_model(pb_utils, PostprocessingModel, {"model_config": model_config(tokenizer_dir=str(EXAMPLE))})
        looked_at = len(gc.get_objects())
        assert looked_at < gc.get_freeze_count() / 10
    finally:
        gc.unfreeze()


@pytest.mark.usefixtures("own_log")
def test_loading_a_missing_engine_is_one_sentence(tmp_path):
    with pytest.raises(pb_utils.TritonModelException, match="is not a folder: give the --output_dir of saw-build"):
        load_model(pb_utils, TensorrtLlmModel, {"model_config": model_config(gpt_model_path=str(tmp_path / "no"))})
    with pytest.raises(pb_utils.TritonModelException, match="gpt_model_path"):
        load_model(pb_utils, TensorrtLlmModel, {"model_config": model_config()})
    with pytest.raises(pb_utils.TritonModelException, match="tokenizer_dir"):
        load_model(pb_utils, PostprocessingModel, {"model_config": model_config()})


# One response to a request: decoupled_mode false


@pytest.fixture(scope="module")
def unary(engine_dir):
    model = TensorrtLlmModel(pb_utils, Parameters(gpt_model_path=engine_dir, decoupled_mode=False, deterministic=True))
    yield model
    model.finalize()


@pytest.mark.parametrize("options", [{"streaming": True}, {"num_return_sequences": 2}])
def test_what_has_several_responses_is_one_sentence(unary, options):
    [[response]] = run(unary, Request(llm_inputs([70], **options)))
    assert code_of(response) == "INVALID_ARG"
    assert "this server gives one response to a request: leave it out, or start saw-triton" in response.error.message


def test_one_response_holds_all_prompts(unary, llm, preprocessing, postprocessing):
    prompts, lengths = [PROMPT, "The module provides", "x"], (5, 12, 3)
    pre = preprocessing.tokenize(
        {"QUERY": strings(*[[p] for p in prompts]), "REQUEST_OUTPUT_LEN": i32(*[[n] for n in lengths])}
    )
    tensors = {
        "input_ids": pre["INPUT_ID"],
        "input_lengths": pre["REQUEST_INPUT_LEN"],
        "request_output_len": pre["REQUEST_OUTPUT_LEN"],
        "exclude_input_in_output": np.full((3, 1), True),
        "return_log_probs": np.array([[True], [False], [True]]),
        "return_num_output_tokens": np.full((3, 1), True),
        "end_id": i32([-1], [-1], [-1]),
    }
    [[response]] = run(unary, Request(tensors))
    out = response.tensors
    wiring = {ours: theirs for theirs, ours in names.STEPS[1].outputs.items()}
    [text] = postprocessing.execute([Request({k: out[wiring[v]] for k, v in names.STEPS[2].inputs.items()})])
    params = [SamplingParams(max_tokens=n, end_id=-1, logprobs=True) for n in lengths]
    expected = [o.outputs[0] for o in llm.generate(prompts, params)]
    assert [t.decode() for t in text.tensors["OUTPUT"]] == [e.text for e in expected]
    assert out["sequence_length"].tolist() == out["num_output_tokens"].tolist() == [[n] for n in lengths]
    assert out["output_ids"].shape == (3, 1, 12)
    assert out["batch_index"].tolist() == [[0], [1], [2]]
    np.testing.assert_allclose(out["output_log_probs"][0, 0, :5], expected[0].logprobs, rtol=EPS)
    np.testing.assert_allclose(out["output_log_probs"][2, 0, :3], expected[2].logprobs, rtol=EPS)
    assert not out["output_log_probs"][1].any()  # it was not asked for


def test_every_request_has_one_response(unary, tokenizer):
    ids = tokenizer.encode(PROMPT)
    two = {k: np.repeat(v, 2, axis=0) for k, v in llm_inputs(ids, 8).items()}
    bad = {**two, "request_output_len": i32([8], [0])}
    answers = run(unary, Request(two), Request(bad), Request(llm_inputs([1], stop=True), request_id="no such"))
    assert [[code_of(r) for r in responses] for responses in answers] == [[None], ["INVALID_ARG"], [None]]


# Metrics


def test_metrics_follow_the_stats():
    SeriesRecorder.all.clear()
    reporter = metrics.MetricsReporter(pb_utils, "tensorrt_llm", "1")
    stats = Stats(
        num_running=2,
        num_waiting=3,
        used_blocks=10,
        max_blocks=100,
        tokens_per_block=10,
        loaded_blocks_total=15,
        loaded_tokens_total=150,
        disk_read_blocks_total=5,
        reused_tokens_total=200,
        prompt_tokens_total=500,
        generated_tokens_total=60,
        ttft_seconds_sum=1.5,
        ttft_count=6,
    )
    last = Stats(max_blocks=100, prompt_tokens_total=600, generated_tokens_total=90, ttft_seconds_sum=2.0, ttft_count=7)
    for s in (stats, stats, last):
        reporter.update(s)
        seen = {
            (r.family.name, *[v for k, v in r.labels.items() if k.endswith(("type", "tier"))]): r.value
            for r in SeriesRecorder.all
        }
        if s is stats:
            assert seen[metrics.REQUESTS, "active"] == 5
            assert seen[metrics.REQUESTS, "scheduled"] == 2
            assert seen[metrics.REQUESTS, "waiting"] == 3
            assert seen[metrics.BLOCKS, "used"] == 10
            assert seen[metrics.BLOCKS, "fraction"] == 0.1
            assert seen["saw_prompt_tokens_total",] == 500
            assert [seen[metrics.HIT_RATE, tier] for tier in ("pool", "host", "disk")] == [0.1, 0.2, 0.1]
    assert seen[metrics.REQUESTS, "active"] == 0
    assert seen[metrics.BLOCKS, "max"] == 100
    assert seen["saw_generated_tokens_total",] == 90
    assert seen["saw_time_to_first_token_seconds_sum",] == 2.0
    assert seen["saw_time_to_first_token_seconds_count",] == 7
    assert len(seen) == len(metrics.METRICS)
    assert all(r.calls <= 2 for r in SeriesRecorder.all)  # nothing is sent that has not changed
