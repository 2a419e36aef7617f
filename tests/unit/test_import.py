import subprocess
import sys

BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not here")

BLOCKED = ("torch", "tensorrt", "tensorrt_llm", "cuda", "tritonclient", "pytriton", "transformers")
BLOCKED += ("fastapi", "uvicorn", "prometheus_client", "llguidance")
sys.meta_path.insert(0, Block())
"""


def run(code, *argv):
    return subprocess.run([sys.executable, "-c", BLOCK + code, *argv], capture_output=True, text=True, timeout=120)


def test_the_package_needs_neither_torch_nor_tensorrt():
    modules = (
        "engine.config, format, model.fold, build, llm, plan.plan, cli.build, cli.run, cli.convert, checkpoint, "
        "backends.tensorrt.build"
    )
    imports = "".join(f"import saw_trtllm.{name}\n" for name in modules.split(", "))
    done = run(f"import saw_trtllm\n{imports}assert saw_trtllm.LLM and saw_trtllm.SamplingParams(max_tokens=3)")
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_package_offers_can_be_seen_before_it_is_used():
    done = run("import saw_trtllm; print(set(saw_trtllm.__all__) - set(dir(saw_trtllm)))")
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_an_engine_of_the_reference_says_what_it_lacks(engine):
    code = (
        "import sys; from saw_trtllm.cli.run import main; sys.exit(main(['--engine_dir', sys.argv[1], *sys.argv[2:]]))"
    )
    done = run(code, str(engine("saw_int4")), "--input_text", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: the reference backend needs PyTorch, which is not installed: pip install 'saw-trtllm[reference]'\n"
    )
