"""The TensorRT executor on a machine without a GPU: over stand-ins for CUDA and TensorRT, against the reference."""

import importlib
import shutil
import sys
import time
import traceback
import types
from itertools import pairwise

import numpy as np
import pytest

from saw_trtllm import LLM, GuidedDecodingParams, KvCacheConfig, SamplingParams
from saw_trtllm.backends.tensorrt import device
from saw_trtllm.build import build, plan_build
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs, StepSequence
from saw_trtllm.errors import BackendUnavailableError, EngineError, KernelError
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plugins.kernels import KernelsLibrary
from saw_trtllm.runtime.sampling import SamplingState
from tests.support.example import build_example
from tests.support.fakes import cuda as fake_cuda
from tests.support.fakes import engine as fake_engine
from tests.support.fakes.cuda import cudaError_t
from tests.support.models import make_hf_model
from tests.support.turns import generate_at_once

LIMITS = {"max_batch_size": 16, "max_num_tokens": 128, "max_seq_len": 256}
TOKENS = {"max_tokens": 2048}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Engine folders of the example model by kv: the reference's, and the same as TensorRT's."""
    made = {}

    def make(kv="saw_int4", **options):
        key = (kv, *sorted(options.items()))
        if key not in made:
            base = tmp_path_factory.mktemp("engines")
            build_example(base / "reference", kv=kv, **{**LIMITS, **options})
            shutil.copytree(base / "reference", base / "tensorrt")
            fake_engine.as_tensorrt(base / "tensorrt")
            made[key] = (base / "reference", base / "tensorrt")
        return made[key]

    return make


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU and TensorRT, for an engine's config."""

    def make(folder, total=fake_cuda.TOTAL):
        module = fake_engine.install(monkeypatch, folder, total)
        return module.cuda, module

    return make


@pytest.fixture
def open_executor(machine):
    """Open the executor of a folder."""
    opened = []

    def make(folder, total=fake_cuda.TOTAL, max_tokens=2048, fraction=0.9, **options):
        cuda, module = machine(folder, total)
        executor = importlib.import_module("saw_trtllm.backends.tensorrt.executor")
        made = executor.TensorRTExecutor(folder, EngineConfig.load(folder), max_tokens, fraction, **options)
        opened.append(made)
        return made, cuda, module

    yield make
    for executor in opened:
        executor.shutdown()


def wait_for_pages(llm):
    """A thread pins the host cache's memory while steps run already, which a fast one may be ahead of."""
    while llm.executor.num_ready_host_blocks < llm.executor.num_host_blocks:
        time.sleep(0.001)


def generate(folder, prompts, params, **cache):
    with LLM(folder, kv_cache_config=KvCacheConfig(**cache)) as llm:
        outputs = llm.generate(prompts, params)
        return [o.outputs[0] for o in outputs], outputs, llm.stats()


def requests(count, seed=0, max_tokens=12):
    """Prompts of random lengths, greedy and sampled."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 500, rng.integers(2, 90)).tolist() for _ in range(count)]
    kinds = [{}, {"temperature": 1.0, "top_k": 20, "seed": 5}, {"repetition_penalty": 1.2, "logprobs": True}]
    return prompts, [SamplingParams(max_tokens=max_tokens, ignore_eos=True, **kinds[i % 3]) for i in range(count)]


@pytest.mark.parametrize("kv", ["fp16", "int4", "saw_int4"])
def test_requests_with_preemption_give_what_the_reference_gives(kv, folders, machine):
    reference, folder = folders(kv)
    prompts, params = requests(12, max_tokens=40)
    expected, _, _ = generate(reference, prompts, params, **TOKENS)
    cuda, _ = machine(folder)
    with LLM(folder, kv_cache_config=KvCacheConfig(max_tokens=320, deterministic=True)) as llm:
        found = [output.outputs[0] for output in generate_at_once(llm, prompts, params)]
        assert llm.stats().preemptions_total > 0
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert [o.logprobs for o in found] == [o.logprobs for o in expected]
    assert cuda.launched > 0
    assert cuda.everything() == []


@pytest.mark.parametrize(
    "options",
    [
        {"kv": "fp16"},
        {"kv": "saw_int4"},
        {"kv": "saw_k8v4"},
        {"kv": "saw_int4", "kv_skip_layers": "0"},
        {"kv": "saw_int4", "kv_bits": "8/4:last"},
    ],
)
def test_rows_are_copied_within_blocks_of_every_pool(options, folders, machine):
    """The second turn of a conversation, of which all but the new words are in the cache, and a fork within a block."""
    reference, folder = folders(**options)
    params = SamplingParams(max_tokens=11, ignore_eos=True)

    def converse(folder):
        with LLM(folder, kv_cache_config=KvCacheConfig(**TOKENS)) as llm:
            first = llm.generate(list(range(3, 53)), params).outputs[0].token_ids
            second = llm.generate([*range(3, 53), *first, 7, 8, 9], params).outputs[0].token_ids
            third = llm.generate([*range(3, 45), 99, 98], params).outputs[0].token_ids
            return first, second, third, llm.stats().reused_tokens_total

    expected = converse(reference)
    assert expected[-1] == 50 + 10 + 42
    machine(folder)
    assert converse(folder) == expected


@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_blocks_go_to_the_host_and_come_back(kv, folders, machine):
    """Conversations of three turns that do not fit the pool together give what a pool without a host cache gives."""
    reference, folder = folders(kv)
    params = SamplingParams(max_tokens=10, ignore_eos=True)

    def converse(folder, **cache):
        prompts = [list(range(i, i + 150)) for i in (3, 203)]
        with LLM(folder, kv_cache_config=KvCacheConfig(**cache)) as llm:
            wait_for_pages(llm)
            for _ in range(3):
                texts = [llm.generate(p, params).outputs[0].token_ids for p in prompts]
                prompts = [[*p, *t, 7, 8, 9] for p, t in zip(prompts, texts, strict=True)]
            return prompts, llm.stats()

    expected, _ = converse(reference, max_tokens=4096, enable_partial_reuse=False)
    for which in (reference, folder):
        cuda = machine(folder)[0] if which is folder else None
        found, stats = converse(which, max_tokens=256, host_cache_size=1 << 24, enable_partial_reuse=False)
        assert found == expected
        assert stats.loaded_blocks_total > 5
        assert stats.used_blocks == 0
        assert cuda is None or cuda.everything() == []


def test_skipped_layers_have_a_pool_of_their_own(folders, machine):
    reference, folder = folders(kv_skip_layers="0,last")
    prompts, params = requests(6, seed=1)
    expected, _, _ = generate(reference, prompts, params, **TOKENS)
    machine(folder)
    found, _, _ = generate(folder, prompts, params, **TOKENS)
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]


@pytest.mark.parametrize("options", [{}, {"kv_skip_layers": "0"}])
def test_block_tables_share_the_memory_and_windows_bound_them(options, machine, tmp_path):
    """Conversations that do not fit the pool: blocks go to the host and come back, and rows are copied."""
    model_dir = make_hf_model(tmp_path, "gemma3", num_hidden_layers=5, sliding_window_pattern=3)[0]
    reference, folder = tmp_path / "reference", tmp_path / "tensorrt"
    common = {"model_dir": model_dir, "dtype": "float16", "tokens_per_block": 16}
    build(plan_build(BuildOptions(output_dir=reference, backend="reference", **common, **LIMITS, **options)))
    shutil.copytree(reference, folder)
    fake_engine.as_tensorrt(folder)
    config = EngineConfig.load(folder)
    assert len(config.windows) > 1
    params = SamplingParams(max_tokens=10, ignore_eos=True)

    def converse(folder, **cache):
        prompts = [list(range(i, i + 100)) for i in (3, 50, 90)]
        with LLM(folder, kv_cache_config=KvCacheConfig(**cache)) as llm:
            for _ in range(3):
                outputs = llm.generate(prompts, params)
                texts = [o.outputs[0].token_ids for o in outputs]
                prompts = [[*p, *t, 7, 8, 9] for p, t in zip(prompts, texts, strict=True)]
            return prompts, llm.stats()

    expected, _ = converse(reference, max_tokens=4096, deterministic=True)
    cuda, _ = machine(folder)
    found, stats = converse(folder, max_tokens=300, deterministic=True, host_cache_size=1 << 24)
    assert found == expected
    assert (stats.used_blocks, stats.free_blocks) == (0, config.blocks_of_tokens(300))
    assert cuda.everything() == []
    exact, _ = converse(reference, max_tokens=300, host_cache_size=1 << 24)
    machine(folder)
    assert converse(folder, max_tokens=300, host_cache_size=1 << 24)[0] == exact


def test_logits_come_to_the_host_for_those_who_ask(folders, machine):
    reference, folder = folders(gather_all_token_logits=True)
    prompts, _ = requests(4, seed=2)
    wanted = [{"return_context_logits": True}, {"return_generation_logits": True}, {}]
    wanted.append({**wanted[0], **wanted[1]})
    params = [SamplingParams(max_tokens=5, ignore_eos=True, **w) for w in wanted]
    _, expected, _ = generate(reference, prompts, params, **TOKENS)
    machine(folder)
    _, found, _ = generate(folder, prompts, params, **TOKENS)
    for a, b in zip(found, expected, strict=True):
        for x, y in (
            (a.context_logits, b.context_logits),
            (a.outputs[0].generation_logits, b.outputs[0].generation_logits),
        ):
            assert (x is None) == (y is None)
            if y is not None:
                np.testing.assert_array_equal(x, y)


def test_texts_that_are_guided_or_depend_on_the_last_token_are_those_of_the_reference(folders, machine):
    """In steps that are launched ahead, beside sequences that depend on nothing; some end early."""
    reference, folder = folders()
    prompts, params = requests(9, seed=6)
    wanted = [{"json": {"enum": ["yes", "no"]}}, {"regex": "[a-z]{3,9}"}, {"grammar": 'start: "(" start ")" | "x"'}]
    params[:3] = [SamplingParams(max_tokens=12, guided_decoding=GuidedDecodingParams(**w)) for w in wanted]
    params[3] = SamplingParams(max_tokens=12, bad=["e", " t"], temperature=1.0, seed=1)
    expected, _, _ = generate(reference, prompts, params, **TOKENS)
    machine(folder)
    launches = []
    executor = importlib.import_module("saw_trtllm.backends.tensorrt.executor").TensorRTExecutor
    launch = executor.launch

    def counted(self, step, sampling, context_logits):
        launches.append((bool((step.input_ids < 0).any()), sampling is None))
        return launch(self, step, sampling, context_logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "launch", counted)
        found, _, _ = generate(folder, prompts, params, **TOKENS)
    assert [(o.token_ids, o.finish_reason) for o in found] == [(o.token_ids, o.finish_reason) for o in expected]
    assert found[0].text in ('"yes"', '"no"')
    ahead = [late for unknown, late in launches if unknown]
    assert len(ahead) >= 10, "each step but the prompts' is launched before the last one's tokens are known"
    assert sum(ahead) >= 9, "and drawn after"


def test_biases_bans_and_the_likeliest_tokens_come_to_those_who_ask(folders, machine):
    """Beside sequences of which the GPU gives the token alone."""
    reference, folder = folders()
    prompts, params = requests(6, seed=3)
    wanted = [{"min_p": 0.2, "temperature": 1.5}, {"logit_bias": {7: 5.0}, "top_logprobs": 2}, {"bad_token_ids": [7]}]
    params[:3] = [SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True, **w) for w in wanted]
    expected, _, _ = generate(reference, prompts, params, **TOKENS)
    machine(folder)
    found, _, _ = generate(folder, prompts, params, **TOKENS)
    assert [(o.token_ids, o.logprobs) for o in found] == [(o.token_ids, o.logprobs) for o in expected]
    assert found[1].top_logprobs == expected[1].top_logprobs


# -- steps by hand


def pack(*sequences):
    return StepInputs.pack([StepSequence(*s) for s in sequences], 4)


def state(**params):
    return SamplingState(SamplingParams(**params), [1], [])


def test_a_step_takes_the_tokens_of_the_one_under_way(folders, open_executor):
    executor, cuda, _ = open_executor(folders()[1])
    first = executor.launch(
        pack(([5, 6, 7], 0, 3, PREFILL, [0]), ([9, 8], 0, 2, PREFILL, [1])), [state()] * 2, [False] * 2
    )
    blind = executor.launch(pack(([-2], 2, 2, DECODE, [1]), ([-1], 3, 3, DECODE, [0])), [state()] * 2, [False] * 2)
    assert cuda.streams[executor.stream].work, "nothing has waited for the GPU"
    tokens = first.result().token_ids
    found = blind.result().token_ids
    again, _, _ = open_executor(folders()[1])
    again.launch(pack(([5, 6, 7], 0, 3, PREFILL, [0]), ([9, 8], 0, 2, PREFILL, [1])), [None] * 2, [False] * 2).result()
    known = pack(([tokens[1]], 2, 2, DECODE, [1]), ([tokens[0]], 3, 3, DECODE, [0]))
    assert again.launch(known, [state()] * 2, [False] * 2).result().token_ids == found


def test_late_draws_come_after_the_layers_and_before_the_next_step(folders, open_executor):
    """The mask comes when the token before is known; the step after takes the token that it let pass."""
    executor, cuda, _ = open_executor(folders()[1])
    stream = cuda.streams[executor.stream]
    first = executor.launch(pack(([5, 6, 7], 0, 3, PREFILL, [0])), [state()], [False])
    late = executor.launch(pack(([-1], 3, 3, DECODE, [0])), None, [False])
    enqueued = len(stream.work)
    (token,) = first.result().token_ids
    assert 0 < len(stream.work) < enqueued, "the layers are in the stream, and have not been waited for"
    mask = np.zeros(32, np.uint32)
    mask[3] = 1 << 7
    late.draw([state()._replace(generated=[token], mask=mask)])
    after = executor.launch(pack(([-1], 4, 3, DECODE, [0])), [state()], [False])
    assert late.result().token_ids == [3 * 32 + 7]
    again, _, _ = open_executor(folders()[1])
    again.launch(pack(([5, 6, 7, token, 3 * 32 + 7], 0, 5, PREFILL, [0])), [None], [False]).result()
    known = again.launch(pack(([3 * 32 + 7], 4, 3, DECODE, [0])), [state()], [False])
    assert after.result().token_ids == known.result().token_ids


def test_a_draw_that_fails_is_the_results(folders, open_executor, monkeypatch):
    def no_room(sampling):
        raise KernelError("no room")

    executor, cuda, _ = open_executor(folders()[1])
    first = executor.launch(pack(([5, 6, 7], 0, 3, PREFILL, [0])), [state()], [False])
    late = executor.launch(pack(([-1], 3, 3, DECODE, [0])), None, [False])
    token = first.result().token_ids[0]
    with monkeypatch.context() as patch:
        patch.setattr(executor._sampler, "prepare", no_room)
        late.draw([state()])
    with pytest.raises(KernelError, match="no room"):
        late.result()
    assert cuda.streams[executor.stream].work == [], "layers write to blocks that have been given to others"
    again = executor.launch(pack(([token], 3, 3, DECODE, [0])), [state()], [False])
    assert len(again.result().token_ids) == 1


def test_inputs_and_logits_that_find_no_memory_fail_alone(folders, open_executor):
    """What was there before is still there for smaller steps."""
    executor, cuda, _ = open_executor(folders()[1])
    first, wants = pack(([5], 0, 1, PREFILL, [0])), state(return_generation_logits=True)
    # As often as there are buffers in turn.
    found, _ = (executor.launch(first, [state()], [False]).result() for _ in range(2))
    large = pack((list(range(5, 205)), 0, 200, PREFILL, [0, 1, 2, 3, 4, 5, 6]))
    for step, draws in ((large, [None]), (first, [wants])):
        cuda.failing["cudaMallocHost"] = cudaError_t.cudaErrorMemoryAllocation
        for _ in range(2):
            with pytest.raises(KernelError, match="out of memory"):
                executor.launch(step, draws, [False]).result()
        cuda.failing.clear()
        for _ in range(2):
            assert executor.launch(first, [state()], [False]).result() == found
    (logits,) = executor.launch(first, [wants], [False]).result().logits
    assert int(logits.argmax()) == found.token_ids[0]


def test_a_third_launch_keeps_the_first_ones_result(folders, open_executor):
    executor, _, _ = open_executor(folders()[1])
    steps = [executor.launch(pack(([5 + i], 0, 1, PREFILL, [i])), [state()], [False]) for i in range(3)]
    alone = [executor.launch(pack(([5 + i], 0, 1, PREFILL, [i])), [state()], [False]).result() for i in range(3)]
    assert [s.result().token_ids for s in steps] == [s.token_ids for s in alone]


def test_decodes_are_padded_to_a_graph_and_larger_batches_run_without(folders, open_executor):
    executor, cuda, _ = open_executor(folders()[1])
    assert executor.buckets == [1, 2, 4, 8, 16]
    for count, graphs in ((3, 1), (16, 2), (1, 3)):
        step = pack(*(([7], 0, 1, DECODE, [i]) for i in range(count)))
        assert len(executor.launch(step, [state()] * count, [False] * count).result().token_ids) == count
        assert cuda.launched == graphs
    executor.launch(pack(([7], 0, 1, PREFILL, [0]), ([7], 0, 1, DECODE, [1])), [state()] * 2, [False] * 2).result()
    assert cuda.launched == graphs, "a prefill is in no graph"


def test_an_engine_without_a_profile_for_decodes_runs_too(folders, machine):
    reference, folder = folders()
    prompts, params = requests(4, seed=3)
    expected, _, _ = generate(reference, prompts, params, **TOKENS)
    _, module = machine(folder)
    module.num_profiles = 1
    found, _, _ = generate(folder, prompts, params, **TOKENS)
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]


def test_a_step_that_does_not_begin_leaves_the_one_under_way(folders, open_executor):
    executor, _, module = open_executor(folders()[1], graphs=False)
    under_way = executor.launch(pack(([5, 6], 0, 2, PREFILL, [0])), [state()], [False])
    module.refusing.add(1)
    with pytest.raises(KernelError, match=r"^TensorRT 8\.6\.0 does not run the step: "):
        executor.launch(pack(([-1], 2, 2, DECODE, [0])), [state()], [False])
    token = under_way.result().token_ids
    module.refusing.clear()
    again = executor.launch(pack(([5, 6], 0, 2, PREFILL, [0])), [state()], [False])
    assert again.result().token_ids == token


def test_a_failure_of_the_gpu_is_the_results(folders, open_executor):
    executor, cuda, _ = open_executor(folders()[1])
    step = executor.launch(pack(([5, 6], 0, 2, PREFILL, [0])), [state()], [False])
    cuda.failing["cudaEventSynchronize"] = cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(KernelError, match=r"^cudaEventSynchronize failed: an illegal memory access \(cudaErrorIll"):
        step.result()
    cuda.failing.clear()


def test_a_graph_that_is_not_recorded_is_done_without(folders, open_executor, machine, monkeypatch, caplog):
    reference, folder = folders()
    prompts, params = requests(3, seed=4)
    expected, _, _ = generate(reference, prompts, params, **TOKENS)
    cuda, _ = machine(folder)
    cuda.failing["cudaGraphInstantiate"] = cudaError_t.cudaErrorMemoryAllocation
    found, _, _ = generate(folder, prompts, params, **TOKENS)
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert "decodes of 1 sequences and more run without a CUDA graph: cudaGraphInstantiate failed: out of memory" in (
        caplog.text
    )
    assert cuda.launched == 0


def test_no_rank_records_a_size_that_another_did_not(folders, open_executor):
    """The one that stopped would wait for the others, and they for its part of a sum."""
    executor, cuda, _ = open_executor(folders()[1])
    graphs = importlib.import_module("saw_trtllm.backends.tensorrt.graphs").DecodeGraphs()
    answers, enqueued = [True, False], []
    with_graphs = cuda.everything()
    graphs.record([1, 2, 4], executor._stream, lambda _: None, enqueued.append, lambda _: answers.pop(0))
    assert (graphs.sizes, enqueued, answers) == ([1], [1, 1, 2, 2], [])
    graphs.close()
    assert cuda.everything() == with_graphs


def test_a_profile_names_the_layers(folders, open_executor):
    executor, _, _ = open_executor(folders()[1])
    assert executor.profile(pack(([7], 0, 1, DECODE, [0]))) == [("all of it", 1.0)]


# -- memory


def test_the_plan_accounts_for_the_gpus_memory(folders, open_executor):
    folder = folders()[1]
    executor, cuda, _ = open_executor(folder, max_tokens=None, fraction=0.5)
    plan, config = executor.memory, EngineConfig.load(folder)
    assert plan.activations == fake_engine.ACTIVATIONS
    assert plan.weights > 0
    assert plan.pool == executor.num_blocks * 32 * config.bytes_per_token
    assert executor.num_blocks == 16 * 8, "no more than all sequences need"
    assert plan.free == cuda.total - cuda.used


def test_executors_may_share_the_memory_of_their_caches(folders, machine):
    _, folder = folders(kv_skip_layers="0,last")
    cuda, _ = machine(folder)
    executor, buffer = (
        importlib.import_module(f"saw_trtllm.backends.tensorrt.{name}") for name in ("executor", "cuda")
    )
    memory = buffer.DeviceBuffer(8 << 20)
    config = EngineConfig.load(folder)
    made = [executor.TensorRTExecutor(folder, config, None, 1.0, pool_memory=memory) for _ in range(2)]
    for x in made:
        assert 0 < x.memory.pool <= memory.nbytes
        assert [pool.address % 256 for pool in x.pools] == [0, 0]
        assert x.pools[1].address >= x.pools[0].address + x.pools[0].nbytes
    assert made[0].pools[0].address == made[1].pools[0].address == memory.address
    for x in made:
        x.shutdown()
    assert list(cuda.device) == [memory.address]
    memory.close()
    assert cuda.everything() == []


def test_the_pool_takes_its_share_of_what_is_left(folders, open_executor):
    folder = folders()[1]
    total = 24 << 20
    executor, _, _ = open_executor(folder, total=total, max_tokens=None, fraction=0.05)
    left = executor.memory.pool + executor.memory.free
    assert 0.04 * left < executor.memory.pool <= 0.05 * left
    assert executor.num_blocks < 16 * 8


def too_little(folder, machine, cuda_total, max_tokens=None, fraction=0.9):
    cuda, _ = machine(folder, cuda_total)
    executor = importlib.import_module("saw_trtllm.backends.tensorrt.executor")
    with pytest.raises(EngineError) as error:
        executor.TensorRTExecutor(folder, EngineConfig.load(folder), max_tokens, fraction)
    traceback.clear_frames(error.tb)  # which the engine is in
    assert cuda.everything() == []
    return str(error.value)


def test_too_little_memory_says_how_much_and_which_flag(folders, machine):
    folder = folders()[1]
    message = too_little(folder, machine, 24 << 20, fraction=0.001)
    assert message.startswith("the KV cache gets 0.0")
    assert "0% of the" in message
    assert "one sequence of max_seq_len 256 takes 0." in message
    assert "raise --kv_cache_free_gpu_memory_fraction, free memory there, or build" in message
    message = too_little(folder, machine, 24 << 20, max_tokens=1 << 20)
    assert message.startswith("a KV cache of 1048576 tokens takes ")
    assert "give it at most" in message
    assert "raise --kv_cache_free_gpu_memory_fraction" in message
    assert too_little(folder, machine, 24 << 20, max_tokens=31) == (
        "the KV cache would hold 31 tokens and a block has 32: give it more tokens"
    )
    assert "of weights and kernels and the GPU has" in too_little(folder, machine, 1 << 20)


# -- acceptance


@pytest.fixture
def rejected(folders, machine, tmp_path):
    """The sentence with which an engine is rejected that ``change`` has been at."""

    def reject(change=lambda folder: None, errors=EngineError, prepare=lambda cuda, module: None, **section):
        folder = tmp_path / "engine"
        shutil.copytree(folders()[1], folder, dirs_exist_ok=True)
        config = EngineConfig.load(folder)
        config.model_copy(update={"saw_int4": config.saw_int4.model_copy(update=section)}).save(folder)
        change(folder)
        cuda, module = machine(folder)
        prepare(cuda, module)
        with pytest.raises(errors) as error:
            LLM(folder)
        traceback.clear_frames(error.tb)  # which the engine is in
        assert cuda.everything() == []
        message = str(error.value)
        assert "\n" not in message
        return message.replace(str(folder), "FOLDER")

    return reject


AGAIN = "build it anew with saw-build on this machine"


def test_versions_must_match(rejected):
    assert rejected(plugin_version="7") == (
        f"the engine in FOLDER was built with version 7 of the plugins and this runtime has version 1: {AGAIN}"
    )
    assert rejected(tensorrt_version="10.14.1") == (
        f"the engine in FOLDER was built with TensorRT 10.14.1 and TensorRT 8.6.0 is installed: {AGAIN}, or install "
        "that version"
    )
    assert rejected(compute_capability="8.9") == (
        f"the engine in FOLDER was built for a GPU of compute capability 8.9 and this one has 9.0: {AGAIN}"
    )


def test_kernels_that_were_not_built_for_the_gpu_are_said(rejected, monkeypatch):
    def other_kernels(cuda, module):
        library = KernelsLibrary("", 1, (13, 0), ["sm_100", "sm_80"])
        monkeypatch.setattr(device, "check_kernels", lambda: library.check("NVIDIA H200", (9, 0)))

    assert rejected(errors=BackendUnavailableError, prepare=other_kernels) == (
        "NVIDIA H200 has compute capability 9.0 and the kernels have images for sm_100, sm_80: build them with "
        "build_scripts/kernels -DCMAKE_CUDA_ARCHITECTURES=90a"
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_an_engine_with_the_gemm_plugin_or_quantized_weights_needs_cublas_lt(quantized, rejected, monkeypatch):
    def with_plugin(folder):
        config = EngineConfig.load(folder)
        config.build_config.plugin_config.gemm_plugin = None if quantized else "float16"
        if quantized:
            name = "transformer.layers.0.mlp.fc.weight"
            config.saw_int4.quantized = {name: WeightFormat(kind="int4", block=(1, 32))}
        config.save(folder)

    monkeypatch.setattr("saw_trtllm.plugins.library.load_cublas_lt", lambda: False)
    assert rejected(with_plugin, errors=BackendUnavailableError) == (
        "the engine in FOLDER has its GEMMs from cuBLASLt, which cannot be loaded: pip install nvidia-cublas-cu12, or "
        "add the folder of libcublasLt.so.12 or .13 to LD_LIBRARY_PATH"
    )


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
def test_a_damaged_engine_file_is_rejected(content, rejected):
    def damage(folder):
        file = folder / "rank0.engine"
        file.write_bytes(file.read_bytes()[:-500] if content is None else content)

    message = rejected(damage)
    assert message.startswith("FOLDER/rank0.engine cannot be read as an engine (")
    assert message.endswith(AGAIN)


def test_a_missing_engine_file_is_rejected(rejected):
    message = rejected(lambda folder: (folder / "rank0.engine").unlink())
    assert message == f"FOLDER/rank0.engine does not exist: {AGAIN}"


def test_a_file_of_another_build_is_rejected(rejected):
    def prepare(cuda, module):
        section = module.config.saw_int4.model_copy(update={"kv_skip_layers": [0]})
        module.engine_config = module.config.model_copy(update={"saw_int4": section})

    assert rejected(prepare=prepare) == (
        "FOLDER/rank0.engine is not of its config.json, which says otherwise of host_kv_cache_pool_pointers, "
        f"kv_cache_block_offsets: {AGAIN}"
    )


def test_an_engine_that_has_its_weights_elsewhere_is_rejected_by_the_names_of_few(rejected):
    def without_plugin(folder):
        config = EngineConfig.load(folder)
        config.build_config.plugin_config.gemm_plugin = None
        config.save(folder)

    def prepare(cuda, module):
        plugins = module.config.build_config.plugin_config.model_copy(update={"gemm_plugin": "float16"})
        limits = module.config.build_config.model_copy(update={"plugin_config": plugins})
        module.engine_config = module.config.model_copy(update={"build_config": limits})

    # Five weights of each of four layers, and the embedding, which is the head too.
    assert rejected(without_plugin, prepare=prepare) == (
        "FOLDER/rank0.engine is not of its config.json, which says otherwise of "
        "transformer.layers.0.attention.dense.weight, transformer.layers.0.attention.qkv.weight, "
        f"transformer.layers.0.mlp.fc.weight and 18 others: {AGAIN}"
    )


def test_what_is_missing_is_said(rejected, monkeypatch):
    def no_gpu(cuda, module):
        cuda.failing["cudaGetDevice"] = cudaError_t.cudaErrorNoDevice

    assert rejected(errors=BackendUnavailableError, prepare=no_gpu).startswith(
        "CUDA finds no GPU (cudaErrorNoDevice): "
    )

    def old_driver(cuda, module):
        cuda.failing["cudaGetDevice"] = cudaError_t.cudaErrorInsufficientDriver

    assert rejected(errors=BackendUnavailableError, prepare=old_driver) == (
        "the NVIDIA driver knows CUDA 12.4 and CUDA for Python is 13.0: update the driver, or install the cuda-python "
        "and the TensorRT of its CUDA"
    )

    def no_plugins(cuda, module):
        module.get_plugin_registry = lambda: types.SimpleNamespace(plugin_creator_list=[])

    monkeypatch.setattr("saw_trtllm.__file__", "/nowhere/__init__.py")
    message = rejected(errors=BackendUnavailableError, prepare=no_plugins)
    assert (
        "libsaw_trtllm_plugins_trt8.so is missing: build it with SAW_TENSORRT_INCLUDE_DIR=DIR build_scripts/kernels"
        in message
    )

    def no_tensorrt(cuda, module):
        monkeypatch.setitem(sys.modules, "tensorrt", None)

    message = rejected(errors=BackendUnavailableError, prepare=no_tensorrt)
    assert message.startswith("TensorRT cannot be imported here (")

    def no_cuda(cuda, module):
        monkeypatch.setitem(sys.modules, "cuda", None)
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)

    message = rejected(errors=BackendUnavailableError, prepare=no_cuda)
    assert message.startswith("CUDA for Python cannot be imported here (")
    assert message.endswith("--backend reference runs on any CPU")


# -- pieces


@pytest.mark.parametrize(("most", "first", "last"), [(1, 1, 1), (3, 1, 3), (20, 1, 20), (2048, 1, 512)])
def test_buckets_end_with_the_largest_batch(most, first, last, machine, folders):
    machine(folders()[1])
    graphs = importlib.import_module("saw_trtllm.backends.tensorrt.graphs")
    sizes = graphs.buckets(most)
    assert (sizes[0], sizes[-1]) == (first, last)
    assert sizes == sorted(set(sizes))
    # A batch is at most doubled up to 8, and from 64 on a quarter larger.
    assert all(b <= 2 * a for a, b in pairwise(sizes))
    assert all(b <= 1.25 * a for a, b in pairwise(sizes) if a >= 64)
