"""The server as OpenAI's own client sees it, and as transformers would answer."""

import asyncio
import json
import math
from typing import Literal

import openai
import pydantic
import pytest
import torch
from transformers import AutoModelForCausalLM

from saw_trtllm import SamplingParams
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.example import EXAMPLE

USER = {"role": "user", "content": "write a class"}
STEM = "import os\nimport sys\n\n\nclass Node:\n    def"
ENDING = '        self.assertTrue(x)\n\n\nif __name__ == "__main__":\n    '
GREEDY = {"temperature": 0, "model": "example"}


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_message_is_that_of_the_runtime_however_it_comes(client, llms):
    expected = llms["example"].chat([USER], SamplingParams(max_tokens=12))
    asked = {**GREEDY, "messages": [USER], "max_completion_tokens": 12}
    whole = client.chat.completions.create(**asked)
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.outputs[0].text)
    assert choice.finish_reason == expected.outputs[0].finish_reason
    prompt, text = len(expected.prompt_token_ids), len(expected.outputs[0].token_ids)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, text)
    assert whole.usage.total_tokens == prompt + text

    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == choice.finish_reason
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], prompt + text)
    assert {c.id for c in chunks} == {chunks[0].id}


def test_the_asynchronous_client_gets_many_streams_at_once(url, llms):
    prompts = [f"def f{i}(" for i in range(6)]
    expected = [o.outputs[0].text for o in llms["exact"].generate(prompts, SamplingParams(max_tokens=8))]

    async def ask(client, prompt):
        stream = await client.completions.create(model="exact", prompt=prompt, max_tokens=8, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(ask_all()) == expected


def cache_rounding(logprobs):
    """Both compute in fp32 from fp16 weights; what differs is the cache, where K and V of 4 layers become fp16."""
    return 2**-11 * (2 * 4) ** 0.5 * logprobs.abs().max().item()


def test_usage_finish_reason_and_logprobs_are_those_of_transformers(client):
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    tokenizer = Tokenizer.load(EXAMPLE)
    # Texts whose every choice is ahead of the next one by some times what the cache rounds; the second one ends.
    for prompt, count in ((STEM, 10), (ENDING, 14)):
        ids = tokenizer.encode(prompt)
        given = torch.tensor([ids])
        options = {"attention_mask": torch.ones_like(given), "max_new_tokens": count, "do_sample": False}
        out = model.generate(given, **options, pad_token_id=0)[0, len(ids) :]
        ended = int(out[-1]) in tokenizer.eos_ids
        text = out[: len(out) - ended].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids + text])).logits[0, len(ids) - 1 : -1].double()
        expected = logits.log_softmax(-1)
        found = client.completions.create(model="exact", prompt=prompt, max_tokens=count, temperature=0, logprobs=3)
        choice = found.choices[0]
        assert choice.text == tokenizer.decode(text)
        assert choice.finish_reason == ("stop" if ended else "length")
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), len(text))
        own = [expected[i, token].item() for i, token in enumerate(text)]
        assert choice.logprobs.token_logprobs == pytest.approx(own, abs=cache_rounding(expected))
        tops = expected.topk(3).values
        for i, found_tops in enumerate(choice.logprobs.top_logprobs):
            three = sorted(found_tops.values())[-3:]
            assert three == pytest.approx(tops[i].flip(0).tolist(), abs=cache_rounding(expected))
        assert "".join(choice.logprobs.tokens) == choice.text


def test_the_prompt_is_echoed_with_its_logprobs(client):
    tokenizer = Tokenizer.load(EXAMPLE)
    ids = tokenizer.encode(STEM)
    found = client.completions.create(model="exact", prompt=STEM, max_tokens=0, echo=True, logprobs=2)
    choice = found.choices[0]
    assert (choice.text, found.usage.completion_tokens) == (STEM, 0)
    assert choice.logprobs.token_logprobs[0] is None
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
        expected = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    own = [expected[i, token].item() for i, token in enumerate(ids[1:])]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(own, abs=cache_rounding(expected))


def test_several_prompts_and_several_texts_have_numbers(client):
    asked = {"model": "exact", "prompt": ["def", "class"], "n": 2, "max_tokens": 5, "seed": 3}
    whole = client.completions.create(**asked)
    assert [c.index for c in whole.choices] == [0, 1, 2, 3]
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {c.index: c.text for c in whole.choices}
    assert whole.choices[0].text != whole.choices[1].text
    chat = client.chat.completions.create(model="example", messages=[USER], n=3, max_tokens=4, seed=1)
    assert [c.index for c in chat.choices] == [0, 1, 2]


def test_the_best_of_several_is_the_likeliest(client):
    asked = {"model": "exact", "prompt": STEM, "max_tokens": 6, "seed": 5, "logprobs": 0}
    drawn = client.completions.create(**asked, n=4)
    best = client.completions.create(**asked, best_of=4)

    def mean(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    assert best.choices[0].text == max(drawn.choices, key=mean).text


def test_fields_reach_the_sampler(client, llms):
    def ask(**fields):
        extra = {name: fields.pop(name) for name in list(fields) if name in EXTRA}
        asked = {"model": "exact", "prompt": STEM, "max_tokens": 8, "temperature": 0, **fields}
        return client.completions.create(**asked, extra_body=extra)

    EXTRA = {"top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words"}
    free = ask()
    first = free.choices[0].text
    token = llms["exact"].generate(STEM, SamplingParams(max_tokens=1)).outputs[0].token_ids[0]
    assert ask(logit_bias={str(token): -100}).choices[0].text != first
    assert ask(stop=first[2:4]).choices[0].text == first[: first.index(first[2:4])]
    assert ask(stop=first[2:4]).choices[0].finish_reason == "stop"
    assert ask(stop_token_ids=[token]).usage.completion_tokens == 0
    word = llms["exact"].tokenizer.decode([token]).strip()
    assert not ask(bad_words=[word]).choices[0].text.startswith(f" {word}")
    assert ask(temperature=1, top_k=1).choices[0].text == first
    assert ask(temperature=1, min_p=1.0).choices[0].text == first
    assert ask(presence_penalty=2.0, frequency_penalty=2.0, max_tokens=32).usage.completion_tokens > 0
    assert ask(min_tokens=8, ignore_eos=True).usage.completion_tokens == 8
    seeds = {ask(temperature=1, seed=s, max_tokens=16).choices[0].text for s in (1, 2, 1)}
    assert len(seeds) == 2
    unseeded = {ask(temperature=1.5, max_tokens=16).choices[0].text for _ in range(3)}
    assert len(unseeded) > 1


def test_chat_logprobs_stream_with_their_tokens(client):
    asked = {**GREEDY, "messages": [USER], "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0]
    entries = whole.logprobs.content
    assert "".join(e.token for e in entries) == whole.message.content
    assert all(e.logprob == e.top_logprobs[0].logprob and math.exp(e.logprob) <= 1 for e in entries)
    assert bytes(entries[0].bytes).decode() == entries[0].token
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert [e.model_dump() for e in streamed] == [e.model_dump() for e in entries]


def test_an_answer_follows_its_schema(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["class", "function"]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    asked = {"model": "example", "messages": [USER], "max_tokens": 300, "response_format": response_format}
    answer = client.chat.completions.create(**asked, seed=1)
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content)
    assert value["kind"] in ("class", "function")
    assert len(value["name"]) <= 8
    streamed = client.chat.completions.create(**asked, seed=1, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == answer.choices[0].message.content
    regex = {"type": "regex", "regex": "(yes|no)"}
    answer = client.chat.completions.create(**{**asked, "response_format": regex}, seed=2)
    assert answer.choices[0].message.content in ("yes", "no")


def test_models_are_listed(client):
    assert [m.id for m in client.models.list()] == ["example", "exact"]
    assert client.models.retrieve("exact").id == "exact"


@pytest.mark.filterwarnings("ignore")
def test_langchain(url, llms):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    expected = llms["example"].chat([USER], SamplingParams(max_tokens=12)).outputs[0].text
    model = langchain.ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="example", temperature=0, max_tokens=12)
    answer = model.invoke(USER["content"])
    assert answer.content == expected
    assert "".join(piece.content for piece in model.stream(USER["content"])) == expected
    again = model.invoke([("user", USER["content"]), answer, ("user", "and then")])
    assert again.usage_metadata["input_tokens"] == told(llms, expected)


def told(llms, text):
    """Tokens of a prompt in which an answer is sent back."""
    messages = [USER, {"role": "assistant", "content": text}, {"role": "user", "content": "and then"}]
    return len(llms["example"].chat_prompt(messages)["prompt_token_ids"])


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client's own class of parsed answers
def test_an_answer_is_sent_back_by_openais_client(client, llms):
    class Answer(pydantic.BaseModel):
        kind: Literal["class", "function"]

    asked = {**GREEDY, "max_tokens": 60}
    for answer in (
        client.chat.completions.create(**asked, messages=[USER]).choices[0].message,
        client.chat.completions.parse(**asked, messages=[USER], response_format=Answer).choices[0].message,
    ):
        follow_up = [USER, answer, {"role": "user", "content": "and then"}]
        again = client.chat.completions.create(**asked, messages=follow_up)
        assert again.usage.prompt_tokens == told(llms, answer.content)


@pytest.mark.filterwarnings("ignore")
def test_litellm(url, llms):
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    asked = {"model": "openai/example", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 12, "temperature": 0}
    answer = litellm.completion(messages=[USER], **asked).choices[0].message
    answer.provider_specific_fields, answer.thinking_blocks = {"citations": None}, [{"type": "thinking"}]
    again = litellm.completion(messages=[USER, answer, {"role": "user", "content": "and then"}], **asked)
    assert again.usage.prompt_tokens == told(llms, answer.content)
