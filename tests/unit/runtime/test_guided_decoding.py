"""Texts that follow what they must be, whatever the model would rather say."""

import json
import os
import random
import re
import sys

import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel

from saw_trtllm import GuidedDecodingParams, KvCacheConfig, SamplingParams
from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.guided_decoding import Guide, Guides
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.example import EXAMPLE
from tests.support.schemas import random_schema


@pytest.fixture(scope="module")
def guides():
    tokenizer = Tokenizer.load(EXAMPLE)
    return Guides(tokenizer, 1024, tokenizer.eos_ids), tokenizer


def allowed(guide, vocab_size=1024):
    """The tokens that may come."""
    return np.flatnonzero(np.unpackbits(guide.mask.view(np.uint8), count=vocab_size, bitorder="little"))


def walk(guides, params, seed, limit=20_000):
    """A text drawn evenly from what may come, but with a liking for what closes, so that it ends."""
    made, tokenizer = guides
    guide, rng, text = made.make(params), np.random.default_rng(seed), []
    closing = np.array([any(c in tokenizer.decode([i]) for c in '"}],') for i in range(1024)])
    while not guide.stopped:
        tokens = allowed(guide)
        liked = tokens[closing[tokens] | np.isin(tokens, tokenizer.eos_ids)]
        token = int(rng.choice(liked if len(liked) and rng.random() < 0.7 else tokens))
        if token in tokenizer.eos_ids:
            break
        guide.accept(token)
        text.append(token)
        assert len(text) < limit
    return tokenizer.decode(text)


@pytest.mark.parametrize("seed", range(int(os.environ.get("SAW_SCHEMAS", 60))))
def test_every_text_meets_its_schema(guides, seed):
    schema = random_schema(random.Random(seed))
    value = json.loads(walk(guides, GuidedDecodingParams(json=schema), seed))
    jsonschema.Draft202012Validator(schema).validate(value)


def test_regular_expressions_grammars_and_objects(guides):
    for seed in range(5):
        assert re.fullmatch("[a-c]{2,5}-(x|yz)", walk(guides, GuidedDecodingParams(regex="[a-c]{2,5}-(x|yz)"), seed))
        grammar = 'start: "(" inner ")"\ninner: "a" | start'
        assert re.fullmatch(r"\(+a\)+", walk(guides, GuidedDecodingParams(grammar=grammar), seed))
        assert isinstance(json.loads(walk(guides, GuidedDecodingParams(json_object=True), seed)), dict)


def test_the_model_is_held_to_it_and_its_neighbours_are_not(open_llm):
    class Answer(BaseModel):
        kind: str

    llm = open_llm(kv_cache_config=KvCacheConfig(4096, deterministic=True))
    guided = SamplingParams(max_tokens=40, guided_decoding=GuidedDecodingParams(regex="(yes|no), [a-z]{3}"), n=2)
    free = SamplingParams(max_tokens=12)
    alone = llm.generate("def f(", free).outputs[0].token_ids
    held, other = llm.generate(["Is it?", "def f("], [guided, free])
    assert all(re.fullmatch("(yes|no), [a-z]{3}", o.text) and o.finish_reason == "stop" for o in held.outputs)
    assert other.outputs[0].token_ids == alone
    short = SamplingParams(max_tokens=3, guided_decoding=GuidedDecodingParams(json=Answer))
    assert llm.generate("x", short).outputs[0].finish_reason == "length"


def test_it_begins_after_the_reasoning(guides):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(EXAMPLE / "tokenizer.json"))
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer = Tokenizer(backend, eos_ids=(1,))
    made = Guides(tokenizer, 1026, (1,))
    begin, end = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    yes = tokenizer.encode("yes", add_special_tokens=False)
    for reasoning, tokens in (("begun", [5, 6, end, *yes]), ("may come", [begin, 7, end, *yes]), ("may come", yes)):
        guide = made.make(GuidedDecodingParams(regex="yes", reasoning=reasoning))
        for token in tokens:
            assert guide.mask is None or token in allowed(guide, 1026)
            guide.accept(token)
        assert guide.stopped


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "guided_decoding has nothing: give one of json"),
        ({"regex": "a", "json_object": True}, "has json_object and regex"),
        ({"regex": 7}, "regex is 7"),
        ({"json_object": "yes"}, "json_object is 'yes': it must be True or False"),
        ({"regex": "(a|"}, "unclosed group"),
        ({"json": "{"}, "guided_decoding c"),
        ({"json": {"type": "nothing"}}, "Invalid type"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "Unsatisfiable"),
        ({"json": {"$ref": "#/nowhere"}}, "does not exist"),
        ({"json": False}, "nothing meets"),
        ({"json": {"x": object()}}, "must be a JSON schema"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"what": 1}, "has no what"),
        ({"regex": "x" * (1 << 19)}, "at most"),
    ],
)
def test_what_cannot_be_followed_is_said_before_anything_is_generated(guides, options, said):
    with pytest.raises(RequestError) as e:
        guides[0].make(GuidedDecodingParams(**options))
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_an_expression_that_explodes_is_stopped(guides):
    """The library bounds its automata: what becomes too complex is an error of its request, at once or on the way."""

    def follow(regex):
        guide = guides[0].make(GuidedDecodingParams(regex=regex))
        for _ in range(50):
            guide.accept(int(allowed(guide)[0]))

    with pytest.raises(RequestError, match="followed"):
        follow("(a?){3000}a{3000}")


def test_masks_of_many_are_worked_out_at_once_and_one_that_fails_ends_alone(open_llm, monkeypatch):
    """As they are one by one; a text whose grammar becomes too complex ends with a sentence, the others go on."""
    guided = GuidedDecodingParams(regex="[a-f]{3,30}")
    params = [SamplingParams(max_tokens=20, guided_decoding=guided, temperature=1.0, seed=i) for i in range(6)]
    llm = open_llm("fp16", kv_cache_config=KvCacheConfig(4096))
    alone = [llm.generate("def f(", p).outputs[0] for p in params]
    assert [o.outputs[0] for o in llm.generate(["def f("] * 6, params)] == alone
    next_mask = Guide._next_mask

    def failing(guide):
        if guide is broken[0]:
            raise RequestError("the grammar cannot be followed further: too complex")
        return next_mask(guide)

    broken = [None]
    made = Guides.make

    def make(guides, params):
        guide = made(guides, params)
        broken[0] = broken[0] or guide
        return guide

    monkeypatch.setattr(Guides, "make", make)
    monkeypatch.setattr(Guide, "_next_mask", failing)
    handles = [llm.generate_async("def f(", p) for p in params]
    with pytest.raises(RequestError, match="too complex"):
        handles[0].result(60)
    assert [h.result(60).outputs[0] for h in handles[1:]] == alone[1:]


def test_what_takes_tokens_away_is_excluded_and_the_library_is_asked_for(open_llm, monkeypatch):
    guided = GuidedDecodingParams(regex="a")
    for other in ({"min_tokens": 1}, {"bad": "a"}, {"bad_token_sequences": [[1]]}, {"ignore_eos": True}):
        with pytest.raises(RequestError, match="guided_decoding says which tokens may come"):
            SamplingParams(guided_decoding=guided, **other)
    with pytest.raises(RequestError, match="guided_decoding is 'a'"):
        SamplingParams(guided_decoding="a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match="needs llguidance"):
        open_llm(kv_cache_config=KvCacheConfig(256)).generate("x", SamplingParams(guided_decoding=guided))
