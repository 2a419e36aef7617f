"""Small tokenizers of every kind that Llama, Mistral and Qwen have."""

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.example import EXAMPLE

SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>")
_SPACED = "▁"
_WORDS = ("▁a", "▁hello", "▁world", "▁fox", "▁", "▁▁", "▁▁▁", "nd")


def _add_tokens(backend):
    backend.add_special_tokens(list(SPECIAL))
    backend.add_tokens([AddedToken("<think>", normalized=False)])  # Qwen3's is shown
    return backend


def byte_level(decoder=None):
    """Llama 3's and Qwen's way: each byte a character of the vocabulary, some merged to words and halves of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("f", "o"), ("fo", "x"), ("Ġ", "fox"), ("Ġ", "w"), ("æ", "Ĺ"), (".", "."), ("Ċ", "Ċ"), ("x", "æ")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoder or decoders.ByteLevel()
    return _add_tokens(backend)


def _metaspace_model():
    characters = [chr(c) for c in range(0x21, 0x7F)]
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *characters, "é", *_WORDS]
    merges = [("n", "d"), (_SPACED, "a"), (_SPACED, _SPACED)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)


def byte_fallback(strip=True, legacy=False):
    """Llama 2's and Mistral's way: words begin with a sign for the space, characters without a token become bytes."""
    backend = Backend(_metaspace_model())
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACED), normalizers.Replace(" ", _SPACED)])
    else:
        scheme = "first" if strip else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(_SPACED, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    return _add_tokens(backend)


def metaspace(scheme):
    """Tokenizers converted from SentencePiece's by older scripts."""
    backend = Backend(_metaspace_model())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _add_tokens(backend)


def words():
    """Without a decoder, as benchmarks write them."""
    names = ["abcdef", "hello", "world", "fox", "a", "é", "日"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _add_tokens(backend)


BACKENDS = {
    "byte level": byte_level(),
    "byte level in a sequence": byte_level(decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])),
    "byte fallback": byte_fallback(),
    "byte fallback, legacy": byte_fallback(legacy=True),
    "byte fallback, no prefix space": byte_fallback(strip=False),
    "metaspace": metaspace("always"),
    "metaspace, never": metaspace("never"),
    "words": words(),
    "example": Backend.from_file(str(EXAMPLE / "tokenizer.json")),
}
TOKENIZERS = {name: Tokenizer(backend) for name, backend in BACKENDS.items()}
#: Decoders that none of the families has.
OTHERS = [
    decoders.WordPiece(),
    decoders.CTC(),
    decoders.BPEDecoder(),
    decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
    decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+"), "b")]),
    decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
]
