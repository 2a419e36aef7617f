"""docs/serve.md: its snippets run, and its table is the one that answers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saw_trtllm.serve.openai.errors import table

PAGE = (Path(__file__).parents[4] / "docs" / "serve.md").read_text()
SNIPPETS = re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.DOTALL)


def test_the_table_of_errors_is_the_servers():
    assert f"<!-- errors -->\n{table()}\n<!-- /errors -->" in PAGE


@pytest.mark.parametrize(("language", "code"), SNIPPETS)
def test_a_snippet_runs(url, language, code):
    command = (
        ["bash", "-c", f"URL={url}\n{code}"] if language == "bash" else [sys.executable, "-c", f"URL={url!r}\n{code}"]
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    if language == "bash":  # curl ends well with an error's body too
        assert json.loads(done.stdout)["choices"]
