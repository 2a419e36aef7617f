"""What times builds and openings: its checkpoint is one, and its commands are those of a user."""

from benchmarks.engine import start
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.cli.build import make_parser
from saw_trtllm.model.config import ModelConfig

SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_size": 64}
REST = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 32, "max_position_embeddings": 64}


def test_both_kinds_of_engines_are_built_and_opened(tmp_path, monkeypatch):
    ran = []

    def python(*arguments):
        ran.append(arguments)
        if arguments[0] == "-m":
            args = make_parser().parse_args(arguments[2:])
            args.output_dir.mkdir()
            (args.output_dir / "rank0.engine").write_bytes(b"x")
            assert Checkpoint.open(args.checkpoint_dir).num_parameters() > 0
        return "1.5"

    monkeypatch.setattr(start, "_python", python)
    rows = start.measure(tmp_path, ModelConfig(architecture="LlamaForCausalLM", dtype="bfloat16", **SHAPE, **REST))
    assert [arguments[0] for arguments in ran] == ["-m", "-c", "-c"] * 2
    assert ["--strip_plan" in arguments for arguments in ran if arguments[0] == "-m"] == [False, True]
    assert rows["stripped: open, verify"] == "1.5 s"
