"""What the reference says to a few prompts, for engines that run where it does not.

``python -m tests.support.reference_texts FILE`` writes it for all formats of the cache; tests read the file that the
variable ``SAW_TEST_REFERENCE`` names, or ask the reference themselves.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.support.example import build_example

PROMPTS = (
    "def read_config(path):",
    "import os\nimport sys\n\n",
    "class Scheduler:\n    def __init__(self, blocks):\n",
    "for name in sorted(os.listdir(folder)):\n    ",
    "# The module provides",
    "try:\n    value = int(text)\nexcept",
)
TOKENS = 64

#: A prompt's tokens, the text's, and how far the likeliest was ahead of the second at each.
Text = tuple[list[int], list[int], list[float]]


def load(kv: str, folder: Path) -> list[Text]:
    """Texts of a format; ``folder`` is one to work in."""
    path = os.environ.get("SAW_TEST_REFERENCE")
    return json.loads(Path(path).read_text())[kv] if path else make(kv, folder)


def make(kv: str, folder: Path) -> list[Text]:
    """Ask the reference."""
    from saw_trtllm import LLM, SamplingParams

    options = {"kv": kv, "gather_generation_logits": True, "max_seq_len": 1024}
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, return_generation_logits=True)
    with LLM(build_example(folder / kv, **options)) as llm:
        outputs = llm.generate(list(PROMPTS), params)
    texts = []
    for output in outputs:
        completion = output.outputs[0]
        gaps = np.diff(np.sort(completion.generation_logits, axis=1)[:, -2:])[:, 0]
        texts.append((list(output.prompt_token_ids), completion.token_ids, gaps.round(4).tolist()))
    return texts


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        every = {kv: make(kv, Path(temporary)) for kv in ("fp16", "int4", "saw_int4")}
    Path(sys.argv[1]).write_text(json.dumps(every))
