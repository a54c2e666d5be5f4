"""GPT-2 as BioMedLM uses it (arXiv 2403.18421): the model, generation, folders, fused ops.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig.preset("biomedlm"))            # random weights
    model = GPT.from_pretrained("out/pubmed")            # a run, or a Hugging Face GPT-2
    python model.py export --init out/pubmed --out DIR   # a folder that `transformers` opens

Reads and writes the folders of runs and of Hugging Face's GPT-2. Leaves out training (train.py) and
task heads (finetune.py).

Legend: B batch, T time, C width, H heads, D head width (C = H·D), V vocabulary, N = B·T rows.

The model calls five fused ops: layer_norm, add_layer_norm, bias_gelu, attention, cross_entropy.
Each computes what its name says; an op with dropout draws its mask from a seed. In the second half
of this file each stands in the same order: a note that derives its backward, the reference (plain
PyTorch, any dtype), the forward kernel, the backward kernel, the autograd wiring, the public op. A
CUDA tensor takes the Triton kernel, TRITON_INTERPRET=1 runs the same kernel on the CPU, anything
else (no GPU, no triton) the reference. Statistics, softmax and sums are fp32.
"""

import argparse
import json
import math
import os
import pickle
import shutil
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
except ImportError:  # pytorch_model.bin holds the same
    load_file = None
    SafetensorError = RuntimeError

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows: the references run
    triton = tl = constexpr = None


# ---------------------------------------------------------------------------------------------
# the model


class Linear(nn.Linear):
    """nn.Linear, y = x Wᵀ + b, whose one-row products are fast on a CPU (see `linear`)."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)

    def without_bias(self, x):
        """x Wᵀ alone: the fused op that follows adds the bias."""
        return linear(x, self.weight)


class LayerNorm(nn.LayerNorm):
    """Add a branch's output to the residual stream, and normalise the sum, in one fused op."""

    def forward(self, branch, residual, dropout_p, seed):
        """(B, T, C) each, branch None before the first block -> LayerNorm(sum), sum.

        sum = residual + dropout(branch), in fp32 as residual is.
        """
        if branch is None:
            return layer_norm(residual, self.weight, self.bias, self.eps), residual
        return add_layer_norm(branch, residual, self.weight, self.bias, self.eps, dropout_p, seed)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention; logits q·k / sqrt(D) / (layer_idx + 1)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        C = config.n_embd
        self.c_attn = Linear(C, 3 * C)
        self.c_proj = Linear(C, C)
        self.n_head = config.n_head
        self.layer_idx = layer_idx
        self.scale = (C // config.n_head) ** -0.5
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1

    def forward(self, x, dropout_p, seed, cache=None, mask=None):
        """x (B, T, C) -> (B, T, C); dropout is of the attention probabilities.

        Without cache and mask it is causal. cache: a KVCache of earlier tokens, which x continues.
        mask: bool, broadcasts to (B, H, T, S), True where one of x's T tokens sees one of all S.
        """
        qkv = self.c_attn(x)  # (B, T, C) -> (B, T, 3C), packed [q | k | v]
        # RoPE would go here, before both paths: turn the q and k columns of qkv by their positions.
        # GPT.hidden knows the positions and would hand them down; wpe would go.
        if cache is None and mask is None:
            y = self.causal(qkv, dropout_p, seed)
        else:
            q, k, v = split_heads(qkv, self.n_head)  # (B, T, 3C) -> three times (B, H, T, D)
            if cache is not None:
                k, v = cache.append(self.layer_idx, k, v)  # (B, H, T, D) -> (B, H, S, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p,
                                               scale=self.scale)
            y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        return self.c_proj(y)

    @torch.compiler.disable  # else each block is compiled anew, because their scales differ
    def causal(self, qkv, dropout_p, seed):
        return attention(qkv, self.n_head, self.scale, dropout_p, seed)


class MLP(nn.Module):
    """GELU between two linear layers, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_fc = Linear(C, 4 * C)
        self.c_proj = Linear(4 * C, C)

    def forward(self, x):
        x = self.c_fc.without_bias(x)  # (B, T, C) -> (B, T, 4C)
        x = bias_gelu(x, self.c_fc.bias)  # gelu(x + bias)
        return self.c_proj(x)  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """One pre-LayerNorm layer."""

    # In plain form a block is two lines:
    #
    #     x = x + dropout(attn(ln_1(x)))
    #     x = x + dropout(mlp(ln_2(x)))
    #
    # After every "x + dropout(branch)" comes a LayerNorm, and both are one fused op. But the second
    # sum's LayerNorm belongs to the next block (after the last block: ln_f). So x travels between
    # blocks as a pair (branch, residual) that stands for x = residual + dropout(branch), and the
    # next LayerNorm adds it up. The arithmetic is the same, one op later.

    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, branch, residual, seed, cache=None, mask=None):
        """branch (B, T, C) or None before the first block, residual (B, T, C) fp32 -> such a pair.

        The three dropout masks come from seed, seed + 1 and seed + 2.
        """
        dropout_p = self.dropout if self.training else 0.0
        x, residual = self.ln_1(branch, residual, dropout_p, seed)
        branch = self.attn(x, dropout_p, seed + 1, cache, mask)
        x, residual = self.ln_2(branch, residual, dropout_p, seed + 2)
        return self.mlp(x), residual


class GPT(nn.Module):
    """Embeddings, blocks, a last LayerNorm, and a head that is the embedding matrix again (tied).

    Parameter names are Hugging Face's, so a released checkpoint loads by name.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: save memory, run blocks again in backward
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.n_positions, config.n_embd),
            h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            ln_f=LayerNorm(config.n_embd, config.layer_norm_epsilon)))
        std = config.initializer_range
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0.0, std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # GPT-2: the last layer of a branch starts smaller, since 2 * n_layer branches are added up
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, 0.0, std / math.sqrt(2 * config.n_layer))

    def n_params(self):
        """Parameters, the tied head counted once: 2,594,247,680 for BioMedLM."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, idx, cache=None, positions=None, mask=None):
        """Final hidden states, after ln_f: idx (B, T) int64 -> (B, T, C).

        cache: a KVCache of earlier tokens, which idx continues. ValueError past the context.

        positions (B, T) int64 and mask (bool, broadcasts to (B, H, T, T), True where a token sees
        another) let a row hold a prefix and several continuations of it: each position lies within
        the context, though T may exceed it. By default positions are 0, 1, ..., and all is causal.
        """
        T = idx.size(1)
        length = T if cache is None else cache.length + T
        if positions is None and length > self.config.n_positions:
            raise ValueError(f"{length} tokens are more than the context of "
                             f"{self.config.n_positions}: shorten the input")
        if cache is not None:
            positions, mask = cache.place(T, idx.device)
        elif positions is None:
            positions = torch.arange(T, device=idx.device)
        residual = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        seed = 0
        dropout_p = self.config.dropout if self.training else 0.0
        if dropout_p > 0:
            residual = F.dropout(residual, dropout_p)
            # One draw from the CPU's generator for all blocks: no wait for the GPU, the same masks
            # when a checkpointed block runs again, and torch.manual_seed makes a step repeatable.
            seed = int(torch.randint(2**31 - 4 * self.config.n_layer - 4, ()))
        branch = None
        for block in self.transformer.h:
            state = (branch, residual, seed, cache, mask)
            if self.activation_checkpointing and self.training:
                branch, residual = torch.utils.checkpoint.checkpoint(block, *state,
                                                                     use_reentrant=False)
            else:
                branch, residual = block(*state)
            seed += 4  # the next block's masks are others
        x, _ = self.transformer.ln_f(branch, residual, dropout_p, seed)
        return x

    def forward(self, idx, targets=None):
        """idx (B, T) int64. Without targets: (logits (B, T, V), None).

        With targets (B, T) int64, already shifted, -100 = ignored: (None, mean loss in nats). The
        whole logits never exist then.
        """
        x = self.hidden(idx)  # (B, T, C)
        head = self.transformer.wte.weight  # (V, C)
        if targets is None:
            return F.linear(x, head), None
        return None, cross_entropy(x.flatten(0, 1), head, targets.flatten())

    # generate, config_of, from_pretrained and save_pretrained are functions in the acts below, and
    # join this class there.


# ---------------------------------------------------------------------------------------------
# configuration


@dataclass
class GPTConfig:
    """Shape of a GPT-2; the defaults are the released BioMedLM's (its config.json)."""

    n_layer: int = 32
    n_head: int = 20
    n_embd: int = 2560
    n_positions: int = 1024  # the context, in tokens
    vocab_size: int = 28896
    dropout: float = 0.1  # BioMedLM: on embeddings, residual branches and attention probabilities
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02  # standard deviation of new weights
    scale_attn_by_inverse_layer_idx: bool = True  # BioMedLM: only config.json says so
    eot_id: int | None = None  # end-of-text; None: the last id, as in BioMedLM and GPT-2

    def __post_init__(self):
        if self.eot_id is None:
            self.eot_id = 10**6
        for field in fields(self):
            value = getattr(self, field.name)
            kind = type(field.default)
            least, most = LIMITS[kind]
            if field.name == "n_layer":
                most = 1000  # more would take minutes to build and to refuse
            if type(value) not in (int, kind) or not least <= value <= most:
                raise ValueError(f"{field.name} is {value!r}: use a value from {least} to {most}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}: "
                             "choose a width that is a multiple of the number of heads")
        # Hugging Face's default is GPT-2's 50256, in a smaller vocabulary too: the last id is meant
        self.eot_id = min(self.eot_id, self.vocab_size - 1)

    @staticmethod
    def preset(name, **overrides):
        """A shape of PRESETS; `overrides` replace its fields."""
        return GPTConfig(**{**PRESETS[name], **overrides})

    def to_hf(self):
        """The fields of Hugging Face's GPT2Config, for config.json."""
        named = {HF_NAMES.get(name, name): value for name, value in asdict(self).items()}
        return {
            **named,
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "n_ctx": self.n_positions,  # older readers look for it
            "n_inner": None,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
            "attn_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
            "bos_token_id": self.eot_id,
        }

    @staticmethod
    def from_hf(hf):
        """GPTConfig of a parsed config.json; ValueError where it describes another architecture."""
        ours = {HF_NAMES.get(field.name, field.name): field.name for field in fields(GPTConfig)}
        given = {ours[name]: value for name, value in hf.items() if name in ours}
        eot_id = given.get("eot_id")
        if isinstance(eot_id, list):
            given["eot_id"] = eot_id[0] if eot_id else None
        config = GPTConfig.preset("gpt2-124m", **given)  # its fields are Hugging Face's defaults
        wanted = {
            "model_type": ["gpt2"],
            "activation_function": ["gelu_new", "gelu_pytorch_tanh"],  # two names of one function
            "scale_attn_weights": [True],
            "n_inner": [None, 4 * config.n_embd],
        }
        for key, allowed in wanted.items():
            if hf.get(key, allowed[0]) not in allowed:
                raise ValueError(f"config.json has {key}={hf[key]!r}, this model is a GPT-2 with "
                                 f"{key}={allowed[0]!r}: use a GPT-2 folder")
        for key in ("embd_pdrop", "attn_pdrop"):
            if hf.get(key, 0.1) != config.dropout:  # 0.1: Hugging Face's default
                print(f"warning: config.json's {key} is ignored, resid_pdrop's rate "
                      f"{config.dropout} is used in its place", file=sys.stderr)
        return config


# Least and most of each field of GPTConfig, by the type of its default.
LIMITS = {int: (1, 10**6), float: (0.0, 0.99), bool: (False, True), type(None): (0, 10**6)}
HF_NAMES = {"dropout": "resid_pdrop", "eot_id": "eos_token_id"}  # the other fields are named alike

PRESETS = {
    # our choice: two layers learn the demo's 320 facts, on two CPU cores, in about a minute
    "demo": dict(n_layer=2, n_head=4, n_embd=128, n_positions=128, vocab_size=2048, dropout=0.0),
    "gpt2-124m": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257,
                      scale_attn_by_inverse_layer_idx=False),
    "biomedlm-125m": dict(n_layer=12, n_head=12, n_embd=768),  # BioMedLM: size of its ablations
    "biomedlm": dict(),
}


# ---------------------------------------------------------------------------------------------
# generation


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None,
             num_beams=1, no_repeat_ngram_size=0, length_penalty=1.0, eot_id=None, n_pad=None):
    """Continue idx (B, T) int64 by up to max_new_tokens tokens; returns (B, <= T + new) int64.

    Prompts of unlike length stand at the right: n_pad (B,) int64 counts the padding before.
    Samples from the softmax at `temperature` (0: greedy) among the top_k tokens and the top_p
    mass; num_beams > 1 searches with beams instead. After eot_id a row is filled with it.
    ValueError where the prompt is empty (start from end-of-text) or the context too short.
    """
    T = idx.size(1)
    if not 0 < T < T + max_new_tokens <= model.config.n_positions:
        raise ValueError(f"{T} prompt + {max_new_tokens} new tokens: use 1 or more of each, and no "
                         f"more than the context of {model.config.n_positions} in all")
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative: use 0 (greedy) or more")
    if eot_id is None:
        eot_id = model.config.vocab_size  # no token has this id: nothing ends
    if num_beams > 1:
        return beam_search(model, idx, max_new_tokens, num_beams, no_repeat_ngram_size,
                           length_penalty, eot_id, n_pad)
    cache = KVCache(n_pad)
    generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
    new = idx
    finished = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        logits = next_logits(model, new, cache)  # (B, V)
        ban_repeats(logits, idx, no_repeat_ngram_size, n_pad)
        new = sample(logits, temperature, top_k, top_p, generator)  # (B, 1)
        new[finished] = eot_id
        finished |= new[:, 0] == eot_id
        idx = torch.cat([idx, new], dim=1)
        if finished.all():
            break
    return idx


def next_logits(model, idx, cache):
    """fp32 logits (B, V) of the token after idx (B, T), which continues the cache."""
    last = model.hidden(idx, cache)[:, -1]  # (B, T, C) -> (B, C)
    return linear(last, model.transformer.wte.weight).float()


def linear(x, weight, bias=None):
    """F.linear, x (..., in), weight (out, in) -> (..., out); fast for one bf16 row on a CPU.

    Such a row is a step of generation, bound by reading the weights. F.linear reads them at half to
    nine tenths of the memory's rate. So matrices stored as [out, in] go to mv instead, and Hugging
    Face's, mapped as they lie in the file, [in, out], to bmm, as two halves of the sum.
    """
    one_row = x.numel() == x.size(-1)
    if not one_row or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    if weight.stride(1) == 1:
        y = torch.mv(weight, x.flatten())
    else:
        halves = weight.t().view(2, -1, weight.size(0))  # (in, out) -> (2, in / 2, out)
        first, second = torch.bmm(x.reshape(2, 1, -1), halves)  # (2, 1, in / 2) -> (2, 1, out)
        y = first + second
    if bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], -1)


class KVCache:
    """Keys and values of the tokens so far, so that a step computes those of new tokens only.

    n_pad (B,) int64: leading tokens of each row that are padding, seen by nothing; None: none.
    """

    def __init__(self, n_pad=None):
        self.layers = {}  # layer index -> its keys and values, (2, B, H, S, D)
        self.length = 0  # S
        self.n_pad = n_pad

    def place(self, T, device):
        """Make room for T new tokens: their positions, and which of all S tokens each one sees.

        positions (T,) or, with padding, (B, T), 0 at padding. The mask is bool, (T, S) or
        (B, 1, T, S); None: one token, which sees all.
        """
        start = self.length
        self.length += T
        columns = torch.arange(self.length, device=device)  # (S,)
        rows = columns[start:, None]  # (T, 1)
        sees = columns <= rows  # (T, S)
        if self.n_pad is None:
            return rows[:, 0], None if T == 1 else sees
        real = columns >= self.n_pad[:, None, None]  # (B, 1, S)
        sees = sees & real | (columns == rows)  # padding sees itself: a softmax of nothing is NaN
        positions = rows[:, 0] - self.n_pad[:, None]  # (B, T)
        return positions.clamp(min=0), sees[:, None]

    def append(self, layer, k, v):
        """Add one layer's k and v, (B, H, T, D) each; returns all of its keys and values."""
        new = torch.stack([k, v])
        if layer in self.layers:
            new = torch.cat([self.layers[layer], new], dim=3)
        self.layers[layer] = new
        return new

    def reorder(self, rows):
        """Keep the given batch rows, in that order: a beam's history follows the beam."""
        for layer, kv in self.layers.items():
            self.layers[layer] = kv[:, rows]
        if self.n_pad is not None:
            self.n_pad = self.n_pad[rows]


def sample(logits, temperature, top_k, top_p, generator):
    """One token id per row, (B, V) logits -> (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ordered, order = (logits / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        ordered[:, top_k:] = -math.inf
    if top_p is not None:
        probs = ordered.softmax(dim=-1)
        # a token goes when the mass before it already reaches top_p; the first always stays
        ordered[probs.cumsum(dim=-1) - probs >= top_p] = -math.inf
    logits = logits.scatter(1, order, ordered)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def ban_repeats(logits, idx, n, n_pad):
    """Set to -inf, in place, the tokens that would repeat an n-gram of idx (B, T); n = 0: none.

    For n = 3 and a row that ends in "a b": every token that has followed an earlier "a b". n_pad
    (B,): each row's padding, which is no part of its text; None: none.
    """
    if n == 0:
        return
    starts = [0] * len(idx) if n_pad is None else n_pad.tolist()
    for row, tokens, start in zip(logits, idx.tolist(), starts):
        last = tokens[len(tokens) - n + 1:]
        for i in range(start, len(tokens) - n + 1):
            if tokens[i:i + n - 1] == last:
                row[tokens[i + n - 1]] = -math.inf


def beam_search(model, idx, max_new_tokens, K, no_repeat_ngram_size, length_penalty, eot_id, n_pad):
    """Continue each row of idx (B, T) by the best text found with K beams, as Hugging Face does.

    A text's score is its sum of log-probabilities divided by length ** length_penalty. A row whose
    search is over is frozen: others may go on, its text stands, whatever its beams still find.
    """
    B = len(idx)
    V = model.config.vocab_size
    rows = torch.arange(B, device=idx.device)[:, None]  # (B, 1)
    cache = KVCache(n_pad)
    beams = idx[:, None]  # (B, 1, T): one beam at first, K after a step
    sums = torch.zeros(B, 1, 1, device=idx.device)
    ended = [[] for _ in range(B)]  # each row's best K texts that ended: (score, tokens)
    best = [None] * B
    new = idx
    for length in range(1, max_new_tokens + 1):
        norm = length**length_penalty
        log_probs = F.log_softmax(next_logits(model, new, cache), dim=-1)  # (B·K, V)
        # after the softmax, as Hugging Face has it
        ban_repeats(log_probs, beams.flatten(0, 1), no_repeat_ngram_size, cache.n_pad)
        # 2K candidates: even if K of them end, K are left to go on
        scores = sums + log_probs.view(B, -1, V)
        top, flat = scores.flatten(1).topk(2 * K)  # (B, K, V) -> (B, 2K)
        parents = flat // V
        tokens = flat % V
        texts = torch.cat([beams[rows, parents], tokens[..., None]], dim=2)  # (B, 2K, T + length)
        ends = tokens == eot_id
        go_on = ends.int().argsort(dim=1, stable=True)[:, :K]  # the first K that do not end
        parents = rows * beams.size(1) + parents[rows, go_on]
        cache.reorder(parents.flatten())
        sums = top[rows, go_on, None]  # (B, K, 1)
        beams = texts[rows, go_on]  # (B, K, T + length)
        new = beams[..., -1].reshape(-1, 1)  # (B·K, 1)
        for i in range(B):
            if best[i] is not None:
                continue
            for j in ends[i, :K].nonzero()[:, 0]:  # as Hugging Face: not an end among the lower K
                ended[i].append((top[i, j].item() / norm, texts[i, j].tolist()))
            ended[i] = sorted(ended[i], reverse=True)[:K]
            running = sums[i, 0].item() / norm  # the score of the best beam that goes on
            over = len(ended[i]) == K and ended[i][-1][0] >= running
            if over or length == max_new_tokens:
                ended[i].append((running, beams[i, 0].tolist()))
                best[i] = idx.new_tensor(max(ended[i])[1])
        if all(text is not None for text in best):
            break
    return nn.utils.rnn.pad_sequence(best, batch_first=True, padding_value=eot_id)


# ---------------------------------------------------------------------------------------------
# folders: runs of train.py and Hugging Face GPT-2

WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")


def config_of(path):
    """GPTConfig of a run or of a Hugging Face GPT-2 folder, without its weights."""
    file = Path(path) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"no config.json in {path}: give the folder of a run or of a "
                                "Hugging Face GPT-2; the released weights: "
                                "python data.py download biomedlm --out DIR")
    return GPTConfig.from_hf(read_json(file))


def read_json(path):
    """The object in a JSON file, as a dict."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({e}): copy it again") from e


def from_pretrained(path, dtype=torch.float32, device="cpu", dropout=None):
    """Model of a run or of a Hugging Face GPT-2 folder, in eval mode.

    dropout replaces the folder's, None keeps it. Reads config.json beside checkpoint_*.pt (the
    newest whole one), model.safetensors or pytorch_model.bin, sharded or not, memory-mapped.
    Raises FileNotFoundError or ValueError.
    """
    config = config_of(path)
    if dropout is not None:
        config = replace(config, dropout=dropout)
    model = without_memory(config)
    # bf16 on a CPU is to generate, not to train: there the tensors may lie as they are mapped
    mapped = dtype != torch.float32 and torch.device(device).type == "cpu"
    layout = torch.preserve_format if mapped else torch.contiguous_format
    saved = read_weights(Path(path))
    check_shapes(saved, model.state_dict(), path)
    head = saved.get("transformer.lm_head.weight")
    if head is not None and not torch.equal(head, saved["transformer.wte.weight"]):
        raise ValueError(f"{path} has a head (lm_head.weight) of its own, this model's is the "
                         "embedding wte.weight: use a GPT-2 whose head is tied")
    state = {}
    for name in model.state_dict():
        tensor = saved[name].to(device, dtype, copy=not mapped, memory_format=layout)
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"{path}: {name} holds NaN or infinity: use an earlier checkpoint")
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(not mapped).eval()


def without_memory(config):
    """A GPT that has shapes and names only, and spends no random numbers."""
    with torch.device("meta"):
        return GPT(config)


def check_shapes(state, expected, path):
    """ValueError unless the state dict has a tensor for each of the expected, as large."""
    for name, tensor in expected.items():
        found = state.get(name)
        if not torch.is_tensor(found) or found.shape != tensor.shape:
            raise ValueError(f"{path} has no {name} of shape {tuple(tensor.shape)}, as config.json "
                             "implies: use the config.json saved with the weights")


def read_weights(folder):
    """State dict of a folder in this model's names and layout; it may hold tensors of no use."""
    _, checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        return checkpoint["model"]
    for pattern in WEIGHTS:
        state = {}
        for file in sorted(folder.glob(pattern)):
            state |= load_tensors(file, checksums=True)
        if state:
            return transposed(state)
    raise FileNotFoundError(f"{folder} holds neither checkpoint_*.pt nor model.safetensors nor "
                            "pytorch_model.bin: give the folder of a run or of a GPT-2")


def newest_checkpoint(run):
    """(path, contents) of a run's newest whole checkpoint; (None, None) where it has none.

    A damaged one is skipped with a warning. ValueError where no whole one is left.
    """
    paths = sorted(Path(run).glob("checkpoint_*.pt"), reverse=True)
    weights = without_memory(config_of(run)).state_dict() if paths else {}
    for path in paths:
        try:
            checkpoint = load_tensors(path, checksums=True)
            check_checkpoint(checkpoint, weights, path)
            return path, checkpoint
        except ValueError as e:
            print(f"warning: skipping {e}", file=sys.stderr)
    if paths:
        raise ValueError(f"no checkpoint in {run} is whole: restore one, or train with --fresh")
    return None, None


def check_checkpoint(checkpoint, weights, path):
    """ValueError unless it holds what train.py saves: "model", "optimizer" and "step"."""
    try:  # what is missing or of another type raises by itself
        check_shapes(checkpoint["model"], weights, path)
        range(checkpoint["step"])  # TypeError: no whole number
        optimizer = checkpoint["optimizer"]
        optimizer["param_groups"][0]["params"]
        for name, weight in weights.items():
            for moment in optimizer["state"][name].values():
                if torch.is_tensor(moment) and moment.shape not in (weight.shape, ()):
                    raise TypeError(f"optimizer's state of {name} has another shape")
    except (LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}, no whole checkpoint: {type(e).__name__} {e}") from e


def load_tensors(path, checksums=False):
    """Contents (a dict) of one file, memory-mapped: a pickle of plain tensors, or safetensors.

    checksums: read it once more, on all cores, to find damage. Safetensors have none.
    """
    def read(part):
        with archive.open(part) as file:
            while file.read(2**22):  # raises at the end of a part that has another CRC-32
                pass

    if path.suffix == ".safetensors" and load_file is None:
        raise ValueError(f"reading {path} needs: pip install safetensors")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if checksums:  # torch.save writes a zip file; 0.5 s per GB and core
            with zipfile.ZipFile(path) as archive, ThreadPoolExecutor() as pool:
                list(pool.map(read, archive.infolist()))
        contents = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError,
            zipfile.BadZipFile, zlib.error, SafetensorError) as e:
        reason = str(e).partition("\n")[0]
        raise ValueError(f"{path} is missing, damaged or no file of plain tensors "
                         f"({type(e).__name__} {reason}): copy or download it again") from e
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is damaged, it holds no dict of tensors: copy it again")
    return contents


def transposed(state):
    """A state dict out of Hugging Face's layout, or into it: its blocks' matrices are [in, out]."""
    other = {}
    for name, tensor in state.items():
        name = "transformer." + str(name).removeprefix("transformer.")  # some files leave it out
        is_block_matrix = ".h." in name and torch.is_tensor(tensor) and tensor.dim() == 2
        other[name] = tensor.t() if is_block_matrix else tensor
    return other


def save_pretrained(model, path):
    """Write config.json and the weights: a folder that `transformers` loads.

    The weights go to model.safetensors, without the safetensors package to pytorch_model.bin.
    ValueError, before anything is written, for a fork whose parameters are not a GPT-2's.
    """
    C = model.config.n_embd
    layer = 12 * C * C + 13 * C  # 4 matrices (3, 1, 4, 4), their biases (3, 1, 4, 1), 2 LayerNorms
    n = (model.config.vocab_size + model.config.n_positions + 2) * C + model.config.n_layer * layer
    if model.n_params() != n:
        raise ValueError(f"the model has {model.n_params():,} parameters, Hugging Face's GPT-2 of "
                         f"its config.json {n:,}: that folder cannot hold a changed architecture")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    added = folder / "added_tokens.json"
    special = list(read_json(added)) if added.exists() else []
    # With it `transformers`' AutoTokenizer encodes as Tokenizer.encode does with allow_special.
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model.config.n_positions,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "[PAD]" if "[PAD]" in special else "<|endoftext|>",
        "additional_special_tokens": special,
    })
    state = {name: t.cpu().contiguous() for name, t in transposed(model.state_dict()).items()}
    if load_file is None:
        write_whole(folder / "pytorch_model.bin", lambda file: torch.save(state, file))
    else:
        weights = folder / "model.safetensors"
        write_whole(weights, lambda file: save_file(state, file, metadata={"format": "pt"}))
        # save_file leaves a file that only its owner reads
        shutil.copymode(folder / "tokenizer_config.json", weights)
    write_json(folder / "config.json", model.config.to_hf())


def write_json(path, contents):
    write_whole(path, lambda file: file.write_text(json.dumps(contents, indent=2) + "\n"))


def write_whole(path, write):
    """Make a file by write(temporary path): under its own name it is whole, or not there."""
    temporary = Path(f"{path}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


# The functions above as methods: model.generate(idx, 20), GPT.from_pretrained("out/demo"), ...
GPT.generate = generate
GPT.config_of = config_of
GPT.from_pretrained = from_pretrained
GPT.save_pretrained = save_pretrained


def main():
    """The export command: a run's model and tokenizer as a folder that `transformers` opens."""
    parser = argparse.ArgumentParser(description="Write a run as a Hugging Face GPT-2 folder.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("--init", type=Path, required=True, help="folder of a run or of a GPT-2")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    model = GPT.from_pretrained(args.init)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json"):
        if (args.init / name).exists():
            shutil.copyfile(args.init / name, args.out / name)
    model.save_pretrained(args.out)
    print(f"wrote {args.out}")


# ---------------------------------------------------------------------------------------------
# fused ops: which path runs, with which launch settings

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"

# Fixed rather than autotuned (that costs minutes a rank): `python tests/bench.py kernels --tune`
# on an H100. An attention row is query tile, key tile, num_warps, num_stages.
LAUNCH = {
    "norm": {"columns_per_sm": 6144},
    "gelu": {"rows": 1, "cols": 1024, "warps": 4},
    "gelu_backward": {"rows": 2, "cols": 512, "warps": 4, "programs_per_sm": 8},
    "cross_entropy": {"block": 8192, "warps": 16, "chunk_rows": 4096},
    "sm_80": {"forward": (128, 64, 8, 2), "dkv": (64, 32, 4, 1), "dq": (64, 32, 4, 1)},
    "sm_90": {"forward": (64, 64, 4, 3), "dkv": (64, 64, 4, 2), "dq": (64, 64, 4, 2),
              "dkv_dropout": (32, 64, 4, 2)},  # its mask's registers would spill at 64
    "gfx942": {"forward": (128, 32, 4, 1), "dkv": (32, 64, 4, 1), "dq": (64, 32, 4, 1)},
    "fp32": {"forward": (32, 32, 4, 1), "dkv": (32, 32, 4, 1), "dq": (32, 32, 4, 1)},
}


@torch.compiler.assume_constant_result  # a string: dynamo cannot compare a constant tuple
def gpu():
    """Whose settings the GPU takes: "sm_90" (Hopper), "sm_80" (Ampere, and anything newer) or
    "gfx942" (ROCm); "" where none has bf16 matrix products, which begin with capability 8.0."""
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if major < 8:
        return ""
    if torch.version.hip:
        return "gfx942"
    return "sm_90" if major == 9 else "sm_80"


def kernels_active(device="cuda"):
    """The path of ops on tensors of `device`: "triton", "triton interpreter" or "reference"."""
    if INTERPRETED:
        return "triton interpreter"
    runs = triton is not None and torch.device(device).type == "cuda" and gpu()
    return "triton" if runs else "reference"


def fused(x):
    """True if the op on tensor x runs a kernel; a float64 tensor always takes the reference."""
    return x.dtype != torch.float64 and kernels_active(x.device) != "reference"


def compute_dtype(x):
    """The dtype autocast wants for x's device, or x's own outside autocast."""
    on = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def wide(x):
    """x in at least fp32, for statistics and softmax."""
    return x if x.dtype == torch.float64 else x.float()


def n_programs(x, per_sm):
    """Programs of a grid-stride kernel: so many per multiprocessor, so sums are reproducible."""
    return per_sm * (torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda
                     else 1)


def jit(fn):
    """triton.jit where there is triton; the seed changes each step and must not respecialise."""
    return triton.jit(fn, do_not_specialize=["seed"]) if triton else fn


def custom_op(fn):
    """Make fn an op that torch.compile calls and never looks into. Tracing runs fn as well, for its
    outputs' shapes and dtypes, on tensors without data (FakeTensor): no kernel is launched then."""
    op = torch.library.custom_op(f"biomedlm::{fn.__name__}", mutates_args=())(fn)
    op.register_fake(fn)
    return op


def launch(kernel, grid, *args, **options):
    """Run a kernel over a grid; none runs on an empty grid, nor on tensors without data."""
    if not isinstance(args[0], FakeTensor) and 0 not in grid:
        kernel[grid](*args, **options)


def empty(like, *shape, dtype=None):
    """An uninitialised tensor on like's device; like's shape and dtype unless given."""
    return torch.empty(shape or like.shape, dtype=dtype or like.dtype, device=like.device)


# ---------------------------------------------------------------------------------------------
# fused ops: dropout
#
# Forward and backward must draw the same mask, and storing it would cost a byte an element. So the
# mask is a pure function of (seed, row, column): a 32-bit integer hash (two multiplications, full
# avalanche; constants: "lowbias32" of Chris Wellons' hash-prospector). Philox, Triton's generator,
# takes ten times the instructions an element: in attention, more than attention itself.


def dropout_ref(x, p, seed):
    """Dropout with a mask from seed alone; under torch.compile, which cannot trace a Generator,
    from torch's own random stream."""
    if p == 0:
        return x
    if torch.compiler.is_compiling():
        return F.dropout(x, p)
    generator = torch.Generator(x.device).manual_seed(seed)
    return x * (torch.rand(x.shape, generator=generator, device=x.device) >= p) / (1 - p)


def rng(p, seed):
    """The kernels' two integers of dropout: the seed in 31 bits, and p in 24."""
    return seed % 2**31, round(p * 2**24)


@jit
def hash_u32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def row_key(seed, row):
    return hash_u32(hash_u32(seed.to(tl.uint32)) ^ row.to(tl.uint32))


@jit
def dropout(x, key, col, drop):
    """x / (1 - p) where the element stays, else 0; p = drop / 2^24 and key = row_key(seed, row)."""
    random24 = hash_u32(key + col.to(tl.uint32) * 0x9E3779B1) >> 8
    return tl.where(random24.to(tl.int32) >= drop, x * (1 / (1 - drop / 16777216)), 0.0)


# ---------------------------------------------------------------------------------------------
# fused ops: (residual add, dropout,) LayerNorm
#
#     r = residual + dropout(x)      x̂ = (r - mean(r)) · rstd      y = x̂ · w + b
#
# Backward. g = dy · w is the gradient at x̂. Each r_j moves x̂_j directly, and every x̂ through mean
# and rstd; those two paths are projections, taking away g's part along 1 and its part along x̂:
#     dr = rstd · (g - mean(g) - x̂ · mean(g · x̂)) + dr_later
# where dr_later flows back along the residual stream. d_residual = dr, dx = dropout's mask on dr,
#     dw = Σ_rows dy · x̂       db = Σ_rows dy
# Those sums run over all rows: each program walks rows in a grid-stride loop, keeps its own sum in
# registers, writes it once, and a second step adds the programs' sums in a fixed order (no atomics:
# bit-identical every run). A row is held as N_PIECES pieces of PIECE lanes, because 2560 = 5 x 512
# while one power-of-two block would be 4096 lanes, 37% of them idle.


def layer_norm_ref(x, weight, bias, eps=1e-5):
    y = x if x.dtype == weight.dtype else wide(x)  # torch's op takes its statistics in fp32
    y = F.layer_norm(y, (x.shape[-1],), weight.to(y), bias.to(y), eps)
    return y.to(compute_dtype(x))


def add_layer_norm_ref(x, residual, weight, bias, eps=1e-5, dropout_p=0.0, seed=0):
    new_residual = (residual + dropout_ref(wide(x), dropout_p, seed)).to(residual.dtype)
    return layer_norm_ref(new_residual, weight, bias, eps).to(compute_dtype(x)), new_residual


@jit
def norm_forward_kernel(x_ptr, res_ptr, w_ptr, b_ptr, y_ptr, new_ptr, mean_ptr, rstd_ptr, seed,
                        drop, eps, C: constexpr, PIECE: constexpr, N_PIECES: constexpr,
                        ADD: constexpr, DROPOUT: constexpr):
    row = tl.program_id(0).to(tl.int64)  # int64: row * C passes 2^31 on long batches
    total = tl.zeros([PIECE], tl.float32)
    pieces = ()
    for i in tl.static_range(N_PIECES):
        cols = i * PIECE + tl.arange(0, PIECE)
        inside = cols < C
        r = tl.load(x_ptr + row * C + cols, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            if DROPOUT:
                r = dropout(r, row_key(seed, row), cols, drop)
            r += tl.load(res_ptr + row * C + cols, mask=inside, other=0.0).to(tl.float32)
            stored = r.to(new_ptr.dtype.element_ty)
            tl.store(new_ptr + row * C + cols, stored, mask=inside)
            r = stored.to(tl.float32)  # normalise what backward will read
        total += r
        pieces = pieces + (r,)
    mean = tl.sum(total, 0) / C

    total = tl.zeros([PIECE], tl.float32)  # second pass over registers: no cancellation at mean 100
    for i in tl.static_range(N_PIECES):
        centred = tl.where(i * PIECE + tl.arange(0, PIECE) < C, pieces[i] - mean, 0.0)
        total += centred * centred
    rstd = 1 / tl.sqrt(tl.sum(total, 0) / C + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    for i in tl.static_range(N_PIECES):
        cols = i * PIECE + tl.arange(0, PIECE)
        inside = cols < C
        w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        y = (pieces[i] - mean) * rstd * w + b
        tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def norm_backward_kernel(dy_ptr, dnew_ptr, r_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dres_ptr,
                         partial_ptr, n_rows, seed, drop, C: constexpr, PIECE: constexpr,
                         N_PIECES: constexpr, ADD: constexpr, HAS_DNEW: constexpr,
                         DROPOUT: constexpr):
    program = tl.program_id(0).to(tl.int64)
    dws = (tl.zeros([PIECE], tl.float32),) * N_PIECES
    dbs = (tl.zeros([PIECE], tl.float32),) * N_PIECES
    for step in range(0, n_rows - program, tl.num_programs(0)):
        row = program + step
        start = row * C
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        sum_g = tl.zeros([PIECE], tl.float32)
        sum_gx = tl.zeros([PIECE], tl.float32)
        gs, xs, laters, new_dws, new_dbs = (), (), (), (), ()
        for i in tl.static_range(N_PIECES):
            cols = i * PIECE + tl.arange(0, PIECE)
            inside = cols < C
            dy = tl.load(dy_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(r_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
            later = 0.0
            if HAS_DNEW:
                later = tl.load(dnew_ptr + start + cols, mask=inside, other=0.0).to(tl.float32)
            xhat = tl.where(inside, (r - mean) * rstd, 0.0)
            g = dy * tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            sum_g += g
            sum_gx += g * xhat
            gs, xs, laters = gs + (g,), xs + (xhat,), laters + (later,)
            new_dws, new_dbs = new_dws + (dws[i] + dy * xhat,), new_dbs + (dbs[i] + dy,)
        dws, dbs = new_dws, new_dbs
        mean_g = tl.sum(sum_g, 0) / C
        mean_gx = tl.sum(sum_gx, 0) / C
        for i in tl.static_range(N_PIECES):
            cols = i * PIECE + tl.arange(0, PIECE)
            inside = cols < C
            dr = rstd * (gs[i] - mean_g - xs[i] * mean_gx) + laters[i]
            if ADD:
                tl.store(dres_ptr + start + cols, dr.to(dres_ptr.dtype.element_ty), mask=inside)
            if DROPOUT:
                dr = dropout(dr, row_key(seed, row), cols, drop)
            tl.store(dx_ptr + start + cols, dr.to(dx_ptr.dtype.element_ty), mask=inside)
    for i in tl.static_range(N_PIECES):
        cols = i * PIECE + tl.arange(0, PIECE)
        tl.store(partial_ptr + 2 * program * C + cols, dws[i], mask=cols < C)
        tl.store(partial_ptr + (2 * program + 1) * C + cols, dbs[i], mask=cols < C)


def norm_launch(C):
    """(PIECE, N_PIECES, num_warps): fewest idle lanes, 4 elements a thread. 2560 -> 512, 5, 4;
    768 -> 256, 3, 2; 1000 -> 1024, 1, 8."""
    def padded(piece):
        return -(-C // piece) * piece
    fits = [piece for piece in (2**n for n in range(13, 6, -1)) if padded(piece) <= 8 * piece]
    piece = min(min(fits, key=padded), triton.next_power_of_2(C))
    return piece, triton.cdiv(C, piece), min(max(piece // 128, 1), 8)


@custom_op
def norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
                 p: float, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    C, add = x.shape[-1], residual is not None
    y, new = empty(x, dtype=dtype), empty(residual) if add else empty(x, 0)
    mean, rstd = (empty(x, x.numel() // C, dtype=torch.float32) for _ in range(2))
    x, res = x.contiguous(), residual.contiguous() if add else x
    piece, n_pieces, warps = norm_launch(C)
    launch(norm_forward_kernel, (mean.numel(),), x, res, weight, bias, y, new, mean, rstd,
           *rng(p, seed), eps, C, piece, n_pieces, add, p > 0, num_warps=warps)
    return y, new, mean, rstd


@custom_op
def norm_backward(dy: Tensor, dnew: Tensor | None, r: Tensor, weight: Tensor, mean: Tensor,
                  rstd: Tensor, add: bool, p: float, seed: int, dtype: torch.dtype
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    C, N, r, dy = r.shape[-1], mean.numel(), r.contiguous(), dy.contiguous()
    dx, dres = empty(r, dtype=dtype), empty(r) if add else empty(r, 0)
    per_sm = min(max(LAUNCH["norm"]["columns_per_sm"] // C, 2), 16)
    programs = max(min(N, n_programs(r, per_sm)), 1)
    partial = empty(r, programs, 2, C, dtype=torch.float32)
    piece, n_pieces, warps = norm_launch(C)
    launch(norm_backward_kernel, (programs,), dy, dy if dnew is None else dnew.contiguous(), r,
           weight, mean, rstd, dx, dres, partial, N, *rng(p, seed), C, piece, n_pieces, add,
           dnew is not None, p > 0, num_warps=warps)
    dw, db = partial.sum(0).to(weight.dtype)  # the second stage, in a fixed order
    return dx, dres, dw.clone(), db.clone()  # clones: an op's outputs may not share storage


def norm_setup(ctx, inputs, output):
    x, residual, weight, _, _, p, seed, _ = inputs
    _, new, mean, rstd = output
    ctx.set_materialize_grads(False)  # an unused output's gradient stays None, not a zero tensor
    ctx.settings = (residual is not None, p, seed, x.dtype)
    ctx.save_for_backward(x if residual is None else new, weight, mean, rstd)


def norm_autograd(ctx, dy, dnew, *_):
    r, *rest = ctx.saved_tensors  # read once: under checkpointing a second look raises
    dy = torch.zeros_like(r) if dy is None else dy
    dx, dres, dw, db = norm_backward(dy, dnew, r, *rest, *ctx.settings)
    return dx, dres if ctx.settings[0] else None, dw, db, None, None, None, None


norm_forward.register_autograd(norm_autograd, setup_context=norm_setup)


def layer_norm(x, weight, bias, eps=1e-5):
    """LayerNorm over the last dimension. x (..., C) of any float dtype; weight, bias (C,), fp32
    under autocast. Returns (..., C) in x's dtype, or autocast's."""
    if not fused(x):
        return layer_norm_ref(x, weight, bias, eps)
    return norm_forward(x, None, weight, bias, eps, 0.0, 0, compute_dtype(x))[0]


def add_layer_norm(x, residual, weight, bias, eps=1e-5, dropout_p=0.0, seed=0):
    """new_residual = residual + dropout(x) in residual's dtype, and y = LayerNorm(new_residual) in
    x's dtype (or autocast's). x, residual (..., C). The mask is a function of the int seed."""
    if not fused(x):
        return add_layer_norm_ref(x, residual, weight, bias, eps, dropout_p, seed)
    return norm_forward(x, residual, weight, bias, eps, dropout_p, seed, compute_dtype(x))[:2]


# ---------------------------------------------------------------------------------------------
# fused ops: bias + GELU
#
#     u = x + b      y = ½ u (1 + tanh z),  z = √(2/π) (u + 0.044715 u³)
#
# With ½(1 + tanh z) = sigmoid(2z) = s this is y = u·s: one exponential, and safe at both ends (exp
# overflows to inf, s to 0). Backward, by the product rule and s' = s(1 - s)·2z':
#     dx = dy · (s + u · s(1 - s) · 2z'),  2z' = 2√(2/π) (1 + 0.134145 u²)      db = Σ_rows dx
# Only x and b are kept: y is cheaper to make again than to store (a quarter of a block's memory).


def bias_gelu_ref(x, bias):
    x = x.to(compute_dtype(x))
    return F.gelu(wide(x) + bias.to(wide(x)), approximate="tanh").to(x.dtype)


@jit
def gelu_gate(u):
    """s = sigmoid(2z); 1.5957691216 = 2 √(2/π)."""
    return 1 / (1 + tl.exp(-1.5957691216057308 * u * (1 + 0.044715 * u * u)))


@jit
def gelu_forward_kernel(x_ptr, b_ptr, y_ptr, n_rows, C: constexpr, ROWS: constexpr,
                        COLS: constexpr):
    n_tiles = tl.cdiv(C, COLS)  # one grid axis: the others end at 65,535 programs
    cols = tl.program_id(0) % n_tiles * COLS + tl.arange(0, COLS)
    rows = (tl.program_id(0) // n_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (rows < n_rows)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    b = tl.load(b_ptr + cols[None, :], mask=(cols < C)[None, :], other=0.0).to(tl.float32)
    u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + b
    tl.store(y_ptr + at, (u * gelu_gate(u)).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def gelu_backward_kernel(dy_ptr, x_ptr, b_ptr, dx_ptr, partial_ptr, n_rows, C: constexpr,
                         ROWS: constexpr, COLS: constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    b = tl.load(b_ptr + cols[None, :], mask=(cols < C)[None, :], other=0.0).to(tl.float32)
    db = tl.zeros([ROWS, COLS], tl.float32)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for step in range(0, n_rows - first, tl.num_programs(1) * ROWS):
        rows = first + step + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (cols < C)[None, :]
        at = rows[:, None] * C + cols[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + b
        s = gelu_gate(u)
        dx = dy * (s + u * s * (1 - s) * (1.5957691216057308 + 0.2140644488 * u * u))
        db += dx
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(1) * C + cols, tl.sum(db, 0), mask=cols < C)


@custom_op
def gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    x, C, tile = x.contiguous(), x.shape[-1], LAUNCH["gelu"]
    y, N = empty(x), x.numel() // C
    cols = min(tile["cols"], triton.next_power_of_2(C))
    launch(gelu_forward_kernel, (triton.cdiv(C, cols) * triton.cdiv(N, tile["rows"]),),
           x, bias, y, N, C, tile["rows"], cols, num_warps=tile["warps"])
    return y


@custom_op
def gelu_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x, dy, C, tile = x.contiguous(), dy.contiguous(), x.shape[-1], LAUNCH["gelu_backward"]
    dx, N, rows = empty(x), x.numel() // C, tile["rows"]
    cols = min(tile["cols"], triton.next_power_of_2(C))
    col_blocks = triton.cdiv(C, cols)
    wanted = triton.cdiv(n_programs(x, tile["programs_per_sm"]), col_blocks)
    programs = max(min(wanted, triton.cdiv(N, rows)), 1)
    partial = empty(x, programs, C, dtype=torch.float32)
    launch(gelu_backward_kernel, (col_blocks, programs), dy, x, bias, dx, partial, N, C, rows, cols,
           num_warps=tile["warps"])
    return dx, partial.sum(0).to(bias.dtype)


gelu_forward.register_autograd(
    lambda ctx, dy: gelu_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def bias_gelu(x, bias):
    """GELU(x + bias), tanh approximation (GPT-2's gelu_new). x (..., C), bias (C,). Returns x's
    dtype, or autocast's."""
    return gelu_forward(x.to(compute_dtype(x)), bias) if fused(x) else bias_gelu_ref(x, bias)


# ---------------------------------------------------------------------------------------------
# fused ops: causal attention on the packed projection
#
#     S = scale · Q Kᵀ (below the diagonal)     P = softmax(S)     O = dropout(P) V
#
# Forward (FlashAttention): a program owns a tile of query rows and walks the key tiles, keeping
# each row's running maximum m, running sum l and unscaled output; when m grows, both are rescaled.
# Only lse = m + log l is kept, T numbers a head instead of T². Exponentials are base 2 (one
# instruction), so lse is too. Backward recomputes P = exp(S - lse) tile by tile. With dropout's
# mask M, which holds 1/(1-p):
#     dV = (P∘M)ᵀ dO     dP = (dO Vᵀ)∘M     dS = P∘(dP - δ)     dQ = scale·dS K     dK = scale·dSᵀ Q
# The softmax's Jacobian takes away δ_i = Σ_j P_ij dP_ij, which equals Σ_d dO_id O_id.
# Two kernels, so that nobody needs atomics: one owns query tiles (δ, dQ), one key tiles (dK, dV).
# qkv (B, T, 3C) is read in place through its strides, [q | k | v] as HF packs it, and the gradient
# is written in the same layout: no transposed copy. Key tiles below the diagonal need no causal
# mask: each loop's body is unrolled twice, for those (ON_DIAGONAL 0) and for the rest (1).


def split_heads(qkv, n_head):
    """(B, T, 3C) -> q, k, v, each a (B, H, T, D) view."""
    B, T, C3 = qkv.shape
    return qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4).unbind(0)


def attention_ref(qkv, n_head, scale, dropout_p=0.0, seed=0):
    qkv = qkv.to(compute_dtype(qkv))
    q, k, v = split_heads(qkv, n_head)
    S = scale * wide(q @ k.transpose(-2, -1))  # (B, H, T, T)
    above = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu(1)
    P = dropout_ref(S.masked_fill(above, -torch.inf).softmax(-1), dropout_p, seed)
    return (P.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)


@jit
def load_tile(ptr, rows, stride, T, D: constexpr, BD: constexpr, EVEN: constexpr):
    """Rows of one head, (len(rows), BD), zero outside; EVEN: the tiles fit and need no mask."""
    d = tl.arange(0, BD)
    at = ptr + rows[:, None] * stride + d[None, :]
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(rows < T)[:, None] & (d < D)[None, :], other=0.0)


@jit
def store_tile(ptr, tile, rows, stride, T, D: constexpr, BD: constexpr):
    d = tl.arange(0, BD)
    tl.store(ptr + rows[:, None] * stride + d[None, :], tile.to(ptr.dtype.element_ty),
             mask=(rows < T)[:, None] & (d < D)[None, :])


@jit
def head_offsets(pair, T, H: constexpr, D: constexpr):
    """Where the (batch, head) pair begins in qkv (B, T, 3C), and in an output (B, T, C)."""
    batch, at = (pair // H).to(tl.int64), (pair % H) * D
    return batch * T * (3 * H * D) + at, batch * T * (H * D) + at


@jit
def attention_forward_kernel(qkv_ptr, o_ptr, lse_ptr, T, scale2, seed, drop, H: constexpr,
                             D: constexpr, BD: constexpr, BM: constexpr, BN: constexpr,
                             EVEN: constexpr, DROPOUT: constexpr):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # longest rows first: even load
    pair = tl.program_id(1)
    at, o_at = head_offsets(pair, T, H, D)
    rows = first + tl.arange(0, BM)
    keys = row_key(seed, pair * T + rows)
    q = load_tile(qkv_ptr + at, rows, 3 * H * D, T, D, BD, EVEN)
    acc = tl.zeros([BM, BD], tl.float32)
    m = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    diagonal = first // BN * BN
    end = tl.minimum(first + BM, T)
    for ON_DIAGONAL in tl.static_range(2):
        low, high = diagonal * ON_DIAGONAL, diagonal + (end - diagonal) * ON_DIAGONAL
        for start in range(low, high, BN):
            cols = start + tl.arange(0, BN)
            k = load_tile(qkv_ptr + at + H * D, cols, 3 * H * D, T, D, BD, EVEN)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
            if ON_DIAGONAL:  # finite: -inf minus -inf would be NaN
                s = tl.where(cols[None, :] <= rows[:, None], s, -1e30)
            m_new = tl.maximum(m, tl.max(s, 1))
            prob = tl.exp2(s - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            total = total * alpha + tl.sum(prob, 1)  # P before dropout
            if DROPOUT:
                prob = dropout(prob, keys[:, None], cols[None, :], drop)
            v = load_tile(qkv_ptr + at + 2 * H * D, cols, 3 * H * D, T, D, BD, EVEN)
            acc = tl.dot(prob.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new
    tl.store(lse_ptr + pair.to(tl.int64) * T + rows, m + tl.log2(total), mask=rows < T)
    store_tile(o_ptr + o_at, acc / total[:, None], rows, H * D, T, D, BD)


@jit
def attention_dq_kernel(qkv_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr, T, scale, scale2,
                        seed, drop, H: constexpr, D: constexpr, BD: constexpr, BM: constexpr,
                        BN: constexpr, EVEN: constexpr, DROPOUT: constexpr):
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    pair = tl.program_id(1)
    at, o_at = head_offsets(pair, T, H, D)
    rows = first + tl.arange(0, BM)
    row_at = pair.to(tl.int64) * T + rows
    keys = row_key(seed, pair * T + rows)
    do = load_tile(do_ptr + o_at, rows, H * D, T, D, BD, EVEN)
    o = load_tile(o_ptr + o_at, rows, H * D, T, D, BD, EVEN)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + row_at, delta, mask=rows < T)  # for the other kernel, which runs next
    q = load_tile(qkv_ptr + at, rows, 3 * H * D, T, D, BD, EVEN)
    lse = tl.load(lse_ptr + row_at, mask=rows < T, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)
    diagonal = first // BN * BN
    end = tl.minimum(first + BM, T)
    for ON_DIAGONAL in tl.static_range(2):
        low, high = diagonal * ON_DIAGONAL, diagonal + (end - diagonal) * ON_DIAGONAL
        for start in range(low, high, BN):
            cols = start + tl.arange(0, BN)
            k = load_tile(qkv_ptr + at + H * D, cols, 3 * H * D, T, D, BD, EVEN)
            v = load_tile(qkv_ptr + at + 2 * H * D, cols, 3 * H * D, T, D, BD, EVEN)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
            prob = tl.exp2(s - lse[:, None])
            if ON_DIAGONAL:
                prob = tl.where(cols[None, :] <= rows[:, None], prob, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if DROPOUT:
                dp = dropout(dp, keys[:, None], cols[None, :], drop)
            ds = prob * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_tile(dqkv_ptr + at, dq * scale, rows, 3 * H * D, T, D, BD)


@jit
def attention_dkv_kernel(qkv_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr, T, scale, scale2, seed,
                         drop, H: constexpr, D: constexpr, BD: constexpr, BM: constexpr,
                         BN: constexpr, EVEN: constexpr, DROPOUT: constexpr):
    first, pair = tl.program_id(0) * BN, tl.program_id(1)  # the first key tile has the most rows
    at, o_at = head_offsets(pair, T, H, D)
    cols = first + tl.arange(0, BN)
    k = load_tile(qkv_ptr + at + H * D, cols, 3 * H * D, T, D, BD, EVEN)
    v = load_tile(qkv_ptr + at + 2 * H * D, cols, 3 * H * D, T, D, BD, EVEN)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    below = tl.minimum(tl.cdiv(first + BN, BM) * BM, T)  # rows from here on see all these keys
    for ON_DIAGONAL in tl.static_range(2):
        low = below + (first // BM * BM - below) * ON_DIAGONAL
        high = T + (below - T) * ON_DIAGONAL
        for start in range(low, high, BM):  # everything transposed: (keys, queries)
            rows = start + tl.arange(0, BM)
            row_at = pair.to(tl.int64) * T + rows
            q = load_tile(qkv_ptr + at, rows, 3 * H * D, T, D, BD, EVEN)
            lse = tl.load(lse_ptr + row_at, mask=rows < T, other=0.0)
            prob = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale2 - lse[None, :])
            if ON_DIAGONAL:
                prob = tl.where(cols[:, None] <= rows[None, :], prob, 0.0)
            do = load_tile(do_ptr + o_at, rows, H * D, T, D, BD, EVEN)
            delta = tl.load(delta_ptr + row_at, mask=rows < T, other=0.0)
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            dropped = prob
            if DROPOUT:
                keys = row_key(seed, pair * T + rows)[None, :]
                dropped = dropout(prob, keys, cols[:, None], drop)
                dp = dropout(dp, keys, cols[:, None], drop)
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
            ds = prob * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_tile(dqkv_ptr + at + H * D, dk * scale, cols, 3 * H * D, T, D, BD)
    store_tile(dqkv_ptr + at + 2 * H * D, dv, cols, 3 * H * D, T, D, BD)


def attention_launch(qkv, n_head, kernel, p):
    """(grid, keyword arguments) of one attention kernel: "forward", "dkv" or "dq"."""
    (B, T, C3), dropping = qkv.shape, kernel + "_dropout"
    settings = LAUNCH["fp32" if qkv.dtype == torch.float32 else gpu()]
    BM, BN, warps, stages = settings[dropping if p > 0 and dropping in settings else kernel]
    D = C3 // 3 // n_head
    BD = max(triton.next_power_of_2(D), 16)
    grid = (triton.cdiv(T, BN if kernel == "dkv" else BM), B * n_head)
    return grid, {"H": n_head, "D": D, "BD": BD, "BM": BM, "BN": BN, "DROPOUT": p > 0,
                  "EVEN": T % BM == 0 and T % BN == 0 and BD == D,
                  "num_warps": warps, "num_stages": stages}


LOG2_E = 1.4426950408889634


@custom_op
def attention_forward(qkv: Tensor, n_head: int, scale: float, p: float, seed: int
                      ) -> tuple[Tensor, Tensor]:
    B, T, C3 = qkv.shape
    o, lse = empty(qkv, B, T, C3 // 3), empty(qkv, B, n_head, T, dtype=torch.float32)
    grid, options = attention_launch(qkv, n_head, "forward", p)
    launch(attention_forward_kernel, grid, qkv, o, lse, T, scale * LOG2_E, *rng(p, seed), **options)
    return o, lse


@custom_op
def attention_backward(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, n_head: int, scale: float,
                       p: float, seed: int) -> Tensor:
    do, dqkv, delta = do.contiguous(), empty(qkv), empty(lse)
    rest = (qkv.shape[1], scale, scale * LOG2_E, *rng(p, seed))
    grid, options = attention_launch(qkv, n_head, "dq", p)
    launch(attention_dq_kernel, grid, qkv, o, do, lse, delta, dqkv, *rest, **options)
    grid, options = attention_launch(qkv, n_head, "dkv", p)
    launch(attention_dkv_kernel, grid, qkv, do, lse, delta, dqkv, *rest, **options)
    return dqkv


def attention_setup(ctx, inputs, output):
    qkv, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output)


attention_forward.register_autograd(
    lambda ctx, do, *_: (attention_backward(do, *ctx.saved_tensors, *ctx.settings), *[None] * 4),
    setup_context=attention_setup)


def attention(qkv, n_head, scale, dropout_p=0.0, seed=0):
    """Causal self-attention. qkv (B, T, 3C) packed [q | k | v]; scale multiplies q·k (it holds
    1/sqrt(D) and BioMedLM's 1/(layer_idx + 1)). Returns (B, T, C) in qkv's dtype, or autocast's."""
    qkv = qkv.to(compute_dtype(qkv))
    if fused(qkv):
        return attention_forward(qkv.contiguous(), n_head, scale, dropout_p, seed)[0]
    if dropout_p > 0:
        return attention_ref(qkv, n_head, scale, dropout_p, seed)
    q, k, v = split_heads(qkv, n_head)  # torch's fused attention: the fast reference
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return o.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------
# fused ops: cross-entropy with the head's matrix product
#
#     Z = hidden Wᵀ      loss = mean over targets that count of  log Σ_v exp(Z_v) - Z_target
#     dZ = (softmax(Z) - onehot(target)) / count      dhidden = dZ W      dW = dZᵀ hidden
#
# For N = 16k rows Z is 0.9 GB in bf16, and would be written, read and written again as dZ. Here
# rows go in chunks: one product makes Z, one kernel takes the loss and overwrites Z with dZ, two
# products use that up at once, so one chunk of logits is all that ever exists. The gradients are
# therefore made in forward (if anybody wants them) for a loss gradient of 1; backward multiplies.


def cross_entropy_ref(hidden, weight, targets, ignore_index=-100):
    hidden = hidden.to(compute_dtype(hidden))
    logits = wide(hidden @ weight.to(hidden.dtype).T)  # (N, V)
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    return loss / (targets != ignore_index).sum().clamp(min=1)


@jit
def cross_entropy_kernel(z_ptr, target_ptr, loss_ptr, count_ptr, ignore_index, V: constexpr,
                         BLOCK: constexpr, GRADIENT: constexpr):
    """One row of logits: its loss and, in place, its gradient."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * V passes 2^31 at 74k rows
    target = tl.load(target_ptr + row)
    z_ptr += row * V
    top = tl.full([BLOCK], -1e30, tl.float32)  # each lane's running maximum and sum,
    total = tl.zeros([BLOCK], tl.float32)  # merged once at the end
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + cols, mask=cols < V, other=-1e30).to(tl.float32)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
    peak = tl.max(top, 0)
    total = tl.sum(total * tl.exp(top - peak), 0)
    counts = target != ignore_index
    z_target = tl.load(z_ptr + target, mask=counts, other=0.0).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(counts, peak - z_target + tl.log(total), 0.0))
    if GRADIENT:
        tl.debug_barrier()  # every warp has read z_target before one overwrites it
        factor = tl.where(counts, 1.0 / tl.load(count_ptr).to(tl.float32), 0.0)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + cols, mask=cols < V, other=-1e30).to(tl.float32)
            softmax = tl.exp(z - peak) / total  # not exp(z - lse): at 1e4, lse has 3 decimals
            dz = (softmax - tl.where(cols == target, 1.0, 0.0)) * factor
            tl.store(z_ptr + cols, dz.to(z_ptr.dtype.element_ty), mask=cols < V)


def cross_entropy_rows(z, targets, losses, count, ignore_index):
    """The kernel's work on one chunk in plain torch: fills losses, returns the logits' gradient."""
    log_softmax = z.float().log_softmax(-1)
    counts = targets != ignore_index
    target = targets.where(counts, 0)[:, None]
    losses.copy_(-log_softmax.gather(1, target)[:, 0] * counts)
    dz = log_softmax.exp_()
    dz.scatter_add_(1, target, dz.new_full(target.shape, -1.0))
    return dz.mul_((counts / count)[:, None]).to(z.dtype)


def product_fp32(a, b):
    """a @ b summed and returned in fp32; operands in bf16 still take the tensor cores."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


@custom_op
def cross_entropy_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
                         gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    N, V, settings = len(hidden), len(weight), LAUNCH["cross_entropy"]
    hidden, targets, w = hidden.contiguous(), targets.contiguous(), weight.to(hidden.dtype)
    count = (targets != ignore_index).sum().clamp(min=1)  # stays on the device
    losses = empty(hidden, N, dtype=torch.float32)
    dhidden, dweight = (empty(t) if gradient else empty(t, 0) for t in (hidden, weight))
    block = min(settings["block"], triton.next_power_of_2(V)) if fused(hidden) else None
    with torch.autocast(hidden.device.type, enabled=False):
        for at in range(0, 0 if isinstance(hidden, FakeTensor) else N, settings["chunk_rows"]):
            rows = slice(at, at + settings["chunk_rows"])
            z = hidden[rows] @ w.T  # (chunk, C) x (C, V) -> (chunk, V)
            if block:
                launch(cross_entropy_kernel, (len(z),), z, targets[rows], losses[rows], count,
                       ignore_index, V, block, gradient, num_warps=settings["warps"])
            else:
                z = cross_entropy_rows(z, targets[rows], losses[rows], count, ignore_index)
            if gradient:
                torch.mm(z, w, out=dhidden[rows])
                part = product_fp32(z.T, hidden[rows])  # (V, chunk) x (chunk, C) -> (V, C)
                dweight = part if at == 0 else dweight.add_(part)
    dweight = dweight if N else dweight.zero_()
    return losses.sum() / count, dhidden, dweight.to(weight.dtype)


def cross_entropy_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


cross_entropy_chunks.register_autograd(
    lambda ctx, dloss, *_: (*(grad * dloss for grad in ctx.saved_tensors), None, None, None),
    setup_context=cross_entropy_setup)


def cross_entropy(hidden, weight, targets, ignore_index=-100):
    """Mean cross-entropy of softmax(hidden weightᵀ) over the targets that are not ignore_index.

    hidden (N, C), weight (V, C), targets (N,) int64 below V. Returns an fp32 scalar. With every
    target ignored it is 0 with zero gradients (torch's is NaN). No host synchronisation."""
    if hidden.dtype == torch.float64:
        return cross_entropy_ref(hidden, weight, targets, ignore_index)
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    hidden = hidden.to(compute_dtype(hidden))
    return cross_entropy_chunks(hidden, weight, targets, ignore_index, gradient)[0]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"model.py: error: {e}")
