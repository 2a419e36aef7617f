"""The file for ``trtllm-build --model_cls_file``.

That command loads the file under a name of its own. The classes are only named here and live in an importable module,
so that its worker processes find them again.
"""

from saw_trtllm.backends.tensorrt_llm.models import (
    SawGemmaForCausalLM,
    SawLLaMAForCausalLM,
    SawMistralForCausalLM,
    SawQWenForCausalLM,
)

__all__ = ["SawGemmaForCausalLM", "SawLLaMAForCausalLM", "SawMistralForCausalLM", "SawQWenForCausalLM"]
