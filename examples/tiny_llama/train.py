#!/usr/bin/env python3
"""Regenerate the example model of this folder: a Llama of 1.3 million parameters that has read Python and its docs.

Two steps, each a subcommand::

    python train.py prepare --data_dir data --docs_dir /usr/share/doc/python3.11/html/_sources
    python train.py train --data_dir data

``prepare`` needs the tokenizers library and numpy, ``train`` torch and safetensors.
"""

import argparse
import hashlib
import json
import math
import random
import re
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1

# head_dim 128 and grouped queries are what the cache kernels see in real models, so they are kept here although they
# make attention twice as large as the MLP. 128 x 4 layers x 256 then takes 2.6 MB of fp16.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float16",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}

# Llama 3's pre-tokenizer.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ---------------------------------------------------------------------------------------------------------------------
# prepare


def plain_rst(text):
    """Strip the roles of reStructuredText: ``:meth:`~dict.get <x>``` becomes ```dict.get```."""
    text = re.sub(r":[a-z][a-z:+-]*:`[~!]?([^`<]+?)(?:\s*<[^`]*>)?`", r"`\1`", text)
    return re.sub(r"^\.\. (?:_[^:]*:|index::.*|versionadded:: .*)\n(?:   .*\n)*", "", text, flags=re.M)


def is_table(text):
    """Tell whether a file is data rather than prose or code: few letters, or lines that nobody wrote by hand."""
    letters = sum(map(str.isalpha, text))
    return letters < 0.45 * len(text.replace(" ", "")) or max(map(len, text.splitlines()), default=0) > 1000


def collect(stdlib, docs):
    """Collect the text, one document per file.

    Parameters
    ----------
    stdlib : Path
        Folder of the standard library; its ``*.py`` are taken, installed packages and data tables are not.
    docs : Path
        Folder of the documentation's sources (``*.rst.txt`` or ``*.rst``).

    Returns
    -------
    list of (str, str)
        Name and text, sorted by name.
    """
    # pydoc_data repeats the documentation as one string literal, encodings are character tables.
    skip = {"site-packages", "dist-packages", "encodings", "pydoc_data", "data", "__pycache__", "cjkencodings"}
    files = []
    for path in stdlib.rglob("*.py"):
        parts = path.relative_to(stdlib).parts
        # Folder symlinks lead back into the tree in some distributions.
        if path.is_file() and not path.is_symlink() and not skip.intersection(parts[:-1]):
            files.append(("lib/" + "/".join(parts), path))
    for path in docs.rglob("*"):
        if path.is_file() and path.name.endswith((".rst.txt", ".rst")):
            files.append(("doc/" + path.relative_to(docs).as_posix(), path))
    if not any(name.startswith("doc/") for name, _ in files):
        raise SystemExit(f"no .rst or .rst.txt under {docs}: install the documentation (Debian: python3.11-doc)")

    documents = []
    for name, path in sorted(files):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        text = text.replace("\r\n", "\n").replace("\t", "        ").replace("\f", "")
        if name.startswith("doc/"):
            text = plain_rst(text)
        if len(text) < 200 or is_table(text) or (name.startswith("lib/test/") and len(text) > 250_000):
            continue
        documents.append((name, text))
    return documents


def deduplicate(documents):
    """Drop paragraphs of at least 160 characters that occurred before, and documents of which little is left."""
    seen, kept = set(), []
    for name, text in documents:
        paragraphs = []
        for paragraph in re.split(r"\n{2,}", text.strip("\n")):
            if len(paragraph) >= 160:
                digest = hashlib.sha1(" ".join(paragraph.split()).encode()).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            paragraphs.append(paragraph)
        short = "\n\n".join(paragraphs) + "\n"
        if len(short) >= 200 and len(short) >= 0.3 * len(text):
            kept.append((name, short))
    return kept


def train_tokenizer(texts):
    """Train a byte-level BPE with Llama 3's pre-tokenizer and its post-processor, which puts BOS first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
            ),
        ]
    )
    return tokenizer


def write_json(path, value):
    """Write one of the model folder's JSON files."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_configs(folder):
    """Write every JSON file of the model folder but tokenizer.json."""
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID})
    write_json(folder / "special_tokens_map.json", {"bos_token": BOS, "eos_token": EOS})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": CONFIG["max_position_embeddings"],
        },
    )


def prepare(args):
    """Collect the text, train the tokenizer, pack the tokens."""
    documents = deduplicate(collect(args.stdlib, args.docs_dir))
    random.Random(0).shuffle(documents)
    # By name, so that the split stays the same when files are added.
    held_out = [d for d in documents if int(hashlib.sha1(d[0].encode()).hexdigest(), 16) % 50 == 0]
    train_docs = [d for d in documents if d not in held_out]

    args.model_dir.mkdir(parents=True, exist_ok=True)
    args.data_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(text for _, text in train_docs)
    tokenizer.save(str(args.model_dir / "tokenizer.json"), pretty=False)
    write_configs(args.model_dir)

    packed, info = {}, {}
    for split, docs in (("train", train_docs), ("held_out", held_out)):
        ids = []
        for start in range(0, len(docs), 64):
            for encoding in tokenizer.encode_batch_fast([t for _, t in docs[start : start + 64]], False):
                ids.append(np.array([BOS_ID, *encoding.ids, EOS_ID], dtype=np.uint16))
        packed[split] = np.concatenate(ids)
        info[split] = {
            "documents": len(docs),
            "bytes": sum(len(t.encode()) for _, t in docs),
            "doc_bytes": sum(len(t.encode()) for n, t in docs if n.startswith("doc/")),
            "tokens": len(packed[split]),
        }
    np.savez_compressed(args.data_dir / "tokens.npz", **packed)
    write_json(args.data_dir / "info.json", info)
    print(json.dumps(info, indent=2))


# ---------------------------------------------------------------------------------------------------------------------
# train


def build_model():
    """Return a Llama whose weights are stacked over the layers, which is what a batched Muon wants.

    Numerically it is ``transformers.LlamaForCausalLM``.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    c = CONFIG
    layers, hidden, inner = c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"]
    heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()

            def matrix(rows, columns, gain=1.0):
                return nn.Parameter(torch.randn(layers, rows, columns) * gain * columns**-0.5)

            out_gain = (2 * layers) ** -0.5
            self.embed = nn.Parameter(torch.randn(c["vocab_size"], hidden) * 0.05)
            self.q, self.k, self.v = (matrix(n * dim, hidden) for n in (heads, kv_heads, kv_heads))
            self.o = matrix(hidden, heads * dim, out_gain)
            self.gate, self.up = matrix(inner, hidden), matrix(inner, hidden)
            self.down = matrix(hidden, inner, out_gain)
            self.attn_norm = nn.Parameter(torch.ones(layers, hidden))
            self.mlp_norm = nn.Parameter(torch.ones(layers, hidden))
            self.norm = nn.Parameter(torch.ones(hidden))
            angle = torch.arange(c["max_position_embeddings"])[:, None] * c["rope_theta"] ** (
                -torch.arange(0, dim, 2) / dim
            )
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)

        def rope(self, x):
            # Half-split ("NeoX") pairs: channel i turns with channel i + dim / 2.
            cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
            a, b = x.float().chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

        def forward(self, tokens):
            """Return logits [batch, length, vocab_size] and the queries' and keys' power for int64 [batch, length]."""

            def rms_norm(x, weight):
                return functional.rms_norm(x.float(), (hidden,), weight, c["rms_norm_eps"])

            batch, length = tokens.shape
            x, power = functional.embedding(tokens, self.embed), 0.0
            # unbind, not indexing: its gradient is one stack instead of a sum of padded slices.
            names = ("q", "k", "v", "o", "gate", "up", "down", "attn_norm", "mlp_norm")
            for wq, wk, wv, wo, gate, up, down, norm1, norm2 in zip(
                *(getattr(self, name).unbind() for name in names), strict=True
            ):
                y = functional.linear(rms_norm(x, norm1), torch.cat((wq, wk, wv)))
                y = y.view(batch, length, heads + 2 * kv_heads, dim).transpose(1, 2)
                q, k, v = y.split((heads, kv_heads, kv_heads), 1)
                power = power + y[:, : heads + kv_heads].float().square().mean()
                y = functional.scaled_dot_product_attention(
                    self.rope(q), self.rope(k), v, is_causal=True, enable_gqa=True
                )
                x = x + functional.linear(y.transpose(1, 2).reshape(batch, length, heads * dim), wo)
                y, z = functional.linear(rms_norm(x, norm2), torch.cat((gate, up))).chunk(2, -1)
                x = x + functional.linear(functional.silu(y) * z, down)
            return functional.linear(rms_norm(x, self.norm), self.embed), power

    return Llama()


def hf_tensors(model):
    """Return the weights under Hugging Face's names, fp16, on the CPU."""
    import torch

    names = {
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        **{n: f"self_attn.{n}_proj" for n in "qkvo"},
        **{n: f"mlp.{n}_proj" for n in ("gate", "up", "down")},
    }
    tensors = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm}
    for ours, theirs in names.items():
        for i, weight in enumerate(getattr(model, ours).unbind()):
            tensors[f"model.layers.{i}.{theirs}.weight"] = weight
    return {name: t.detach().to("cpu", torch.float16).contiguous() for name, t in sorted(tensors.items())}


def make_optimizer(model, device):
    """Muon (arXiv 2502.16982's scaling) for the matrices, AdamW for embedding and norms.

    Returns
    -------
    callable
        ``step(lr, weight_decay)``; updates the parameters from their gradients and clears these.
    """
    import torch

    def orthogonalize(g):
        """Newton-Schulz iteration in bf16 on a stack of matrices [layers, rows, columns]."""
        x = g.bfloat16()
        if wide := x.shape[-2] > x.shape[-1]:
            x = x.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.mT if wide else x).to(g.dtype)

    if device == "cuda":
        orthogonalize = torch.compile(orthogonalize, dynamic=False)

    matrices = [model.q, model.k, model.v, model.o, model.gate, model.up, model.down]
    momenta = [torch.zeros_like(p) for p in matrices]
    norms = [model.norm, model.attn_norm, model.mlp_norm]
    rest = [model.embed, *norms]
    # Norms that moved as fast as the embedding shrank to a tenth in a run of this width: the matrices grew against
    # them, queries and keys faded, and the loss rose again.
    groups = [{"params": [model.embed], "share": 0.5}, {"params": norms, "share": 0.05}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda")

    @torch.no_grad()
    def step(lr, weight_decay):
        grads = [p.grad for p in matrices]
        torch._foreach_lerp_(momenta, grads, 0.05)
        updates = [orthogonalize(g) for g in torch._foreach_lerp(grads, momenta, 0.95)]
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        for p, update in zip(matrices, updates, strict=True):
            # An orthogonal matrix's elements have RMS max(rows, columns)^-0.5: this makes every update's RMS 0.2 lr.
            p.add_(update, alpha=-lr * 0.2 * max(p.shape[-2:]) ** 0.5)
        for group in adam.param_groups:
            group["lr"] = lr * group["share"]
        adam.step()
        for p in matrices + rest:
            p.grad = None

    return step


def shifted(targets):
    """Return inputs that predict ``targets`` [batch, length]: BOS, then the targets but the last, as at inference."""
    import torch

    return torch.cat((torch.full_like(targets[:, :1], BOS_ID), targets[:, :-1]), 1)


def held_out_loss(logits_of, tokens, length, batch=16):
    """Return the mean loss, nats per token, over windows of ``length`` tokens, each of which starts from BOS alone."""
    import torch
    from torch.nn import functional

    windows = tokens[: len(tokens) // length * length].view(-1, length)
    total = 0.0
    with torch.no_grad():
        for y in windows.split(batch):
            logits = logits_of(shifted(y)).float()
            total += functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / windows.numel()


def open_log(path):
    """Return what prints a line, and writes it to a file."""
    file = path.open("w")

    def log(line):
        print(line, flush=True)
        print(line, file=file, flush=True)

    return log


def write_rounded(model, folder):
    """Write the weights in fp16, and round the model's own to them."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(hf_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())


def train(args):
    """Train the model and write its weights."""
    import torch
    from torch.nn import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = build_model().to(device)
    step_optimizer = make_optimizer(model, device)
    # uint16 has no indexing kernels; as int64 on the GPU the whole text takes 0.1 GB.
    data = np.load(args.data_dir / "tokens.npz")
    tokens, held = (torch.from_numpy(data[s].astype(np.int64)).to(device) for s in ("train", "held_out"))
    info = json.loads((args.data_dir / "info.json").read_text())
    bits_per_byte = info["held_out"]["tokens"] / info["held_out"]["bytes"] / math.log(2)
    log = open_log(args.log)
    gpu = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    log(f"{gpu}, torch {torch.__version__}, {sum(p.numel() for p in model.parameters())} parameters")
    log(f"train {len(tokens)} tokens, held out {len(held)} tokens, batch {args.batch_tokens} tokens, lr {args.lr}")

    def loss_of(x, y):
        with torch.autocast(device, torch.bfloat16):
            logits, power = model(x)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        # A run without this, and with a third of the weight decay, ended with scores in the thousands, where no
        # low-precision cache can follow.
        return loss + args.power_penalty * power, loss.detach()

    if device == "cuda":
        loss_of = torch.compile(loss_of, dynamic=False)

    def batch(length):
        starts = torch.randint(len(tokens) - length, (args.batch_tokens // length, 1), device=device)
        y = tokens[starts + torch.arange(length, device=device)]
        return shifted(y), y

    def evaluate():
        with torch.autocast(device, torch.bfloat16):
            loss = held_out_loss(lambda x: model(x)[0], held[: args.eval_tokens], args.length)
        return f"held out {loss:.4f} nats/token, {loss * bits_per_byte:.4f} bits/byte"

    # Compiled on gradients that are thrown away; what is left of the time is the schedule's.
    for length in (args.short_length, args.length):
        loss_of(*batch(length))[0].backward()
        step_optimizer(0.0, 0.0)
    if device == "cuda":
        torch.cuda.synchronize()
    start = last = time.perf_counter()
    budget = args.minutes * 60 - (start - args.started)
    log(f"started and compiled in {start - args.started:.0f} s")

    step = seen = 0
    recent = []
    next_log, next_eval = 0.0, 0.1
    while True:
        elapsed = time.perf_counter() - start
        done = max(elapsed / budget, step / args.max_steps if args.max_steps else 0.0)
        if done >= 1:
            break
        lr = args.lr * min(1.0, done / 0.02) * (1 - done)
        objective, loss = loss_of(*batch(args.short_length if done < args.short_share else args.length))
        objective.backward()
        step_optimizer(lr, args.weight_decay)
        step, seen = step + 1, seen + args.batch_tokens
        recent.append(loss)
        if step % 20 == 0 or args.max_steps:
            # Keeps the host's clock, which drives the schedule, from running ahead of the device.
            recent[-1].item()
        if done >= next_log:
            now = time.perf_counter()
            rate = len(recent) * args.batch_tokens / (now - last)
            mean = torch.stack(recent).mean().item()
            log(
                f"{elapsed:6.1f} s  step {step:6d}  {seen / 1e6:7.1f} M tokens  lr {lr:.2e}  "
                f"loss {mean:.4f}  {rate / 1e6:.2f} M tokens/s"
            )
            recent, last, next_log = [], now, next_log + 1 / args.log_lines
        if done >= next_eval:
            log(f"{elapsed:6.1f} s  {evaluate()}")
            next_eval, last = next_eval + 0.1, time.perf_counter()
    if recent:
        log(f"last {len(recent)} steps: loss {torch.stack(recent).mean().item():.4f}")
    minutes = (time.perf_counter() - start) / 60
    log(f"{step} steps, {seen / 1e6:.1f} M tokens = {seen / len(tokens):.1f} epochs, {minutes:.2f} minutes")

    write_rounded(model, args.model_dir)
    log("final weights, rounded to fp16, computed in fp32:")
    for name, part in (("held out", held), ("as many training tokens", tokens[: len(held)])):
        loss = held_out_loss(lambda x: model(x)[0], part, args.length)
        log(f"  {name}: {loss:.4f} nats/token" + (f", {loss * bits_per_byte:.4f} bits/byte" if part is held else ""))


def main():
    """Parse the command line and run one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, help_text):
        p = commands.add_parser(
            function.__name__, help=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        p.set_defaults(function=function)
        p.add_argument("--model_dir", type=Path, default=HERE, help="the Hugging Face folder")
        p.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of the packed tokens")
        return p

    p = command(prepare, "collect the text, train the tokenizer, pack the tokens")
    p.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="standard library")
    p.add_argument(
        "--docs_dir", type=Path, default=Path("/usr/share/doc/python3.11/html/_sources"), help="documentation sources"
    )
    p = command(train, "train the model and write its weights")
    p.add_argument("--minutes", type=float, default=2.1, help="time budget, the start included")
    p.add_argument("--max_steps", type=int, default=0, help="stop after so many steps, if that is earlier")
    p.add_argument("--batch_tokens", type=int, default=65536, help="tokens per step")
    p.add_argument("--length", type=int, default=2048, help="sequence length")
    p.add_argument("--short_length", type=int, default=512, help="sequence length of the first steps")
    p.add_argument("--short_share", type=float, default=0.7, help="share of the time that has short sequences")
    p.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    p.add_argument("--weight_decay", type=float, default=0.3, help="of the matrices")
    p.add_argument("--power_penalty", type=float, default=1e-3, help="weight of the queries' and keys' mean square")
    p.add_argument("--eval_tokens", type=int, default=1 << 18, help="held-out tokens of the evaluations on the way")
    p.add_argument("--log_lines", type=int, default=60, help="lines of loss to log")
    p.add_argument("--log", type=Path, default=HERE / "train.log", help="log file")
    p.add_argument("--seed", type=int, default=0)

    args = parser.parse_args()
    args.started = time.perf_counter()
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
