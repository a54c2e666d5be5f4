"""GPT-2 as BioMedLM uses it (arXiv 2403.18421): layers, generation, and Hugging Face folders.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig.preset("biomedlm"))

Dimensions: B batch, T time, C width, H heads, D head width, V vocabulary, N = B*T rows.
Leaves out training (train.py) and task heads (finetune.py).
"""

import json
import math
import os
import pickle
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

# ---------------------------------------------------------------------------------------------
# ops: each with its PyTorch reference


def kernels_active():
    """True where the ops run as Triton kernels."""
    return False


def dropout_ref(x, p, seed):
    if p == 0:
        return x
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * keep / (1 - p)


def layer_norm_ref(x, weight, bias, eps=1e-5):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm_ref(x, residual, weight, bias, eps=1e-5, dropout_p=0.0, seed=0):
    residual = residual + dropout_ref(x, dropout_p, seed).to(residual.dtype)
    return F.layer_norm(residual, weight.shape, weight, bias, eps).to(x.dtype), residual


def bias_gelu_ref(x, bias):
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def attention_ref(qkv, n_head, scale, dropout_p=0.0, seed=0):
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4)
    if dropout_p == 0:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        mask = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()
        att = (q @ k.transpose(-2, -1) * scale).float().masked_fill(~mask, -math.inf).softmax(-1)
        y = dropout_ref(att, dropout_p, seed).to(v.dtype) @ v
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def cross_entropy_ref(hidden, weight, targets, ignore_index=-100):
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, t in zip(hidden.split(1024), targets.split(1024)):
        def chunk(h, t):
            return F.cross_entropy(F.linear(h, weight).float(), t, ignore_index=ignore_index,
                                   reduction="sum")
        total = total + torch.utils.checkpoint.checkpoint(chunk, h, t, use_reentrant=False)
    return total / (targets != ignore_index).sum().clamp(min=1)


layer_norm, add_layer_norm, bias_gelu = layer_norm_ref, add_layer_norm_ref, bias_gelu_ref
attention, cross_entropy = attention_ref, cross_entropy_ref


# ---------------------------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2; the defaults are the released BioMedLM's (its config.json)."""

    n_layer: int = 32
    n_head: int = 20
    n_embd: int = 2560
    n_positions: int = 1024
    vocab_size: int = 28896
    dropout: float = 0.1  # BioMedLM: on embeddings, residual branches and attention probabilities
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_by_inverse_layer_idx: bool = True  # BioMedLM: only config.json says so
    eot_id: int | None = None  # end-of-text; None: the last id, as in BioMedLM and GPT-2

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use a positive number")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}: "
                             "choose a width that is a multiple of the number of heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is no probability: use 0 to less than 1")
        if self.eot_id is None:
            object.__setattr__(self, "eot_id", self.vocab_size - 1)

    @staticmethod
    def preset(name, **overrides):
        """A named shape; `overrides` replace its fields. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: use one of {', '.join(PRESETS)}")
        return GPTConfig(**{**PRESETS[name], **overrides})

    def to_hf(self):
        """The fields of Hugging Face's GPT2Config, for config.json."""
        return {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
            "activation_function": "gelu_new", "n_layer": self.n_layer, "n_head": self.n_head,
            "n_embd": self.n_embd, "n_positions": self.n_positions, "n_ctx": self.n_positions,
            "n_inner": None, "vocab_size": self.vocab_size,
            "attn_pdrop": self.dropout, "embd_pdrop": self.dropout, "resid_pdrop": self.dropout,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "initializer_range": self.initializer_range, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
            "bos_token_id": self.eot_id, "eos_token_id": self.eot_id, "tie_word_embeddings": True,
        }

    @staticmethod
    def from_hf(hf):
        """GPTConfig of a parsed config.json; ValueError where it describes another architecture."""
        width = hf.get("n_embd", 768)
        wants = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                 "scale_attn_weights": (True,), "n_inner": (None, 4 * width),
                 "add_cross_attention": (False,)}
        for key, allowed in wants.items():
            if hf.get(key, allowed[0]) not in allowed:
                raise ValueError(f"config.json has {key}={hf[key]!r}, this model is a GPT-2 with "
                                 f"{key}={allowed[0]!r}: use a GPT-2 folder")
        vocab_size = hf.get("vocab_size", 50257)
        eot_id = hf.get("eos_token_id")
        return GPTConfig(
            n_layer=hf.get("n_layer", 12), n_head=hf.get("n_head", 12), n_embd=width,
            n_positions=hf.get("n_positions", 1024), vocab_size=vocab_size,
            dropout=hf.get("resid_pdrop", 0.1),
            layer_norm_epsilon=hf.get("layer_norm_epsilon", 1e-5),
            initializer_range=hf.get("initializer_range", 0.02),
            scale_attn_by_inverse_layer_idx=hf.get("scale_attn_by_inverse_layer_idx", False),
            eot_id=eot_id if eot_id is not None and eot_id < vocab_size else vocab_size - 1)


PRESETS = {
    # our choice: small enough to learn 192 facts on two CPU cores in under two minutes
    "demo": dict(n_layer=4, n_head=4, n_embd=128, n_positions=128, vocab_size=2048, dropout=0.0),
    "gpt2-124m": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257,
                      scale_attn_by_inverse_layer_idx=False),
    "biomedlm-125m": dict(n_layer=12, n_head=12, n_embd=768),  # BioMedLM: size of its ablations
    "biomedlm": dict(),
}


# ---------------------------------------------------------------------------------------------
# the model


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention; logits q·k / sqrt(D) / (layer_idx + 1)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        C = config.n_embd
        self.c_attn = nn.Linear(C, 3 * C)
        self.c_proj = nn.Linear(C, C)
        self.n_head, self.dropout, self.layer_idx = config.n_head, config.dropout, layer_idx
        self.scale = (C // config.n_head) ** -0.5
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_idx + 1

    def forward(self, x, seed, cache=None, mask=None):
        """x (B, T, C) -> (B, T, C). With a cache, x continues the positions that it holds.

        mask, bool, broadcasts to (B, H, T, S) and says who sees whom; None: causal.
        """
        dropout_p = self.dropout if self.training else 0.0
        qkv = self.c_attn(x)
        if cache is None and mask is None:
            y = attention(qkv, self.n_head, self.scale, dropout_p, seed)
        else:
            B, T, C = x.shape
            # (B, T, 3C) -> 3 x (B, H, T, D)
            q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
            if cache is not None:
                k, v = cache.append(self.layer_idx, k, v)
                mask = cache.mask(T, k.size(2), x.device) if mask is None else mask
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p,
                                               scale=self.scale)
            y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        """(B, T, C) -> (B, T, C); c_fc's bias is added inside the fused GELU."""
        return self.c_proj(bias_gelu(F.linear(x, self.c_fc.weight), self.c_fc.bias))


class Block(nn.Module):
    """One pre-LayerNorm layer: x += attn(ln_1(x)); x += mlp(ln_2(x)).

    A branch's output is added to the residual stream by the LayerNorm that follows it, in one fused
    op; so a block takes the stream and the previous block's pending MLP output, and hands on both.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, residual, branch, seed, cache=None, mask=None):
        """residual (B, T, C) fp32, branch (B, T, C) or None in the first block -> the same pair."""
        dropout_p = self.dropout if self.training else 0.0
        y, residual = add_norm(branch, residual, self.ln_1, dropout_p, seed)
        y, residual = add_norm(self.attn(y, seed + 1, cache, mask), residual, self.ln_2,
                               dropout_p, seed + 2)
        return residual, self.mlp(y)


def add_norm(branch, residual, ln, dropout_p, seed):
    """LayerNorm of residual + dropout(branch), and that sum; branch None adds nothing."""
    if branch is None:
        return layer_norm(residual, ln.weight, ln.bias, ln.eps), residual
    return add_layer_norm(branch, residual, ln.weight, ln.bias, ln.eps, dropout_p, seed)


class KVCache:
    """Keys and values of the positions seen so far, per layer (B, H, capacity, D), filled in place.

    n_pad (B,) int64: leading positions of each row that are padding, seen by nothing; None: none.
    """

    def __init__(self, n_layer, capacity=1024, n_pad=None):
        self.buffers, self.capacity = [None] * n_layer, capacity
        self.length, self.n_pad = 0, n_pad

    def append(self, layer, k, v):
        """Add k, v (B, H, T, D) of one layer; returns all that it holds now."""
        if self.buffers[layer] is None:
            B, H, _, D = k.shape
            self.buffers[layer] = k.new_empty(2, B, H, self.capacity, D)
        end = self.length + k.size(2)
        held = self.buffers[layer][:, :, :, :end]
        held[0, :, :, self.length:], held[1, :, :, self.length:] = k, v
        return held[0], held[1]

    def reorder(self, rows):
        """Keep the given batch rows, in that order: a beam's history follows the beam."""
        for layer, old in enumerate(self.buffers):
            new = old.new_empty(2, len(rows), *old.shape[2:])
            new[:, :, :, :self.length] = old[:, rows, :, :self.length]
            self.buffers[layer] = new
        if self.n_pad is not None:
            self.n_pad = self.n_pad[rows]

    def positions(self, T, device):
        """Positions of T new tokens, (1, T) or (B, T); padding has position 0."""
        new = torch.arange(self.length, self.length + T, device=device)[None]
        return new if self.n_pad is None else (new - self.n_pad[:, None]).clamp(min=0)

    def mask(self, T, S, device):
        """Who of S positions each of T new ones sees, bool (T, S) or (B, 1, T, S); None: all."""
        if T == 1 and self.n_pad is None:
            return None
        causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
        if self.n_pad is None:
            return causal
        real = torch.arange(S, device=device) >= self.n_pad[:, None]  # (B, S)
        diagonal = torch.eye(S, dtype=torch.bool, device=device)[S - T:]  # padding sees itself
        return ((causal & real[:, None, :]) | diagonal)[:, None]


class GPT(nn.Module):
    """GPT-2 as BioMedLM uses it. Parameter names are Hugging Face's; the head is `wte` (tied)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.n_positions, config.n_embd),
            h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)))
        self.activation_checkpointing = False
        self.apply(self._init_weights)
        # GPT-2: residual projections are scaled down by the number of residual additions
        for block in self.transformer.h:
            for proj in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(proj.weight, 0.0,
                                config.initializer_range / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def n_params(self):
        """Parameters, the tied head counted once: 2,594,247,680 for BioMedLM."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, idx, cache=None, positions=None, mask=None):
        """Final hidden states, after ln_f.

        idx (B, T) int64; with a KVCache, idx continues what it holds. positions (B, T) int64
        default to 0, 1, ... after the cache; given, they must lie within the context, and T may
        exceed it (branches that share a prefix, told apart by mask: bool, broadcast to
        (B, H, T, S), True where a row sees a column; default causal). Returns (B, T, C).
        ValueError beyond the context.
        """
        B, T = idx.shape
        start = cache.length if cache is not None else 0
        if positions is None and start + T > self.config.n_positions:
            raise ValueError(f"{start + T} tokens are more than the context of "
                             f"{self.config.n_positions}: shorten the input")
        if positions is None and cache is not None:
            positions = cache.positions(T, idx.device)
        elif positions is None:
            positions = torch.arange(T, device=idx.device)
        residual = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        seed = 0
        if self.training and self.config.dropout > 0:
            residual = F.dropout(residual, self.config.dropout)
            # One draw a forward from the CPU's generator (no device sync): a checkpointed block
            # that runs again sees the same seed, and seeding torch makes the step repeatable.
            seed = int(torch.randint(2**31 - 4 * self.config.n_layer - 4, ()))
        branch = None
        for i, block in enumerate(self.transformer.h):
            args = (residual, branch, seed + 4 * i, cache, mask)
            if self.activation_checkpointing and self.training:
                residual, branch = torch.utils.checkpoint.checkpoint(
                    block, *args, use_reentrant=False)
            else:
                residual, branch = block(*args)
        dropout_p = self.config.dropout if self.training else 0.0
        y, _ = add_norm(branch, residual, self.transformer.ln_f, dropout_p,
                        seed + 4 * self.config.n_layer)
        if cache is not None:
            cache.length += T
        return y

    def forward(self, idx, targets=None):
        """idx (B, T) int64. Without targets: (logits (B, T, V), None).

        With targets (B, T) int64, already shifted, -100 = ignored: (None, mean loss in nats); the
        whole logits never exist then.
        """
        x = self.hidden(idx)
        if targets is None:
            return F.linear(x, self.transformer.wte.weight), None
        return None, cross_entropy(x.view(-1, x.size(-1)), self.transformer.wte.weight,
                                   targets.reshape(-1))

    @staticmethod
    def config_of(path):
        """GPTConfig of a run or of a Hugging Face GPT-2 folder, without its weights."""
        folder = Path(path)
        if not (folder / "config.json").exists():
            hint = "give the folder of a run or of a Hugging Face GPT-2"
            if not folder.exists():
                hint += "; the released weights: python data.py download biomedlm --out DIR"
            raise FileNotFoundError(f"no config.json in {folder}: {hint}")
        return GPTConfig.from_hf(json.loads((folder / "config.json").read_text()))

    @staticmethod
    def from_pretrained(path, dtype=torch.float32, device="cpu", dropout=None):
        """Model of a run or of a Hugging Face GPT-2 folder, in eval mode.

        dropout replaces the folder's, None keeps it. Reads config.json beside checkpoint_*.pt (the
        newest whole one), pytorch_model.bin or model.safetensors, sharded or not, memory-mapped.
        Raises FileNotFoundError or ValueError.
        """
        return load_pretrained(Path(path), dtype, device, dropout)

    def save_pretrained(self, path):
        """Write config.json and pytorch_model.bin, a folder that `transformers` loads."""
        save_pretrained(self, path)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None,
                 num_beams=1, no_repeat_ngram_size=0, length_penalty=1.0, eot_id=None, n_pad=None):
        """Continue idx (B, T) int64 by up to max_new_tokens tokens; returns (B, <= T + new) int64.

        Prompts of unlike length stand at the right: n_pad (B,) int64 counts the padding before.
        Samples from the softmax at `temperature` (0: greedy) among the top_k tokens and the top_p
        mass; num_beams > 1 searches with beams instead, scoring sum of log-probabilities /
        length ** length_penalty as Hugging Face does. After eot_id a row is filled with it.
        """
        T = idx.size(1)
        if T == 0:
            raise ValueError("an empty prompt: start from the end-of-text token instead")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: use 1 or more")
        if T + max_new_tokens > self.config.n_positions:
            raise ValueError(
                f"{T} prompt + {max_new_tokens} new tokens exceed the context of "
                f"{self.config.n_positions}: shorten the prompt or lower max_new_tokens")
        if temperature < 0:
            raise ValueError(f"temperature {temperature} is negative: use 0 (greedy) or more")
        if num_beams > 1:
            return self._beam_search(idx, max_new_tokens, num_beams, no_repeat_ngram_size,
                                     length_penalty, eot_id, n_pad)
        generator = None
        if seed is not None:
            generator = torch.Generator(device=idx.device).manual_seed(seed)
        cache, new = KVCache(self.config.n_layer, T + max_new_tokens, n_pad), idx
        finished = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits = self._next_logits(new, cache)  # (B, V)
            ban_repeats(logits, idx, no_repeat_ngram_size, n_pad)
            new = sample(logits, temperature, top_k, top_p, generator)  # (B, 1)
            if eot_id is not None:
                new[finished] = eot_id
                finished |= new[:, 0] == eot_id
            idx = torch.cat([idx, new], dim=1)
            if eot_id is not None and finished.all():
                break
        return idx

    def _next_logits(self, idx, cache):
        hidden = self.hidden(idx, cache)[:, -1]  # (B, T, C) -> (B, C)
        return F.linear(hidden, self.transformer.wte.weight).float()

    def _beam_search(self, idx, max_new_tokens, K, no_repeat_ngram_size, length_penalty, eot_id,
                     n_pad):
        """Beams of every row advance together: (B, T) -> (B * K, t), the best ended one wins."""
        B, T = idx.shape
        V = self.config.vocab_size
        cache = KVCache(self.config.n_layer, T + max_new_tokens, n_pad)
        logits = self._next_logits(idx, cache).repeat_interleave(K, dim=0)
        cache.reorder(torch.arange(B, device=idx.device).repeat_interleave(K))
        beams = idx.repeat_interleave(K, dim=0)  # (B * K, T)
        scores = torch.full((B, K), -math.inf, device=idx.device)
        scores[:, 0] = 0.0  # all beams of a row start alike: only the first may branch
        ended = [[] for _ in range(B)]  # per row: (normalised score, tokens)
        for length in range(1, max_new_tokens + 1):
            logits = F.log_softmax(logits, dim=-1)  # before the ban, as Hugging Face has it
            ban_repeats(logits, beams, no_repeat_ngram_size, cache.n_pad)
            total = scores.view(-1, 1) + logits  # (B * K, V)
            # 2K candidates: even if K of them end, K are left to go on
            top, flat = total.view(B, K * V).topk(2 * K, dim=1)
            rows, tokens = flat // V, flat % V
            keep = torch.empty(B, K, dtype=torch.long, device=idx.device)
            for b in range(B):
                alive = []
                for j in range(2 * K):
                    if eot_id is not None and tokens[b, j] == eot_id:
                        if j < K:  # as Hugging Face: an end ranked below the K best does not count
                            seq = torch.cat([beams[b * K + rows[b, j]], tokens[b, j:j + 1]])
                            ended[b].append((top[b, j].item() / length**length_penalty, seq))
                    else:
                        alive.append(j)
                keep[b] = torch.tensor(alive[:K])
                ended[b] = sorted(ended[b], key=lambda e: -e[0])[:K]
            scores = top.gather(1, keep)
            first = torch.arange(B, device=idx.device)[:, None] * K
            source = (rows.gather(1, keep) + first).view(-1)
            new = tokens.gather(1, keep).view(-1, 1)
            beams = torch.cat([beams[source], new], dim=1)
            best = (scores[:, 0] / length**length_penalty).tolist()
            if length == max_new_tokens or all(
                    len(e) == K and e[-1][0] >= s for e, s in zip(ended, best)):
                break
            cache.reorder(source)
            logits = self._next_logits(new, cache)
        for b in range(B):
            if len(ended[b]) < K:  # beams still running compete with those that ended
                ended[b] += [(scores[b, k].item() / length**length_penalty, beams[b * K + k])
                             for k in range(K)]
        best = [max(e, key=lambda pair: pair[0])[1] for e in ended]
        fill = eot_id if eot_id is not None else 0
        return nn.utils.rnn.pad_sequence(best, batch_first=True, padding_value=fill)


def sample(logits, temperature, top_k, top_p, generator):
    """One token id per row, (B, V) logits -> (B, 1) int64. Overwrites logits."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits[logits < kth] = -math.inf
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1).cumsum(dim=-1)
        # a token goes when the mass before it already reaches top_p; the first always stays
        drop = mass - ordered.softmax(dim=-1) >= top_p
        logits[drop.scatter(1, order, drop)] = -math.inf
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def ban_repeats(logits, idx, n, n_pad=None):
    """Set to -inf, in place, the tokens that would repeat an n-gram of idx (B, T); n = 0: none."""
    if n == 0 or idx.size(1) < n:
        return
    starts = [0] * len(idx) if n_pad is None else n_pad.tolist()
    for row, tokens, start in zip(logits, idx.tolist(), starts):
        last = tokens[len(tokens) - n + 1:]
        row[[tokens[i + n - 1] for i in range(start, len(tokens) - n + 1)
             if tokens[i:i + n - 1] == last]] = -math.inf


# ---------------------------------------------------------------------------------------------
# folders: runs of train.py and Hugging Face GPT-2

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def load_tensors(path):
    """Tensors of one file, memory-mapped: a pickle of plain tensors only, or safetensors."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"reading {path} needs: pip install safetensors") from None
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as e:
        raise ValueError(f"{path} is damaged or no file of plain tensors ({type(e).__name__}): "
                         "copy or download it again") from e


def newest_checkpoint(run):
    """(path, contents) of a run's newest whole checkpoint, or (None, None); warns of others."""
    for path in sorted(Path(run).glob("checkpoint_*.pt"), reverse=True):
        try:
            return path, load_tensors(path)
        except ValueError as e:
            print(f"warning: skipping {e}", file=sys.stderr)
    return None, None


def read_weights(folder):
    """State dict of a folder in this model's own layout and names."""
    _, checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        return checkpoint["model"]
    state = {}
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            shards = [name] if (folder / name).exists() else []
        for shard in shards:
            if not (folder / shard).exists():
                raise FileNotFoundError(f"{folder / shard} is missing: copy or download it again")
            state.update(load_tensors(folder / shard))
        if state:
            return from_hf_names(state)
    raise FileNotFoundError(f"{folder} holds neither checkpoint_*.pt nor pytorch_model.bin nor "
                            "model.safetensors: give the folder of a run or of a GPT-2")


def from_hf_names(state):
    """Hugging Face's state dict -> ours: Conv1D matrices are stored [in, out], Linear's [out, in].

    Dropped: the causal masks that old versions saved, and the head, which is tied to wte here.
    """
    ours = {}
    for name, tensor in state.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        ours[name] = tensor.t() if name.endswith(CONV1D) else tensor
    return ours


def load_pretrained(folder, dtype, device, dropout):
    """See GPT.from_pretrained."""
    config = GPT.config_of(folder)
    if dropout is not None:
        config = replace(config, dropout=dropout)
    with torch.device("meta"):  # no memory and no random numbers spent on weights to be replaced
        model = GPT(config)
    state = read_weights(folder)
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]} and {len(missing) - 1} other tensors: "
                         "it is not the GPT-2 that its config.json describes")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{folder}: {name} is {tuple(state[name].shape)}, config.json implies "
                             f"{tuple(tensor.shape)}: use the config.json saved with the weights")
    if dtype != torch.float32 and torch.device(device).type == "cpu":  # to generate, not to train
        model.load_state_dict({n: column_major(t.to(dtype)) for n, t in state.items()}, assign=True)
        return model.requires_grad_(False).eval()
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(state[name])
    return model.eval()


def column_major(t):
    """The same matrix, stored [in, out], as Hugging Face has it and one row times it reads fastest.

    Where it lies so already nothing is copied: it stays in the mapped file until it is used.
    """
    return t if t.dim() < 2 or t.stride(0) == 1 else t.t().contiguous().t()


def write_atomically(path, write):
    """write(temporary path), then fsync and rename: `path` is whole or as it was."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_pretrained(model, path):
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: (t.t() if name.endswith(CONV1D) else t).detach().cpu().contiguous()
             for name, t in model.state_dict().items()}
    write_atomically(folder / "pytorch_model.bin", lambda tmp: torch.save(state, tmp))
    config = json.dumps(model.config.to_hf(), indent=2) + "\n"
    write_atomically(folder / "config.json", lambda tmp: tmp.write_text(config))
