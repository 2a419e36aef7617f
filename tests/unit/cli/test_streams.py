"""Standard streams that are closed, full, or of another encoding than UTF-8."""

import json
import shlex
import subprocess
import sys

ECHO = """
import sys
from saw_trtllm.cli.common import run
def body():
    descriptor = open(sys.argv[1]).fileno()
    assert descriptor > 2, descriptor
    for line in sys.stdin:
        print(line, end="")
    print("ë", file=sys.stderr)
sys.exit(run(body))
"""


def shell(streams, arguments=("-c", ECHO, __file__), **variables):
    """Run Python in a shell with these redirections; its exit code and what it wrote."""
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(map(str, [sys.executable, *arguments]))} {streams}"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "LC_ALL": "C.UTF-8", **variables},
        capture_output=True,
        timeout=120,
    )
    return done.returncode, done.stdout.decode("utf-8", "surrogateescape"), done.stderr.decode()


def test_an_output_that_cannot_be_written_is_one_sentence():
    said = "error: the output cannot be written (No space left on device): make room, or write it elsewhere\n"
    assert shell("<<<x >/dev/full") == (2, "", f"ë\n{said}")


def test_streams_may_be_closed():
    """Nor does a file that is opened later get what is written to one of them."""
    assert shell(">&- <&- 2>&-") == (0, "", "")


def test_no_character_ends_a_command(engine):
    for encoding in ("utf-8", "ascii"):
        code, text, _ = shell(r"< <(printf 'd\xffb\n')", PYTHONIOENCODING=f"{encoding}:strict")
        assert (code, text) == (0, r"d\udcffb" + "\n")
    asked = ["--engine_dir", engine("saw_int4"), "--input_text", "dëf", "--max_output_len", 2, "--json"]
    code, text, said = shell("", ["-m", "saw_trtllm.cli.run", *asked], PYTHONIOENCODING="ascii")
    assert (code, json.loads(text)["prompt"], said) == (0, "dëf", "")
