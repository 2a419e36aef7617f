"""Prompts are checked by their length before the work that it would cost."""

import pytest
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

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


def test_a_prompt_that_no_tokens_could_hold_is_tokenized_until_that_is_sure(tokenizer, monkeypatch):
    longest, encoded = tokenizer.longest_token, []
    monkeypatch.setattr(tokenizer, "encode", lambda text, _: encoded.append(text) or [1] * (3 * len(text) // longest))
    with pytest.raises(RequestError, match="30 tokens"):
        encode_prompt(tokenizer, "x" * 10 * longest, 10)
    assert encoded == ["x" * 10 * longest]
    # The limit is of bytes: of "é" there are two.
    for text in ("x" * 10**6, "é" * 10**6):
        encoded.clear()
        with pytest.raises(RequestError, match=r"bytes, too many for the 10 tokens .* shorten it"):
            encode_prompt(tokenizer, text, 10)
        assert [len(prefix) for prefix in encoded] == [10 * longest]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: setattr(t, "normalizer", normalizers.NFKC()), "\N{MATHEMATICAL BOLD CAPITAL A}" * 40_000),
        (lambda t: setattr(t, "normalizer", normalizers.NFC()), "e\N{COMBINING ACUTE ACCENT}" * 40_000),
        (lambda t: setattr(t, "normalizer", normalizers.Strip()), "def" + " " * 10**5),
        (lambda t: setattr(t, "normalizer", normalizers.Replace("ab", "")), "ab" * 10**5 + "def"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "def \n" * 30_000),
        (lambda t: t.add_special_tokens([AddedToken("<x>", rstrip=True)]), ("<x>" + " " * 300) * 100),
    ],
    ids=["NFKC", "NFC", "Strip", "Replace", "Whitespace", "rstrip"],
)
def test_a_text_that_its_tokenizer_shortens_is_measured_by_its_tokens(change, text):
    inner = tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    change(inner)
    tokenizer = Tokenizer(inner)
    ids = tokenizer.encode(text)
    assert len(text.encode()) > len(ids) * tokenizer.longest_token or len(ids) > 10_000
    assert encode_prompt(tokenizer, text, len(ids)) == ids
    with pytest.raises(RequestError, match="shorten it"):
        encode_prompt(tokenizer, text, len(ids) - 1)


def test_a_prompt_of_too_many_tokens_is_rejected_once_they_are_counted(tokenizer):
    ids = tokenizer.encode("def main():")
    assert encode_prompt(tokenizer, "def main():", len(ids)) == ids
    assert encode_prompt(tokenizer, "def main():") == ids
    with pytest.raises(RequestError, match=f"the prompt has {len(ids)} tokens and the engine takes {len(ids) - 1}"):
        encode_prompt(tokenizer, "def main():", len(ids) - 1)
