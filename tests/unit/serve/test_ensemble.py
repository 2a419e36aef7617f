"""The ensemble as one model, which reaches the engine of tensorrt_llm by a socket, without Triton."""

import os
import queue
import socket
import threading
from multiprocessing.connection import Connection
from types import SimpleNamespace

import numpy as np
import pytest

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.runtime.parts import Part
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve import engine_link, ensemble, generating, tensorrt_llm
from saw_trtllm.serve.engine_host import Asked
from saw_trtllm.serve.ensemble import EnsembleModel
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.tensorrt_llm import TensorrtLlmModel
from tests.support.example import EXAMPLE
from tests.support.fakes.triton import Request, i32, pb_utils, strings
from tests.support.turns import held_steps

PROMPT = "def read_config(path):"
LONG = {"max_tokens": 900, "end_id": -1}


@pytest.fixture(scope="module")
def engine_dir(engine):
    return engine("saw_int4")


@pytest.fixture(scope="module")
def llm(engine_dir):
    with LLM(engine_dir, kv_cache_config=KvCacheConfig(deterministic=True)) as llm:
        yield llm


@pytest.fixture
def open_models(engine_dir, monkeypatch):
    """Both models of a server, and their end."""
    address = f"\0saw_test_ensemble_{os.getpid()}"
    for module in (tensorrt_llm, ensemble):
        monkeypatch.setattr(module, "engine_address", lambda model: address)
    parameters = Parameters(gpt_model_path=engine_dir, tokenizer_dir=EXAMPLE, deterministic=True)
    holder = TensorrtLlmModel(pb_utils, parameters)
    model = EnsembleModel(pb_utils, parameters)
    yield holder, model
    model.finalize()
    holder.finalize()


def asked(*prompts, max_tokens=8, **options):
    count = len(prompts)
    tensors = {"text_input": strings(*[[p] for p in prompts]), "max_tokens": np.full((count, 1), max_tokens, np.int32)}
    return tensors | {name: np.full((count, 1), value) for name, value in options.items()}


def answers(model, *requests):
    model.execute(list(requests))
    return [r.sender.wait_final() for r in requests]


def text_of(responses):
    assert all(r.error is None for r in responses), [r.error and r.error.message for r in responses]
    return "".join(r.tensors["text_output"][0].decode() for r in responses)


def error_of(responses):
    error = responses[-1].error
    return error and (error.code, error.message)


def test_texts_are_those_of_the_runtime(open_models, llm):
    _, model = open_models
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=24)).outputs[0].text
    options = {"return_num_output_tokens": True}
    streamed, whole, alone = answers(
        model,
        Request(asked(PROMPT, max_tokens=24, stream=True, **options)),
        Request(asked(PROMPT, max_tokens=24)),
        Request(asked(PROMPT, max_tokens=24, exclude_input_in_output=True, **options)),
    )
    assert text_of(streamed) == text_of(alone) == expected
    assert text_of(whole) == PROMPT + expected
    assert sum(r.tensors["num_output_tokens"].item() for r in streamed) == 24
    assert set(alone[0].tensors) == {"text_output", "num_output_tokens"}
    assert len(whole) == len(alone) == 1


def test_many_streams_and_several_prompts_at_once(open_models, llm):
    """What a step gives to all of them comes in one message and must go to each its own."""
    _, model = open_models
    prompts = [f"{PROMPT} # {i}" for i in range(24)]
    several, *streams = answers(
        model, Request(asked(*prompts[:3], stream=True)), *(Request(asked(p, stream=True)) for p in prompts)
    )
    expected = [o.outputs[0].text for o in llm.generate(prompts, SamplingParams(max_tokens=8))]
    assert [text_of(s) for s in streams] == expected
    for i in range(3):
        assert text_of([r for r in several if r.tensors["batch_index"].item() == i]) == expected[i]


def test_a_bad_prompt_is_one_sentence_and_spoils_its_request_only(open_models, llm):
    _, model = open_models
    two = asked(PROMPT, PROMPT, stream=True) | {"max_tokens": i32([8], [10**6])}
    empty, second, good = answers(model, Request(asked("")), Request(two), Request(asked(PROMPT, stream=True)))
    assert error_of(empty) == ("INVALID_ARG", "the prompt is empty: give at least one character")
    assert error_of(second)[0] == "INVALID_ARG"
    assert "exceed the engine's max_seq_len" in error_of(second)[1]
    assert text_of(good) == llm.generate(PROMPT, SamplingParams(max_tokens=8)).outputs[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_text(open_models, stream):
    holder, model = open_models
    gone, other = Request(asked(PROMPT, stream=stream, **LONG)), Request(asked(PROMPT, stream=True, max_tokens=40))
    with held_steps(holder._llm, first=20) as held:
        model.execute([gone, other])
        other.sender.wait_responses(1)
        gone.sender.cancelled = True
        assert held.aborted.wait(60)
    assert error_of(gone.sender.wait_final()) == ("CANCELLED", "the request was cancelled")
    assert all(r.error is None for r in other.sender.wait_final())
    assert holder._llm.stats().used_blocks == 0


@pytest.mark.parametrize("model_of", [lambda holder, _: holder, lambda _, model: model], ids=["local", "remote"])
def test_a_client_that_goes_away_while_its_request_begins_ends_its_text(open_models, model_of, monkeypatch):
    model = model_of(*open_models)
    inputs = {"input_ids": i32([1]), "input_lengths": i32([1]), "request_output_len": i32([900]), "end_id": i32([-1])}
    request = Request(asked(PROMPT, **LONG) if isinstance(model, EnsembleModel) else inputs)
    aborted, begin, abort = threading.Event(), model._engine.begin, model._engine.abort

    def late_begin(key, asked):
        request.sender.cancelled = True
        assert aborted.wait(60)
        begin(key, asked)

    def noticed_abort(key):
        abort(key)
        aborted.set()

    monkeypatch.setattr(model._engine, "begin", late_begin)
    monkeypatch.setattr(model._engine, "abort", noticed_abort)
    assert error_of(answers(model, request)[0]) == ("CANCELLED", "the request was cancelled")


def test_a_request_is_stopped_by_its_id(open_models):
    holder, model = open_models
    request = Request(asked(PROMPT, stream=True, **LONG), request_id="mine")
    stop = {
        "input_ids": i32([1]),
        "input_lengths": i32([1]),
        "request_output_len": i32([1]),
        "stop": np.array([[True]]),
    }
    with held_steps(holder._llm, first=20):
        model.execute([request])
        request.sender.wait_responses(1)
        answers(holder, Request(stop, request_id="mine"))
    responses = request.sender.wait_final()
    assert responses[-1].error is None
    assert len(Tokenizer.load(EXAMPLE).encode(text_of(responses))) < 900


def test_an_engine_that_ends_is_one_sentence(open_models):
    """Its process may go while texts grow, and not come again."""
    holder, model = open_models
    running = Request(asked(PROMPT, stream=True, **LONG))
    with held_steps(holder._llm, first=20):
        model.execute([running])
        running.sender.wait_responses(1)
        holder._link.close()
        with socket.socket(fileno=os.dup(model._engine._connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        code, sentence = error_of(running.sender.wait_final())
    assert (code, sentence) == ("UNAVAILABLE", "the model tensorrt_llm has gone: send the request again later")
    [late] = answers(model, Request(asked(PROMPT)))
    assert error_of(late)[0] == "UNAVAILABLE"
    assert "the model tensorrt_llm cannot be reached" in error_of(late)[1]


def test_responses_that_triton_does_not_take_hold_up_nobody(open_models, llm):
    """As many as there are threads that send."""
    _, model = open_models
    lost = [Request(asked(PROMPT, stream=True)) for _ in range(generating._SENDERS)]
    for request in lost:
        request.sender.send = lambda response, flags: 1 / 0
    model.execute(lost)
    [answer] = answers(model, Request(asked(PROMPT, stream=True)))
    assert text_of(answer) == llm.generate(PROMPT, SamplingParams(max_tokens=8)).outputs[0].text


def test_a_sentence_that_triton_does_not_take_keeps_no_other_request_from_beginning(open_models):
    _, model = open_models
    bad, good = Request(asked("")), Request(asked(PROMPT, stream=True))
    bad.sender.send = lambda response, flags: 1 / 0
    model.execute([bad, good])
    assert text_of(good.sender.wait_final())


def test_a_client_that_triton_does_not_know_of_hides_no_other(open_models):
    holder, model = open_models
    odd, gone = Request(asked(PROMPT, stream=True, **LONG)), Request(asked(PROMPT, stream=True, **LONG))
    odd.sender.is_cancelled = lambda: 1 / 0
    with held_steps(holder._llm, first=20) as held:
        model.execute([odd, gone])
        odd.sender.wait_responses(1)
        gone.sender.cancelled = True
        assert held.aborted.wait(60)
    assert error_of(gone.sender.wait_final())[0] == "CANCELLED"


def test_a_model_that_takes_nothing_is_let_go(monkeypatch):
    """The texts of all models wait for what is sent to one."""
    monkeypatch.setattr(engine_link, "_PATIENCE", 0.1)
    host, (end, other) = HostRecorder(), socket.socketpair()
    client = engine_link._RemoteClient(host, end)
    threading.Thread(target=client.run, daemon=True).start()
    batch = [(1, [Part(0, "x" * (1 << 22), [], "")])]
    threading.Thread(target=client.deliver, args=(batch,), daemon=True).start()
    with other:
        assert host.left.wait(60)
    client.deliver(batch)  # what comes later is dropped


def test_an_answer_that_cannot_be_read_ends_the_texts_that_wait_for_one():
    address = f"\0saw_test_odd_{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        taken = queue.Queue()
        engine = engine_link.RemoteEngine(SimpleNamespace(deliver=taken.put), address)
        engine.begin(7, Asked([1], SamplingParams(), streaming=True))
        end, _ = listening.accept()
        with Connection(end.detach()) as connection:
            assert connection.recv()[0] == 7
            connection.send("no batch")
            [(key, [error])] = taken.get(timeout=60)
    assert (key, str(error)) == (7, "the model tensorrt_llm has gone: send the request again later")


class HostRecorder:
    """What a remote client asks of its host."""

    def __init__(self):
        self.left = threading.Event()

    def leave(self, client):
        self.left.set()


def test_another_users_process_is_no_engine(open_models, monkeypatch):
    """What comes by the socket is unpickled."""
    _, model = open_models
    monkeypatch.setattr(engine_link.os, "getuid", lambda: os.geteuid() + 1)
    [answer] = answers(model, Request(asked(PROMPT)))
    assert error_of(answer) == ("UNAVAILABLE", "the model tensorrt_llm is another user's")
