"""Engines, checkpoints, models and calibrations with one file damaged: each opens, or gives one sentence."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType

from benchmarks.soak.mutations import mutate_safetensors, mutate_text
from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.build import build, plan_build
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.errors import SawError
from saw_trtllm.plan.options import BuildOptions

#: Seconds that opening may take.
LIMIT = 60


class Hang(BaseException):
    """Nothing happened for too long. No handler of exceptions may take it for one."""


def _engine(folder: Path, rng: Random) -> None:
    with LLM(folder, kv_cache_config=KvCacheConfig(256), verify=rng.random() < 0.5) as llm:
        llm.generate("def f(", SamplingParams(max_tokens=2))


def _plan(**source: Path) -> None:
    plan_build(BuildOptions(output_dir=Path("engine"), backend="reference", max_seq_len=256, **source))


def soak_files(count: int, seed: int, model: Path) -> Counter[str]:
    """Damage ``count`` files, one at a time; keys of the result in capitals are losses.

    Parameters
    ----------
    count, seed : int
    model : Path
        Hugging Face folder of a small model with a tokenizer.
    """
    import torch

    rng, counts = Random(seed), Counter()
    counts["UNEXPECTED"] = counts["HANGS"] = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        checkpoint = Checkpoint.open(model)
        engine, ckpt, calibration = root / "engine", root / "checkpoint", root / "calibration" / "calib.safetensors"
        build(plan_build(BuildOptions(model_dir=model, output_dir=engine, backend="reference", max_seq_len=256)))
        save_checkpoint(checkpoint, ckpt)
        calibration.parent.mkdir()
        calibrate(checkpoint, torch.arange(1, 513).view(2, 256)).save(calibration)
        openers: dict[Path, Callable[[Path], None]] = {
            engine: lambda folder: _engine(folder, rng),
            ckpt: lambda folder: _plan(checkpoint_dir=folder),
            Path(model): lambda folder: _plan(model_dir=folder),
            calibration.parent: lambda folder: Calibration.load(folder / calibration.name).check(checkpoint),
        }
        for i in range(count):
            whole, open_ = list(openers.items())[i % len(openers)]
            damaged = root / "damaged"
            shutil.copytree(whole, damaged, copy_function=_link)
            what = _damage(damaged, rng)
            counts[_open(lambda open_=open_, damaged=damaged: open_(damaged), f"{whole.name}, {what}")] += 1
            shutil.rmtree(damaged)
        counts["files"] = count
    return counts


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _damage(folder: Path, rng: Random) -> str:
    """Damage one file of a folder; what was done."""
    path = rng.choice(sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".engine")))
    data = path.read_bytes()
    path.unlink()  # what is written is another file than the one it links to
    kind = rng.random()
    if kind < 0.03:
        return f"{path.name} is missing"
    if kind < 0.06:
        path.mkdir()
        return f"{path.name} is a folder"
    mutate = mutate_text if path.suffix == ".json" else mutate_safetensors
    path.write_bytes(mutate(data, rng))
    return f"{path.name} is damaged"


def _open(open_: Callable[[], None], what: str) -> str:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        open_()
    except SawError as e:
        if "\n" in str(e):
            print(f"{what}: more than one line: {e}")
            return "UNEXPECTED"
        return "rejected"
    except Hang:
        print(f"{what}: no end after {LIMIT} s\n{traceback.format_exc(limit=-4)}")
        return "HANGS"
    except Exception:
        print(f"{what}:\n{traceback.format_exc(limit=-4)}")
        return "UNEXPECTED"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    return "opened"
