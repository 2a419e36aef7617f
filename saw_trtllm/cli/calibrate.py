"""``saw-calibrate``: centers of a model's keys and frames, for ``saw-build --calibration``."""

from __future__ import annotations

import argparse
import logging
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

    from saw_trtllm.eval.levers import Measured
    from saw_trtllm.runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_EXAMPLES = """\
examples:
  saw-calibrate --model_dir Qwen2.5-7B --text sample.txt --output calib.safetensors
  saw-calibrate --model_dir Qwen2.5-7B --text book.txt,code.py --chat chats.jsonl --output calib.safetensors
  saw-calibrate --model_dir Qwen2.5-7B --generate --output calib.safetensors
  saw-build --model_dir Qwen2.5-7B --calibration calib.safetensors --output_dir engine
"""


class CalibrateOptions(BaseModel):
    """``saw-calibrate``'s flags: each field is one, its description the help."""

    model_config = ConfigDict(protected_namespaces=())

    checkpoint_dir: Path | None = Field(None, description="TensorRT-LLM checkpoint folder")
    model_dir: Path | None = Field(None, description="Hugging Face model folder, instead of --checkpoint_dir")
    tokenizer_dir: Path | None = Field(None, description="folder of the tokenizer; by default the model's own")
    text: str | None = Field(
        None, description="UTF-8 texts of the kind that the engine will see, with commas; - is stdin"
    )
    chat: str | None = Field(
        None,
        description="conversations beside or instead of it, for the model's chat template: files with a JSON list of "
        "messages a line, with commas",
    )
    generate: bool = Field(
        False, description="calibrate on texts that the model itself makes up, where there is no text of its use"
    )
    output: Path = Field(Path("calib.safetensors"), description="file to write")
    max_tokens: int = Field(16384, gt=0, description="tokens of the texts to use at most, of each the same share")
    max_seq_len: int | None = Field(
        None,
        description="tokens of a sequence; centers and frames hold for contexts of about that length; by default 2048, "
        "or what the model or the text has",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one")


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
    from saw_trtllm.eval.levers import CENTERED, FRAMES, ROTATION, measured_calibration, num_steps
    from saw_trtllm.eval.session import choose_device

    start = time.monotonic()
    device = choose_device(options.device)
    checkpoint, windows = _open(options)
    with progress(num_steps(windows), "saw-calibrate", "tokens") as bar:
        found = measured_calibration(checkpoint, windows, bar.update, device)
    found.calibration.save(options.output)
    source = ["--model_dir", options.model_dir] if options.model_dir else ["--checkpoint_dir", options.checkpoint_dir]
    build = ["saw-build", *source, "--calibration", options.output, "--output_dir", "engine"]
    model, kl = checkpoint.config, found.kl_mean
    print_table(
        {
            "model": f"{family_of(model).name}: {model.num_hidden_layers} layers, {model.num_key_value_heads} KV heads "
            f"of {model.head_size}",
            "text": f"{len(windows)} sequences of {windows.shape[1]} tokens, {found.num_held_out:,} of them to test",
            "calibration": found.calibration.describe(),
            "KL from fp16": ", ".join(f"{kl[name]:.4f} by {name}" for name in (ROTATION, FRAMES, CENTERED))
            + f"; change {found.gain.mean:+.4f} ± {found.gain.error:.4f}",
            "length of text": f"frames of one half make {found.excess:.1%} more noise on the other than its own",
            "written": str(options.output),
            "wall time": f"{time.monotonic() - start:.1f} s",
            "next": shlex.join(map(str, build)),
        }
    )
    for warning in _warnings(found):
        log.warning("%s", warning)
    if options.generate:
        log.warning(
            "the KL above is on texts of %d tokens that the model made up too: on longer ones and on others the "
            "calibration may do harm, so compare it on a text of your use, saw-eval --calibration none,%s",
            windows.shape[1],
            options.output,
        )


def _warnings(found: Measured) -> list[str]:
    warnings = []
    if not found.helps:
        warnings.append(
            "on text that it was not made of, the calibration is not clearly better than the rotation alone: build "
            "without it, or calibrate on more text of the kind that the engine will see"
        )
    if not found.centered:
        warnings.append("centers of the keys made the cache worse and were left out")
    if found.num_tokens_needed:
        warnings.append(
            f"a longer text would make better frames: give about {found.num_tokens_needed:,} tokens with --text and "
            "--max_tokens"
        )
    return warnings


def _open(options: CalibrateOptions) -> tuple[Checkpoint, torch.Tensor]:
    """The model and the texts' windows."""
    texts_given = options.text is not None or options.chat is not None
    if texts_given == options.generate:
        raise ConfigError(
            "--generate was given beside a text: leave one of them out"
            if options.generate
            else "no text was given: give UTF-8 files with --text, conversations with --chat, or --generate"
        )
    if not is_folder(options.output.parent):
        raise ConfigError(f"{options.output.parent} is not a folder: choose another --output")
    checkpoint = Checkpoint.open_given(options.checkpoint_dir, options.model_dir)
    from saw_trtllm.calibrate import MIN_TOKENS_PER_CHANNEL
    from saw_trtllm.eval.text import load_tokenizer, make_windows, read_chats, read_text

    tokenizer = load_tokenizer(checkpoint, options.tokenizer_dir)
    longest = checkpoint.config.max_positions
    if options.generate:
        return checkpoint, _generated(checkpoint, tokenizer, options)
    texts = [tokenizer.encode(read_text(Path(name))) for name in _names(options.text)]
    for name in _names(options.chat):
        chats = read_chats(Path(name), options.tokenizer_dir or checkpoint.folder)
        texts.append([i for chat in chats for i in tokenizer.encode(chat, add_special_tokens=False)])
    # Each text has its share, so that a long one does not push out the others.
    ids = [i for text in texts for i in text[: options.max_tokens // len(texts)]]
    due = -(-4 * MIN_TOKENS_PER_CHANNEL * checkpoint.config.head_size // 3)
    if len(ids) < due:
        raise ConfigError(
            f"the text gives {len(ids)} tokens, and heads of {checkpoint.config.head_size} need {due} at least, a "
            "quarter of them to measure on: give a longer text"
        )
    # A short text is cut into shorter sequences: a few are needed, to calibrate and to measure.
    length = min(longest, 2048, len(ids) // 4) if options.max_seq_len is None else options.max_seq_len
    return checkpoint, make_windows(ids, longest, length, bos_id=tokenizer.bos_id)


def _generated(checkpoint: Checkpoint, tokenizer: Tokenizer, options: CalibrateOptions) -> torch.Tensor:
    """Windows of the model's own."""
    from saw_trtllm.eval.session import open_model
    from saw_trtllm.eval.text import GENERATED_LENGTH, generated_windows, prefix_token

    length = min(checkpoint.config.max_positions, options.max_seq_len or GENERATED_LENGTH)
    count = max(4, options.max_tokens // length)
    with progress(count * (length - 1), "saw-calibrate: texts", "tokens") as bar:
        model = open_model(checkpoint, length, options.device)
        return generated_windows(model, prefix_token(tokenizer), count, length, bar.update)


def _names(text: str | None) -> list[str]:
    return [] if text is None else text.split(",")


if __name__ == "__main__":
    sys.exit(main())
