"""The tokens that end a text are those of transformers' generate, in every kind of folder."""

import json
import shutil

import pytest
import transformers

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.build import build, plan_build
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.errors import CheckpointError
from saw_trtllm.model.end_ids import read_end_ids
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.models import make_hf_model

ABSENT = object()
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    small = {"num_hidden_layers": 1, "intermediate_size": 64}
    return make_hf_model(tmp_path_factory.mktemp("model"), "llama", **small)[0]


def folder_with(model, folder, config, generation):
    """A copy of the model whose files name these end tokens; without generation_config.json for None."""
    shutil.copytree(model, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(raw if config is ABSENT else raw | {"eos_token_id": config}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def generates_end_ids(folder):
    ids = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": 7}, {"eos_token_id": [5, 6]}], ids=str)
@pytest.mark.parametrize("config", [ABSENT, None, 3, [3, 4]], ids=["absent", "null", "one", "two"])
def test_end_tokens_are_those_of_generate(model, tmp_path, config, generation):
    folder = folder_with(model, tmp_path / "hf", config, generation)
    # It is no word of transformers' in the matter.
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    expected = generates_end_ids(folder)
    assert list(read_end_ids(folder)) == expected
    save_checkpoint(Checkpoint.open(folder), tmp_path / "trtllm")
    for source in (folder, tmp_path / "trtllm"):
        engine = tmp_path / f"engine_{source.name}"
        build(plan_build(BuildOptions(output_dir=engine, **options_for(source))))
        assert list(read_end_ids(engine)) == expected
        # The engine's own config says so too, where the file beside it is lost.
        (engine / "generation_config.json").unlink(missing_ok=True)
        assert list(read_end_ids(engine)) == expected


def options_for(source):
    key = "checkpoint_dir" if source.name == "trtllm" else "model_dir"
    return {key: source, "backend": "reference", "max_batch_size": 2, "max_seq_len": 128}


def test_an_engine_without_a_tokenizer_ends_its_texts(model, tmp_path):
    engine = tmp_path / "engine"
    build(plan_build(BuildOptions(output_dir=engine, **options_for(folder_with(model, tmp_path / "hf", [], None)))))
    params = SamplingParams(max_tokens=10)
    with LLM(engine) as llm:
        text = llm.generate(PROMPT, params).outputs[0].token_ids
        assert len(text) == 10
    (engine / "generation_config.json").write_text(json.dumps({"eos_token_id": [text[4], 202]}))
    with LLM(engine) as llm:
        ended = llm.generate(PROMPT, params).outputs[0]
    assert (ended.token_ids, ended.finish_reason) == (text[: text.index(text[4])], "stop")


def test_without_a_word_of_the_model_the_tokenizer_says_it(tmp_path):
    """As for a checkpoint of TensorRT-LLM's, whose config.json has no key for it."""
    from tests.support.tokenizers import BACKENDS

    BACKENDS["byte level"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"architecture": "LlamaForCausalLM"}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert read_end_ids(tmp_path) is None
    assert Tokenizer.load(tmp_path).eos_ids == (BACKENDS["byte level"].token_to_id("<|im_end|>"),)


@pytest.mark.parametrize("value", ["2", True, [2, None], {"id": 2}, 2.5, 2**31, [2, 10**30]])
def test_end_tokens_that_are_none_are_rejected(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json has eos_token_id .*: it must be a token id or"):
        read_end_ids(tmp_path)
