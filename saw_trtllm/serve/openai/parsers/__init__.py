"""What a model's text says beside its answer: one module a format, each a parser that takes the text as it grows."""
