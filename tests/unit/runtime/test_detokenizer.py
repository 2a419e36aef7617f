import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saw_trtllm.runtime.detokenizer import Detokenizer
from saw_trtllm.runtime.stop_matcher import Match, StopMatcher
from saw_trtllm.runtime.token_decoder import REPLACEMENT
from tests.support.tokenizers import TOKENIZERS as FAMILIES

#: Those whose text is what was tokenized.
TOKENIZERS = {name: FAMILIES[name] for name in ("byte level", "byte fallback", "example")}

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


def run(tokenizer, ids, stop=(), include=False, min_tokens=0):
    """Push ids until a stop string is found: the pieces, the stop string, and how many ids were taken."""
    detokenizer = Detokenizer(tokenizer, stop, include)
    pieces = []
    for count, token in enumerate(ids, 1):
        piece, found = detokenizer.push(token, may_stop=count >= min_tokens)
        pieces += [piece] if piece else []
        if found is not None:
            assert detokenizer.flush()[:2] == ([], "")
            return pieces, found, count
    rest = detokenizer.flush()
    return pieces + ([rest] if rest.token_ids or rest.text else []), None, len(ids)


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


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_piece_holds_half_a_character(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("añ日😀b", add_special_tokens=False)
    pieces, _, _ = run(tokenizer, ids)
    assert all(REPLACEMENT not in p.text for p in pieces)
    assert any(len(p.token_ids) >= 4 and p.text.endswith(("😀", "😀b")) for p in pieces)


def test_bytes_that_are_no_character_come_out_as_replacement():
    tokenizer = TOKENIZERS["byte level"]
    smile, a = tokenizer.encode("😀"), tokenizer.encode("a")
    pieces, _, _ = run(tokenizer, [*a, *smile[:2], *a])
    assert [p.text for p in pieces] == ["a", REPLACEMENT + "a"]
    pieces, _, _ = run(tokenizer, [*a, *smile[:3]])
    assert [p.text for p in pieces] == ["a", REPLACEMENT]


def test_tokens_that_the_tokenizer_does_not_know_are_silent():
    """A model's vocabulary may be padded beyond its tokenizer's."""
    tokenizer = TOKENIZERS["byte level"]
    a, b = tokenizer.encode("ab")
    pieces, _, _ = run(tokenizer, [a, 5000, b])
    assert "".join(p.text for p in pieces) == "ab"
    assert [i for p in pieces for i in p.token_ids] == [a, 5000, b]


# -- stop strings


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_several_tokens(include):
    tokenizer = TOKENIZERS["byte level"]
    pieces, stop, taken = run(tokenizer, tokenizer.encode("one STOP two"), ["STOP"], include)
    assert stop == "STOP"
    assert taken == len("one STOP")
    assert "".join(p.text for p in pieces) == ("one STOP" if include else "one ")
    assert "".join(tokenizer.decode(p.token_ids) for p in pieces) == "one STOP"


def test_what_may_be_a_stop_string_is_held_back():
    tokenizer = TOKENIZERS["byte level"]
    detokenizer = Detokenizer(tokenizer, ["aab"])
    shown = [detokenizer.push(t)[0] for t in tokenizer.encode("caaac")]
    assert [p.text if p else None for p in shown] == ["c", None, None, "a", "aac"]
    pieces, stop, _ = run(tokenizer, tokenizer.encode("caaab"), ["aab"])
    assert (["".join(p.text for p in pieces)], stop) == (["ca"], "aab")


def test_the_earliest_stop_string_counts():
    tokenizer = TOKENIZERS["example"]
    ids = tokenizer.encode("x = [1, 2]; print(x)", add_special_tokens=False)
    pieces, stop, _ = run(tokenizer, ids, ["print", "]", "2]"])
    assert stop == "2]"
    assert "".join(p.text for p in pieces) == "x = [1, "


def test_no_stop_before_min_tokens():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a.b.c.")
    pieces, stop, taken = run(tokenizer, ids, ["."], min_tokens=3)
    assert ("".join(p.text for p in pieces), stop, taken) == ("a.b", ".", 4)


def test_held_text_is_given_at_the_end():
    tokenizer = TOKENIZERS["byte level"]
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
    """The oracle decodes all ids so far anew at each token, after another one: a first space counts, shown or not."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    before = tokenizer.encode("b", add_special_tokens=False)
    expected = (tokenizer.decode(ids), None, len(ids))
    for count in range(1, len(ids) + 1):
        so_far = tokenizer.decode([*before, *ids[:count]]).removeprefix("b")
        found = [(so_far.find(s), s) for s in stops if s in so_far]
        if found:
            at, stop = min(found)
            shown = so_far[: at + len(stop) * include]
            expected = (shown.removeprefix(" " if name == "byte fallback" else ""), stop, count)
            break
    pieces, stop, count = run(tokenizer, ids, stops, include)
    assert ("".join(p.text for p in pieces), stop, count) == expected
    assert [i for p in pieces for i in p.token_ids] == ids[:count]


def test_without_a_tokenizer_there_are_ids_alone():
    pieces, stop, _ = run(None, [5, 6, 7])
    assert stop is None
    assert [(p.token_ids, p.text) for p in pieces] == [([5], ""), ([6], ""), ([7], "")]


# -- the matcher


@settings(max_examples=300, deadline=None)
@given(
    symbols=st.lists(st.text("ab", max_size=4), max_size=8),
    runs=st.lists(st.text("ab", min_size=1, max_size=5), max_size=5),
)
def test_matches_are_those_of_a_plain_search(symbols, runs):
    matcher, text = StopMatcher(runs), ""
    for part in symbols:
        ends = range(len(text) + 1, len(text) + len(part) + 1)
        text += part
        found = [
            Match(end - len(run), end, i) for end in ends for i, run in enumerate(runs) if text[:end].endswith(run)
        ]
        match = matcher.push(part)
        assert (match is None) == (not found)
        if match:
            assert match[:2] == min(found)[:2]
            assert runs[match.run] == text[match.start : match.end]
        held = [n for run in runs for n in range(len(run) + 1) if text.endswith(run[:n])]
        assert matcher.settled == len(text) - max(held, default=0)


class Counted(str):
    """Text that counts how often it is looked at."""

    looks = 0

    def __hash__(self):
        Counted.looks += 1
        return super().__hash__()


def test_the_work_for_a_symbol_does_not_grow_with_the_runs():
    """Each symbol moves on by at most one, so all fallbacks together are no more than the symbols."""
    symbols = [Counted(c) for c in "ab" * 500]
    for runs in (["ab" * 8000 + "c"], ["ab" * n + "c" for n in range(1, 120)]):
        matcher = StopMatcher(runs)
        Counted.looks = 0
        matcher.push(symbols)
        assert Counted.looks <= 2 * len(symbols)
