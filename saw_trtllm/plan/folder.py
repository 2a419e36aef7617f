"""The rules of an engine folder: what may be replaced, and how it is replaced whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from saw_trtllm.checkpoint import TOKENIZER_FILES, copy_tokenizer_files
from saw_trtllm.engine.config import CALIBRATION_FILE, CONFIG_FILE, engine_file, weights_file
from saw_trtllm.errors import ConfigError
from saw_trtllm.files import replacing_folder
from saw_trtllm.paths import is_file, read_json
from saw_trtllm.plan.checksums import record_checksums

#: What a build replaces in its folder; other files there stay.
ENGINE_FILES = (CONFIG_FILE, engine_file("*"), weights_file("*"), CALIBRATION_FILE, *TOKENIZER_FILES)


@contextmanager
def replacing_engine(output_dir: Path, model: Path, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Give a folder to write an engine and its config to, which becomes ``output_dir``.

    It gets the tokenizer's files from the folder of the ``model``, and checksums: those that are ``known`` by then, and
    the files' own.
    """
    with replacing_folder(output_dir, ENGINE_FILES) as part:
        yield part
        copy_tokenizer_files(model, part)
        record_checksums(part, known)


def check_replaceable(folder: Path, model: Path) -> None:
    """Reject an output folder that is the ``model``'s own, or another model's."""
    if folder.resolve() == model.resolve():
        raise ConfigError(f"{folder} is the folder that the model is read from: choose another --output_dir")
    config = folder / CONFIG_FILE
    if is_file(config) and "build_config" not in read_json(config):
        raise ConfigError(f"{folder} holds a model, not an engine to replace: choose another --output_dir")
