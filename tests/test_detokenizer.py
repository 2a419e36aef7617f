import pytest
from example_engine import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from saw_trtllm.runtime.detokenizer import REPLACEMENT, Detokenizer, decode_piece
from saw_trtllm.runtime.tokenizer import Tokenizer

TEXTS = [
    "plain words, and more of them",
    "def f(x):\n    return x ** 2\n",
    "Zażółć gęślą jaźń, naïve façade",
    "日本語のテキスト",
    "a 😀 b 👩‍👩‍👧 c 🏳️‍🌈",
    "e\u0301 combining",
    "  leading and trailing  ",
    "\t\n\n",
    "",
]


def byte_level():
    """Each byte a token, as byte-level BPE spells it: all characters beyond ASCII are split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def byte_fallback():
    """Llama 2's way: words begin with a sign for the space, unknown characters become bytes, the first space goes."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefgmnorstw", "▁a", "▁word", "nd"]
    merges = [("▁", "a"), ("n", "d")]
    vocab = {p: i for i, p in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


TOKENIZERS = {"bytes": byte_level(), "fallback": byte_fallback(), "example": Tokenizer.load(EXAMPLE)}


def run(tokenizer, ids, stop=(), include=False, min_tokens=0):
    """Push ids until a stop string is found: the pieces, the stop string, and how many ids were taken."""
    detokenizer = Detokenizer(tokenizer, stop, include)
    pieces = []
    for count, token in enumerate(ids, 1):
        piece, found = detokenizer.push(token, may_stop=count >= min_tokens)
        pieces += [piece] if piece else []
        if found is not None:
            assert detokenizer.flush() is None
            return pieces, found, count
    rest = detokenizer.flush()
    return pieces + ([rest] if rest else []), None, len(ids)


def check_identity(tokenizer, pieces):
    """What a client is promised: a piece's text follows from its own ids and their context."""
    for piece in pieces:
        assert piece.token_ids
        assert piece.text == decode_piece(tokenizer, piece.context_ids, piece.token_ids)[: len(piece.text)]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_up_the_text(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, stop, _ = run(tokenizer, ids)
    assert stop is None
    assert "".join(p.text for p in pieces) == tokenizer.decode(ids)
    assert tokenizer.decode(ids).strip(" ") == text.strip(" ")
    assert [i for p in pieces for i in p.token_ids] == ids
    check_identity(tokenizer, pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_piece_holds_half_a_character(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("añ日😀b", add_special_tokens=False)
    pieces, _, _ = run(tokenizer, ids)
    assert all(REPLACEMENT not in p.text for p in pieces)
    assert any(len(p.token_ids) == 4 and p.text == "😀" for p in pieces)


def test_bytes_that_are_no_character_come_out_as_replacement():
    tokenizer = TOKENIZERS["bytes"]
    smile, a = tokenizer.encode("😀"), tokenizer.encode("a")
    pieces, _, _ = run(tokenizer, [*a, *smile[:2], *a])
    assert [p.text for p in pieces] == ["a", REPLACEMENT + "a"]
    pieces, _, _ = run(tokenizer, [*a, *smile[:3]])
    assert [p.text for p in pieces] == ["a", REPLACEMENT]
    check_identity(tokenizer, pieces)


def test_tokens_that_the_tokenizer_does_not_know_are_silent():
    """A model's vocabulary may be padded beyond its tokenizer's."""
    tokenizer = TOKENIZERS["bytes"]
    a, b = tokenizer.encode("ab")
    pieces, _, _ = run(tokenizer, [a, 5000, b])
    assert "".join(p.text for p in pieces) == "ab"
    assert [i for p in pieces for i in p.token_ids] == [a, 5000, b]


# -- stop strings


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_several_tokens(include):
    tokenizer = TOKENIZERS["bytes"]
    pieces, stop, taken = run(tokenizer, tokenizer.encode("one STOP two"), ["STOP"], include)
    assert stop == "STOP"
    assert taken == len("one STOP")
    assert "".join(p.text for p in pieces) == ("one STOP" if include else "one ")
    assert "".join(tokenizer.decode(p.token_ids) for p in pieces) == "one STOP"
    check_identity(tokenizer, pieces)


def test_what_may_be_a_stop_string_is_held_back():
    tokenizer = TOKENIZERS["bytes"]
    detokenizer = Detokenizer(tokenizer, ["aab"])
    shown = [detokenizer.push(t)[0] for t in tokenizer.encode("caaac")]
    assert [p.text if p else None for p in shown] == ["c", None, None, None, "aaac"]
    pieces, stop, _ = run(tokenizer, tokenizer.encode("caaab"), ["aab"])
    assert (["".join(p.text for p in pieces)], stop) == (["ca"], "aab")


def test_the_earliest_stop_string_counts():
    tokenizer = TOKENIZERS["example"]
    ids = tokenizer.encode("x = [1, 2]; print(x)", add_special_tokens=False)
    pieces, stop, _ = run(tokenizer, ids, ["print", "]", "2]"])
    assert stop == "2]"
    assert "".join(p.text for p in pieces) == "x = [1, "


def test_no_stop_before_min_tokens():
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("a.b.c.")
    pieces, stop, taken = run(tokenizer, ids, ["."], min_tokens=3)
    assert ("".join(p.text for p in pieces), stop, taken) == ("a.b", ".", 4)


def test_held_text_is_given_at_the_end():
    tokenizer = TOKENIZERS["bytes"]
    pieces, stop, _ = run(tokenizer, tokenizer.encode("abST"), ["STOP"])
    assert (pieces[-1].text, stop) == ("ST", None)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    text=st.text(st.sampled_from("ab .\nż日😀"), max_size=25),
    stops=st.lists(st.text(st.sampled_from("ab .ż😀"), min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_text_up_to_the_first_stop_string(name, text, stops, include):
    """The oracle decodes all ids so far anew at each token."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = (tokenizer.decode(ids), None, len(ids))
    for count in range(1, len(ids) + 1):
        so_far = tokenizer.decode(ids[:count])
        found = [(so_far.find(s), s) for s in stops if s in so_far]
        if found:
            at, stop = min(found)
            expected = (so_far[: at + len(stop) * include], stop, count)
            break
    pieces, stop, count = run(tokenizer, ids, stops, include)
    assert ("".join(p.text for p in pieces), stop, count) == expected
    assert [i for p in pieces for i in p.token_ids] == ids[:count]
    check_identity(tokenizer, pieces)


def test_without_a_tokenizer_there_are_ids_alone():
    pieces, stop, _ = run(None, [5, 6, 7])
    assert stop is None
    assert [(p.token_ids, p.text) for p in pieces] == [([5], ""), ([6], ""), ([7], "")]
