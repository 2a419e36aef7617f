"""Prompts are checked by their length before the work that it would cost."""

import pytest

from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.prompt import encode_prompt
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.example import EXAMPLE


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(EXAMPLE)


def test_no_token_stands_for_more_bytes_than_the_longest(tokenizer):
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.vocab_size)]
    assert max(len(text.encode()) for text in texts) <= tokenizer.longest_token


def test_a_prompt_that_no_tokens_could_hold_is_never_tokenized(tokenizer, monkeypatch):
    most = 10 * tokenizer.longest_token
    encoded = []
    monkeypatch.setattr(tokenizer, "encode", lambda text, special: encoded.append(text) or [1] * 10)
    assert encode_prompt(tokenizer, "x" * most, 10) == [1] * 10
    # The limit is of bytes: of "é" there are two.
    for text in ("x" * (most + 1), "é" * (most // 2 + 1)):
        with pytest.raises(RequestError, match=r"bytes, too many for the 10 tokens .* shorten it"):
            encode_prompt(tokenizer, text, 10)
    assert encoded == ["x" * most]


def test_a_prompt_of_too_many_tokens_is_rejected_once_they_are_counted(tokenizer):
    ids = tokenizer.encode("def main():")
    assert encode_prompt(tokenizer, "def main():", len(ids)) == ids
    assert encode_prompt(tokenizer, "def main():") == ids
    with pytest.raises(RequestError, match=f"the prompt has {len(ids)} tokens and the engine takes {len(ids) - 1}"):
        encode_prompt(tokenizer, "def main():", len(ids) - 1)
