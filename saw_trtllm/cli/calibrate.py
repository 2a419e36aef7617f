"""``saw-calibrate``: centers and smoothing of a model's keys, for ``saw-build --calibration``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from saw_trtllm.backends.registry import choose_backend
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.families import family_of
from saw_trtllm.cli.common import add_fields, add_log_level, parse_fields, print_table, run, set_log_level
from saw_trtllm.errors import ConfigError
from saw_trtllm.paths import is_folder
from saw_trtllm.progress import progress

if TYPE_CHECKING:
    import torch

_EXAMPLES = """\
examples:
  saw-calibrate --model_dir Qwen2.5-7B --text sample.txt --output calib.safetensors
  saw-build --model_dir Qwen2.5-7B --calibration calib.safetensors --output_dir engine
"""


class CalibrateOptions(BaseModel):
    """``saw-calibrate``'s flags: each field is one, its description the help."""

    model_config = ConfigDict(protected_namespaces=())

    checkpoint_dir: Path | None = Field(None, description="TensorRT-LLM checkpoint folder")
    model_dir: Path | None = Field(None, description="Hugging Face model folder, instead of --checkpoint_dir")
    tokenizer_dir: Path | None = Field(None, description="folder of the tokenizer; by default the model's own")
    text: Path | None = Field(None, description="UTF-8 text of the kind that the engine will see; - is stdin")
    output: Path = Field(Path("calib.safetensors"), description="file to write")
    max_tokens: int = Field(8192, description="tokens of the text to use at most")
    max_seq_len: int | None = Field(
        None,
        description="tokens of a sequence; the centers hold for contexts of about that length; by default 2048, or the "
        "model's max_position_embeddings",
    )


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-calibrate",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_fields(parser, CalibrateOptions)
    add_log_level(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; see ``saw-calibrate --help``."""
    args = make_parser().parse_args(argv)
    set_log_level(args.log_level)
    return run(lambda: _calibrate(parse_fields(args, CalibrateOptions)))


def _calibrate(options: CalibrateOptions) -> None:
    choose_backend("reference")  # says so if PyTorch is missing
    from saw_trtllm.calibrate import calibrate

    start = time.monotonic()
    checkpoint, windows = _open(options)
    with progress(windows.numel(), "saw-calibrate", "tokens") as bar:
        calibration = calibrate(checkpoint, windows, progress=bar.update)
    calibration.save(options.output)
    source = ["--model_dir", options.model_dir] if options.model_dir else ["--checkpoint_dir", options.checkpoint_dir]
    build = ["saw-build", *source, "--calibration", options.output, "--output_dir", "engine"]
    model = checkpoint.config
    print_table(
        {
            "model": f"{family_of(model).name}: {model.num_hidden_layers} layers, {model.num_key_value_heads} KV heads "
            f"of {model.head_size}",
            "text": f"{len(windows)} sequences of {windows.shape[1]} tokens",
            "calibration": calibration.describe(),
            "written": str(options.output),
            "wall time": f"{time.monotonic() - start:.1f} s",
            "next": shlex.join(map(str, build)),
        }
    )


def _open(options: CalibrateOptions) -> tuple[Checkpoint, torch.Tensor]:
    """The model and the text's windows."""
    if (options.checkpoint_dir is None) == (options.model_dir is None):
        given = "neither" if options.model_dir is None else "both"
        raise ConfigError(f"{given} of --checkpoint_dir and --model_dir was given: give one of them")
    if options.text is None:
        raise ConfigError("no text was given: give a UTF-8 file with --text")
    if not is_folder(options.output.parent):
        raise ConfigError(f"{options.output.parent} is not a folder: choose another --output")
    checkpoint = Checkpoint.open(options.checkpoint_dir or options.model_dir)
    from saw_trtllm.eval.text import load_tokenizer, make_windows, read_text

    ids = load_tokenizer(checkpoint, options.tokenizer_dir).encode(read_text(options.text))
    longest = checkpoint.config.max_positions
    length = min(longest, 2048) if options.max_seq_len is None else options.max_seq_len
    return checkpoint, make_windows(ids, longest, length, options.max_tokens)


if __name__ == "__main__":
    sys.exit(main())
