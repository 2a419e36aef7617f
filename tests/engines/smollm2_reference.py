"""SmolLM2 as a Hugging Face folder in bfloat16, and what transformers makes of it.

``python smollm2_reference.py GGUF FOLDER``; ``FOLDER/reference.npz`` has, for each chat prompt: its tokens, the greedy
continuation in fp32, and after each token of both the logits in fp32 and in bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three uses of a hammer.",
)
NUM_TOKENS = 64


def main(gguf: Path, folder: Path) -> None:
    """Convert, and compute."""
    source = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source).to(torch.bfloat16)
    # Transformers does not save a model that it takes for a quantized one.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()  # as of the model's own files; a gguf does not say
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):  # rounded once already: fp32 has the same weights
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
            for i, question in enumerate(QUESTIONS):
                if dtype == torch.float32:
                    chat = [{"role": "user", "content": question}]
                    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(device)
                    whole = model.generate(ids, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
                    found |= {f"prompt{i}": ids[0].cpu().numpy(), f"text{i}": whole[0, ids.shape[1] :].cpu().numpy()}
                whole = np.concatenate([found[f"prompt{i}"], found[f"text{i}"]])
                logits = model(torch.from_numpy(whole)[None].to(device)).logits[0]
                found[f"{str(dtype).removeprefix('torch.')}{i}"] = logits.float().cpu().numpy()
    np.savez(folder / "reference.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
