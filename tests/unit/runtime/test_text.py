"""One text, whole and in pieces, of the runtime, saw-run and Triton: what transformers makes of the tokens."""

import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from saw_trtllm import SamplingParams
from saw_trtllm.cli import run as saw_run
from saw_trtllm.errors import CheckpointError, RequestError
from saw_trtllm.runtime.detokenizer import Detokenizer
from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.output_queue import OutputQueue
from saw_trtllm.runtime.request import Request
from saw_trtllm.runtime.sampling_params import MAX_STOP_SIZE, MAX_STOPS
from saw_trtllm.runtime.sequence import Sequence
from saw_trtllm.runtime.token_decoder import REPLACEMENT
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.postprocessing import PostprocessingModel
from saw_trtllm.serve.request import parse
from saw_trtllm.serve.response import tokens_and_text
from tests.support.fakes.triton import i32, pb_utils
from tests.support.tokenizers import BACKENDS, OTHERS, SPECIAL, TOKENIZERS, byte_level

ORACLES = {name: PreTrainedTokenizerFast(tokenizer_object=backend) for name, backend in BACKENDS.items()}
PROMPT = "hello fox"
#: What a text is made of: words, bytes of characters, stray ones, special tokens, and ids that no tokenizer knows.
PARTS = ["a", "fox", " fox", " world", "  ", "日", "é", "😀", "\n\n", "..", "<think>", *SPECIAL]
STOPS = ["fox", " fox", "a", "日", "é", "😀", "..", ".a", "x日", "d<|im_end|>", "<s><s>", "  ", "\n\n", *SPECIAL]


@pytest.fixture(scope="module")
def postprocessing(tmp_path_factory):
    models = {}
    for name, backend in BACKENDS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        backend.save(str(folder / "tokenizer.json"))
        models[name] = PostprocessingModel(pb_utils, Parameters(tokenizer_dir=folder))
    return models


@st.composite
def texts(draw):
    """A tokenizer, and tokens that a model may say: bits of text, single tokens, a byte many times over."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    oracle = ORACLES[name]
    size = len(oracle)
    ids = []
    for _ in range(draw(st.integers(0, 10))):
        kind = draw(st.sampled_from(["text", "token", "piece", "run"]))
        if kind == "text":
            ids += oracle.encode(draw(st.sampled_from(PARTS)), add_special_tokens=False)
        elif kind == "token":
            ids.append(draw(st.integers(0, size + 5)))
        elif kind == "piece":  # bytes of characters, whole or not
            raw = draw(st.sampled_from(["日本語", "😀é"])).encode()
            ids += [i for i in map(_byte_token(name), raw[: draw(st.integers(1, len(raw)))]) if i is not None]
        else:
            ids += [draw(st.integers(0, size - 1))] * draw(st.integers(6, 14))
    return name, ids


def _byte_token(name):
    vocab = ORACLES[name].get_vocab()
    alphabet = {v: k for k, v in _alphabet().items()}
    return lambda byte: vocab.get(f"<0x{byte:02X}>", vocab.get(alphabet[byte]))


def _alphabet():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}


def push_all(name, ids, params=None, streaming=True):
    """What the runtime gives for a model that says these tokens."""
    params = params or SamplingParams(max_tokens=max(1, len(ids)))
    prompt = TOKENIZERS[name].encode(PROMPT)
    detokenizer = Detokenizer(TOKENIZERS[name], params.stop_strings, params.include_stop_str_in_output)
    outputs = OutputQueue()
    request = Request(Sequence(0, prompt, params), PROMPT, set(), detokenizer, streaming, outputs)
    if not any(request.push(token, 0.0) for token in ids):
        request.cancel()
    return GenerationResult(0, outputs, abort=lambda: None)


def triton(name, model, ids, params, **options):
    """The ensemble's texts, one for each response."""
    tensors = {"input_ids": i32([1]), "input_lengths": i32([1]), "request_output_len": i32([4])}
    [generation] = parse(tensors | {k: np.array([[v]], type(v)) for k, v in options.items()})
    texts = []
    for part in push_all(name, ids, params, streaming=generation.streaming).take_parts():
        out = tokens_and_text(generation, part, TOKENIZERS[name])
        inputs = {"TOKENS_BATCH": out["output_ids"], "SEQUENCE_LENGTH": out["sequence_length"], "TEXT": out["text"]}
        texts.append(model.detokenize(inputs)[0].decode())
    return texts


@settings(max_examples=150, deadline=None)
@given(text=texts())
def test_the_text_is_the_decoding_of_the_whole(text, postprocessing):
    name, ids = text
    expected = ORACLES[name].decode(ids, skip_special_tokens=True)
    pieces = [output.outputs[0] for output in push_all(name, ids)]
    assert "".join(p.text_diff for p in pieces) == pieces[-1].text == expected
    assert [i for p in pieces for i in p.token_ids_diff] == ids
    assert push_all(name, ids, streaming=False).result().outputs[0].text == expected
    params = SamplingParams(max_tokens=max(1, len(ids)))
    assert "".join(triton(name, postprocessing[name], ids, params, streaming=True)) == expected
    assert triton(name, postprocessing[name], ids, params, exclude_input_in_output=True) == [expected]


@settings(max_examples=150, deadline=None)
@given(text=texts())
def test_prompt_and_text_are_the_decoding_of_both(text, postprocessing):
    name, ids = text
    oracle = ORACLES[name]
    prompt_ids = oracle.encode(PROMPT)
    before = oracle.decode(prompt_ids, skip_special_tokens=True)
    both = oracle.decode([*prompt_ids, *ids], skip_special_tokens=True)
    assert both.startswith(before)
    expected = PROMPT + both[len(before) :]
    params = SamplingParams(max_tokens=max(1, len(ids)))
    asked = {"prompt": PROMPT.encode()}
    assert triton(name, postprocessing[name], ids, params, **asked) == [expected]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        saw_run._stream(PROMPT, push_all(name, ids))
        saw_run._stream(PROMPT, push_all(name, ids, streaming=False))
    assert out.getvalue() == f"{expected}\n" * 2


def first_stop(name, ids, stops):
    """How many tokens transformers' generate would take."""
    try:
        criteria = StopStringCriteria(ORACLES[name], list(stops))
    except ValueError:  # no token can end any of them
        return None
    for count in range(1, len(ids) + 1):
        if criteria(torch.tensor([ids[:count]]), None).item():
            return count
    return None


@settings(max_examples=200, deadline=None)
@given(
    text=texts(),
    stops=st.lists(st.sampled_from(STOPS), min_size=1, max_size=3),
    include=st.booleans(),
    from_text=st.tuples(st.integers(0, 40), st.integers(1, 5)),
)
def test_stop_strings_end_the_text_where_generate_does(text, stops, include, from_text, postprocessing):
    name, ids = text
    oracle = ORACLES[name]
    start, size = from_text
    own = oracle.decode(ids, skip_special_tokens=True)[start:][:size]
    stops = [*stops, own] if own and REPLACEMENT not in own else stops
    count = first_stop(name, ids, stops) if name != "words" else None
    params = SamplingParams(max_tokens=max(1, len(ids)), stop=stops, include_stop_str_in_output=include)
    pieces = [output.outputs[0] for output in push_all(name, ids, params)]
    shown, stop = pieces[-1].text, pieces[-1].stop_reason
    if name != "words":  # whose vocabulary is too small for transformers' criterion
        assert (stop is not None) == (count is not None)
        assert len(pieces[-1].token_ids) == (count or len(ids))
    taken = pieces[-1].token_ids
    whole = oracle.decode(taken, skip_special_tokens=True)
    assert whole.startswith(shown)
    if stop is None:
        assert shown == whole
    elif REPLACEMENT not in whole and whole == oracle.decode(taken):  # else the text may hide part of the match
        # A text does not show the spaces that were stripped from its beginning.
        if include:
            assert shown.endswith(stop.lstrip(" "))
            assert stop not in shown[:-1]
        else:
            assert whole[len(shown) :].lstrip(" ").startswith(stop.lstrip(" "))
            assert stop not in whole[: len(shown) + len(stop) - 1]
    assert "".join(p.text_diff for p in pieces) == shown
    assert push_all(name, ids, params, streaming=False).result().outputs[0].text == shown
    assert "".join(triton(name, postprocessing[name], ids, params, streaming=True)) == shown


# -- what was wrong once


def ids_of(name, *tokens):
    return [ORACLES[name].convert_tokens_to_ids(token) for token in tokens]


def test_a_stray_byte_takes_the_characters_before_it_back():
    """The decoder reads bytes in a row all together; whoever shows the first four characters early is wrong."""
    name = "byte fallback"
    ids = ids_of(name, *(f"<0x{byte:02X}>" for byte in "日本語字".encode() + b"\xe6"), "▁fox")
    assert ORACLES[name].decode(ids) == REPLACEMENT * 13 + " fox"
    pieces = [o.outputs[0] for o in push_all(name, ids)]
    assert [(p.text_diff, len(p.token_ids_diff)) for p in pieces[:1]] == [(REPLACEMENT * 13 + " fox", 14)]
    stopped = push_all(name, ids, SamplingParams(max_tokens=14, stop="fox")).result().outputs[0]
    assert (stopped.text, stopped.stop_reason) == (REPLACEMENT * 13 + " ", "fox")


def test_a_space_survives_tokens_without_text():
    name = "byte fallback"
    ids = ids_of(name, "▁hello", "▁world", *["<s>"] * 12, "▁fox", "▁a")
    assert push_all(name, ids).result().outputs[0].text == "hello world fox a"


@pytest.mark.parametrize("name", [n for n in TOKENIZERS if n not in ("words", "example")])
@pytest.mark.parametrize(("stop", "text"), [("<|im_end|>", "a fox"), ("x<|im_end|>", "a fo"), ("<s><|im_end|>", None)])
def test_special_tokens_are_part_of_stop_strings(name, stop, text):
    ids = [*ORACLES[name].encode("a fox"), *ids_of(name, "<|im_end|>", "<|im_start|>", "<s>")]
    output = push_all(name, ids, SamplingParams(max_tokens=len(ids), stop=stop)).result().outputs[0]
    shown = ORACLES[name].decode(ids, skip_special_tokens=True) if text is None else text
    assert (output.text, output.finish_reason) == (shown, "length" if text is None else "stop")
    assert len(output.token_ids) == len(ids) - 2 * (text is not None)


def test_the_end_token_may_end_a_stop_string():
    ids = [*ORACLES["byte level"].encode("a fox"), *ids_of("byte level", "<|im_end|>")]
    for stop, text, reason in (("x<|im_end|>", "a fo", "x<|im_end|>"), ("y<|im_end|>", "a fox", None)):
        outputs = OutputQueue()
        params = SamplingParams(max_tokens=20, stop=stop)
        detokenizer = Detokenizer(TOKENIZERS["byte level"], [stop])
        request = Request(Sequence(0, [1], params), None, {ids[-1]}, detokenizer, False, outputs)
        assert [request.push(token, 0.0) for token in ids] == [False] * (len(ids) - 1) + [True]
        output = GenerationResult(0, outputs, abort=lambda: None).result().outputs[0]
        assert (output.text, output.stop_reason, output.token_ids) == (text, reason, ids[:-1])


@pytest.mark.parametrize("decoder", OTHERS, ids=repr)
def test_other_decoders_are_rejected(decoder):
    with pytest.raises(CheckpointError, match=r"decoder is .* not supported: Llama, Mistral and Qwen have"):
        Tokenizer(byte_level(decoder))


def test_tokens_that_the_config_has_roles_for_are_special(tmp_path):
    """As for transformers: tokenizer.json alone does not know it of a token of its vocabulary."""
    backend = byte_level()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "Ġfox"}')
    ids = backend.encode("a fox").ids
    oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert oracle.decode(ids, skip_special_tokens=True) == "a"
    assert Tokenizer.load(tmp_path).decode(ids) == "a"
    assert Tokenizer.load(tmp_path).vocab_size == backend.get_vocab_size()


@pytest.mark.parametrize(
    ("stops", "given"),
    [
        ({"stop": "x" * (MAX_STOP_SIZE + 1)}, f"stop holds 1 stops of {MAX_STOP_SIZE + 1} bytes"),
        ({"stop": ["é"] * MAX_STOPS + ["."]}, f"stop holds {MAX_STOPS + 1} stops of {2 * MAX_STOPS + 1} bytes"),
        ({"stop_token_sequences": [[1]] * 100_000}, "stop_token_sequences holds 100000 stops of 100000 tokens"),
        ({"stop_token_sequences": [[1] * 20_000]}, "stop_token_sequences holds 1 stops of 20000 tokens"),
        ({"stop_token_ids": [1] * 2000}, "stop_token_ids holds 2000 stops of 2000 tokens"),
        (
            {"stop": ["ok", "\ud83d"]},
            r"stop is \['ok', '\\ud83d'\]: it must be a string or strings of whole",
        ),
    ],
)
def test_too_many_stops_or_too_long_ones_are_rejected(stops, given):
    with pytest.raises(RequestError, match=given) as error:
        SamplingParams(**stops)
    assert len(str(error.value)) < 200
    if "holds" in given:
        assert "give at most 1024 of at most 16384" in str(error.value)


def test_as_many_stops_as_allowed_are_found():
    long = "abc" * (MAX_STOP_SIZE // 3)
    ids = ORACLES["byte level"].encode(long + "fox")
    assert push_all("byte level", ids, SamplingParams(max_tokens=len(ids), stop=long)).result().outputs[0].text == ""
    runs = [[i, i + 1] for i in range(MAX_STOPS)]
    output = push_all("byte level", [3, 1, 7, 8, 9], SamplingParams(stop_token_sequences=runs)).result().outputs[0]
    assert (output.token_ids, output.stop_reason) == ([3, 1, 7, 8], 8)
