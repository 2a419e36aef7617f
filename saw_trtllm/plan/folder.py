"""The rules of an engine folder: what may be replaced, and how it is replaced whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saw_trtllm.checkpoint import TOKENIZER_FILES, copy_tokenizer_files
from saw_trtllm.engine.config import CONFIG_FILE, engine_file
from saw_trtllm.errors import ConfigError
from saw_trtllm.files import replacing_folder
from saw_trtllm.paths import is_file, read_json
from saw_trtllm.plan.checksums import record_checksums
from saw_trtllm.plan.plan import BuildPlan

#: What a build replaces in its folder; other files there stay.
ENGINE_FILES = (CONFIG_FILE, engine_file("*"), *TOKENIZER_FILES)


@contextmanager
def replacing_engine(plan: BuildPlan) -> Iterator[Path]:
    """Give a folder to write the engine and its config to: with the tokenizer and checksums it becomes the plan's."""
    with replacing_folder(plan.output_dir, ENGINE_FILES) as part:
        yield part
        copy_tokenizer_files(plan.checkpoint.folder, part)
        record_checksums(part)


def check_replaceable(plan: BuildPlan) -> None:
    """Reject an output folder that is the model's own, or another model's."""
    folder = plan.output_dir
    if folder.resolve() == plan.checkpoint.folder.resolve():
        raise ConfigError(f"{folder} is the folder that the model is read from: choose another --output_dir")
    config = folder / CONFIG_FILE
    if is_file(config) and "build_config" not in read_json(config):
        raise ConfigError(f"{folder} holds a model, not an engine to replace: choose another --output_dir")
