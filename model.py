"""GPT-2 as BioMedLM uses it (arXiv 2403.18421): the model, generation, folders, fused ops.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig.preset("biomedlm"))            # random weights
    model = GPT.from_pretrained("out/pubmed")            # a run, or a Hugging Face GPT-2
    python model.py export --init out/pubmed --out DIR   # a folder that `transformers` opens

Reads the folders of runs and of Hugging Face's GPT-2, and writes the latter. Leaves out training
(train.py) and task heads (finetune.py).

Legend: B batch, T time, C width, H heads, D head width (C = H·D), V vocabulary, N = B·T rows, S all
tokens of a row when T new ones follow cached ones.

The model calls four fused ops: add_layer_norm, bias_gelu, attention, cross_entropy. Each computes
what its name says; an op with dropout draws its mask from a seed. The second half of this file has
each in the same order: a note that derives its backward, the reference (plain PyTorch, any dtype),
the kernels (forward first), the autograd wiring, the public op. A CUDA tensor takes the Triton
kernel, TRITON_INTERPRET=1 runs the same kernel on the CPU, anything else (no GPU, no triton) takes
the reference. Statistics, softmax and sums are fp32. Linear, which stands there too, is nn.Linear
with a faster backward for training on a GPU. To learn the model, read down to "fused ops".
"""

import argparse
import functools
import json
import math
import os
import pickle
import shutil
import sys
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

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
        """x (B, T, C) -> (B, T, C); dropout falls on the attention probabilities.

        Training has no cache and no mask: each token sees itself and those before it. Generation
        has a cache, the KVCache of earlier tokens. mask: bool, broadcasts to (B, H, T, S), True
        where a token of x sees one of all S tokens.
        """
        qkv = self.c_attn(x)  # (B, T, C) -> (B, T, 3C), packed [q | k | v]
        # RoPE would go here, before both paths: turn q and k, two of qkv.view(B, T, 3, H, D), by
        # the positions. GPT.hidden knows these, (T,) or (B, T), and would hand them down through
        # Block.forward. wpe would go, and MODEL_TYPE take another name.
        if cache is None and mask is None:
            y = attention(qkv, self.n_head, self.scale, dropout_p, seed)
        else:
            q, k, v = split_heads(qkv, self.n_head)  # (B, T, 3C) -> three times (B, H, T, D)
            if cache is not None:
                k, v = cache.append(self.layer_idx, k, v)  # (B, H, T, D) -> (B, H, S, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p,
                                               scale=self.scale)
            y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """GELU between two linear layers, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_fc = Linear(C, 4 * C)
        self.c_proj = Linear(4 * C, C)

    def forward(self, x):
        x = self.c_fc(x, with_bias=False)  # (B, T, C) -> (B, T, 4C)
        x = bias_gelu(x, self.c_fc.bias)  # gelu(x + bias)
        return self.c_proj(x)  # (B, T, 4C) -> (B, T, C)


# In plain form a block is two lines:
#
#     x = x + dropout(attn(ln_1(x)))
#     x = x + dropout(mlp(ln_2(x)))
#
# After every sum "x + dropout(...)" comes a LayerNorm, and one fused op does both: AddNorm. But the
# second sum's LayerNorm is the next block's ln_1 (after the last block: ln_f). So a block doesn't
# add its MLP's output to x. It returns the pair (branch, residual), which is (MLP's output, x so
# far), and the next AddNorm makes the sum. The arithmetic is the same.


class AddNorm(nn.LayerNorm):
    """x = residual + dropout(branch), then LayerNorm of x: one fused op."""

    def forward(self, branch, residual, dropout_p, seed):
        """(B, T, C) each -> LayerNorm(x), x; x has residual's dtype: fp32 in training.

        branch is what attention or MLP put out; None before the first block: x = residual.
        """
        if branch is None:
            return layer_norm(residual, self.weight, self.bias, self.eps), residual
        return add_layer_norm(branch, residual, self.weight, self.bias, self.eps, dropout_p, seed)


class Block(nn.Module):
    """One pre-LayerNorm layer."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = AddNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = AddNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, branch, residual, dropout_p, seed, cache=None, mask=None):
        """The pair (branch, residual) before this block -> the pair after it, (B, T, C) each.

        branch is None before the first block. The dropout masks are drawn from
        seed (the branch that came in), seed + 1 (attention) and seed + 2 (attention's output).
        """
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
            ln_f=AddNorm(config.n_embd, config.layer_norm_epsilon)))
        std = config.initializer_range
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0.0, std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)  # LayerNorm's weights are 1 already
        # GPT-2: the last layer of a branch starts smaller, since 2 * n_layer branches are added up
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, 0.0, std / math.sqrt(2 * config.n_layer))

    def n_params(self):
        """Parameters, the tied head counted once: 2,594,247,680 for BioMedLM."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, idx, cache=None, positions=None, mask=None):
        """Final hidden states, after ln_f: idx (B, T) int64 -> (B, T, C).

        Training gives idx alone. Generation gives a KVCache of earlier tokens, which idx continues.
        ValueError past the context.

        finetune.py gives positions (B, T) int64 and a mask (bool, broadcasts to (B, H, T, T), True
        where a token sees another), and no cache: its rows hold a question and then several
        answers. An answer sees the question and itself. Such a row may be longer than the context;
        its positions are not.
        """
        if positions is None:
            start = cache.length if cache else 0
            length = start + idx.size(1)
            if length > self.config.n_positions:
                raise ValueError(f"{length} tokens are more than the context of "
                                 f"{self.config.n_positions}: shorten the input")
            positions = torch.arange(start, length, device=idx.device)  # (T,)
        if cache:
            cache.length = length
            mask = torch.arange(length, device=idx.device) <= positions[:, None]  # (T, S)
        if mask is not None:
            # PyTorch may pick cuDNN's attention, which makes a plan for each new shape, in 30 ms.
            # Here most shapes are new. So it is turned off, for the whole process.
            torch.backends.cuda.enable_cudnn_sdp(False)
        residual = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        seed = 0
        dropout_p = self.config.dropout if self.training else 0.0
        if dropout_p > 0:
            residual = F.dropout(residual, dropout_p)
            # Drawn on the CPU: no wait for the GPU, and torch.manual_seed makes a step repeatable.
            # Each block adds 4, of which it uses 3. The last one's seeds still lie below 2**31.
            seed = int(torch.randint(2**31 - 4 * self.config.n_layer - 4, ()))
        branch = None
        for block in self.transformer.h:
            if self.activation_checkpointing and self.training:
                block = functools.partial(checkpoint, block, use_reentrant=False)
            branch, residual = block(branch, residual, dropout_p, seed, cache, mask)
            seed += 4  # the next block draws other masks
        x, _ = self.transformer.ln_f(branch, residual, dropout_p, seed)
        return x

    def forward(self, idx, targets=None):
        """idx (B, T) int64. Without targets: (logits (B, T, V), None).

        With targets (B, T) int64, already shifted, -100 = ignored: (None, mean loss in nats). The
        logits are made a chunk of rows at a time then: all of them would be gigabytes.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.logits(x), None
        head = self.transformer.wte.weight  # (V, C)
        return None, cross_entropy(x.flatten(0, 1), head, targets.flatten())

    def logits(self, hidden):
        """(..., C) -> (..., V): the head is the embedding matrix."""
        return F.linear(hidden, self.transformer.wte.weight)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens,
                 temperature=1.0,  # of the softmax that is sampled; 0: greedy
                 top_k=None,  # sample among so many tokens
                 seed=None,  # of sampling; None: torch's own generator goes on
                 num_beams=1,  # above 1: beam search instead of sampling
                 no_repeat_ngram_size=0,  # no n-gram of so many tokens comes twice; 0: any may
                 length_penalty=1.0,  # beams only
                 eot_id=None):  # ends a row, which is then filled with it; None: nothing ends
        """Continue idx (B, T) int64 by up to max_new_tokens tokens; returns (B, <= T + new) int64.

        ValueError where the prompt is empty (start from end-of-text) or the context too short.
        """
        T = idx.size(1)
        if not 0 < T < T + max_new_tokens <= self.config.n_positions:
            raise ValueError(f"{T} prompt + {max_new_tokens} new tokens: use 1 or more of each, "
                             f"and no more than the context of {self.config.n_positions} in all")
        if eot_id is None:
            eot_id = self.config.vocab_size  # no token has this id: nothing ends
        if num_beams > 1:
            texts = [beam_search(self, row[None], max_new_tokens, num_beams, no_repeat_ngram_size,
                                 length_penalty, eot_id) for row in idx]
            return nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=eot_id)
        cache = KVCache()
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        new = idx
        finished = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits = self.logits(self.hidden(new, cache)[:, -1])  # of the next token, (B, V)
            if no_repeat_ngram_size:
                ban_repeats(logits, idx.tolist(), no_repeat_ngram_size)
            new = sample(logits, temperature, top_k, generator)  # (B, 1)
            new[finished] = eot_id
            finished |= new[:, 0] == eot_id
            idx = torch.cat([idx, new], dim=1)
            if finished.all():
                break
        return idx

    @staticmethod
    def from_pretrained(path, dtype=torch.float32, device="cpu", dropout=None):
        """Model of a run or of a Hugging Face GPT-2 folder, in eval mode.

        Reads config.json beside checkpoint_*.pt (the newest whole one), model.safetensors or
        pytorch_model.bin, sharded or not. dropout replaces the folder's; None keeps it. dtype None
        keeps each tensor as it lies in the file, memory-mapped: so it takes no memory that the
        system can't free. Raises FileNotFoundError or ValueError.
        """
        config = config_of(path)
        if dropout is not None:
            config.dropout = dropout
        model = without_memory(config)
        saved = read_weights(Path(path))  # it may hold other tensors too
        check_tensors(saved, model.state_dict(), path)
        state = {name: saved[name] for name in model.state_dict()}
        if dtype is not None:
            for name, tensor in state.items():
                state[name] = tensor.to(device, dtype, copy=True,  # so that nothing stays mapped
                                        memory_format=torch.contiguous_format)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, path):
        """Write config.json and the weights: a folder that `transformers` loads.

        The weights go to model.safetensors, without the safetensors package to
        pytorch_model.bin. added_tokens.json, which Tokenizer.save wrote there, is read.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: t.cpu().contiguous() for name, t in transposed(self.state_dict()).items()}
        temporary = folder / "weights.tmp"  # the model may come from the file that is replaced
        if load_file is None:
            torch.save(state, temporary)
            weights = folder / "pytorch_model.bin"
        else:
            save_file(state, temporary, metadata={"format": "pt"})
            weights = folder / "model.safetensors"
        temporary.replace(weights)
        added = folder / "added_tokens.json"
        special = list(json.loads(added.read_bytes())) if added.exists() else []
        tokenizer = {  # for `transformers`' AutoTokenizer
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": self.config.n_positions,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "pad_token": "[PAD]" if "[PAD]" in special else "<|endoftext|>",
            "additional_special_tokens": special,
        }
        contents = {"tokenizer_config.json": tokenizer, "config.json": self.config.to_hf()}
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        shutil.copymode(folder / "config.json", weights)  # save_file's is for its owner alone


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
    scale_attn_by_inverse_layer_idx: bool = True  # in BioMedLM's config.json, not in the paper
    eot_id: int | None = None  # end-of-text; None: the last id, as in BioMedLM and GPT-2

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}: "
                             "choose a width that is a multiple of the number of heads")
        # Hugging Face's default is GPT-2's 50256, in a smaller vocabulary too: the last id is meant
        last = self.vocab_size - 1
        self.eot_id = last if self.eot_id is None else min(self.eot_id, last)

    @staticmethod
    def preset(name, **overrides):
        """A shape of PRESETS; `overrides` replace its fields."""
        return GPTConfig(**PRESETS[name] | overrides)

    def to_hf(self):
        """The fields of Hugging Face's GPT2Config, for config.json."""
        named = {HF_NAMES.get(name, name): value for name, value in asdict(self).items()}
        return {
            **named,
            "architectures": ["GPT2LMHeadModel"],
            "model_type": MODEL_TYPE,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "attn_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
            "bos_token_id": self.eot_id,
        }

    @staticmethod
    def from_hf(hf):
        """GPTConfig of a parsed config.json; ValueError where it describes another architecture.

        resid_pdrop stands for the rates of all three dropouts.
        """
        if "quantization_config" in hf:
            raise ValueError("the weights are quantized: use the folder they were made from, or "
                             "`transformers`' model.dequantize() and save_pretrained(DIR)")
        names = {field.name: HF_NAMES.get(field.name, field.name) for field in fields(GPTConfig)}
        given = {ours: hf[theirs] for ours, theirs in names.items() if theirs in hf}
        config = GPTConfig(**HF_DEFAULTS | given)
        wanted = {
            "model_type": [MODEL_TYPE],
            "activation_function": ["gelu_new", "gelu_pytorch_tanh"],  # two names of one function
            "scale_attn_weights": [True],
            "n_inner": [None, 4 * config.n_embd],
            "tie_word_embeddings": [True],  # the head is wte
        }
        for key, allowed in wanted.items():
            if hf.get(key, allowed[0]) not in allowed:
                raise ValueError(f"{key} is {hf[key]!r}, but this model is a GPT-2 with "
                                 f"{allowed[0]!r}: use a GPT-2 folder")
        return config


# A fork with another architecture or activation takes a name of its own: its folders then are not
# read as a GPT-2 by others, and only this code opens them.
MODEL_TYPE = "gpt2"

HF_NAMES = {"dropout": "resid_pdrop", "eot_id": "eos_token_id"}  # the other fields are named alike

# What a config.json leaves out: Hugging Face's defaults, which are GPT-2 of 124M parameters.
HF_DEFAULTS = dict(
    n_layer=12,
    n_head=12,
    n_embd=768,
    vocab_size=50257,
    eot_id=50256,  # in an embedding that was padded, too
    scale_attn_by_inverse_layer_idx=False)

PRESETS = {
    # our choice: two layers learn the demo's 256 facts, on two CPU cores, in two minutes
    "demo": dict(n_layer=2, n_head=4, n_embd=128, n_positions=128, vocab_size=2048, dropout=0.0),
    "gpt2-124m": HF_DEFAULTS,
    "biomedlm-125m": dict(n_layer=12, n_head=12, n_embd=768),  # BioMedLM: size of its ablations
    "biomedlm": dict(),
}


# ---------------------------------------------------------------------------------------------
# generation: what GPT.generate calls


class KVCache:
    """Keys and values of the tokens so far, so that a step computes those of new tokens only."""

    def __init__(self):
        self.layers = {}  # layer index -> its keys and values, (2, B, H, S, D)
        self.length = 0  # S

    def append(self, layer, k, v):
        """Add one layer's k and v, (B, H, T, D) each; returns all of its keys and values."""
        new = torch.stack([k, v])
        if layer in self.layers:
            new = torch.cat([self.layers[layer], new], dim=3)
        self.layers[layer] = new
        return new


def sample(logits, temperature, top_k, generator=None):
    """One token id per row, (B, V) logits -> (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    V = logits.size(-1)
    top, ids = logits.float().topk(min(top_k or V, V))
    probs = (top / temperature).softmax(dim=-1)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))


def ban_repeats(logits, texts, n):
    """Set to -inf, in place, the tokens that would repeat an n-gram of a row's text.

    logits (B, V), texts: B lists of ids. For n = 3 and a text that ends in "a b": every token that
    has followed an earlier "a b".
    """
    for row, text in zip(logits, texts):
        last = text[len(text) - n + 1:]
        for i in range(len(text) - n + 1):
            *before, token = text[i:i + n]
            if before == last:
                row[token] = -math.inf


def beam_search(model, idx, max_new_tokens, K, no_repeat_ngram_size, length_penalty, eot_id):
    """The best text found with K beams that continues one prompt, as Hugging Face searches.

    idx (1, T) -> (at most T + max_new_tokens,). A text's score is its sum of log-probabilities
    divided by length ** length_penalty.
    """
    V = model.config.vocab_size
    cache = KVCache()
    texts = idx.tolist()  # of one beam at first, of K after a step
    sums = [0.0]  # of each text's log-probabilities
    ended = []  # the best K texts that ended: (score, text)
    new = idx
    for length in range(1, max_new_tokens + 1):
        divisor = length**length_penalty
        logits = model.logits(model.hidden(new, cache)[:, -1])  # (K, V)
        log_probs = logits.float().log_softmax(dim=-1)
        if no_repeat_ngram_size:  # after the softmax, as Hugging Face has it
            ban_repeats(log_probs, texts, no_repeat_ngram_size)
        log_probs += log_probs.new_tensor(sums)[:, None]
        top, flat = log_probs.flatten().topk(2 * K)  # even if K of them end, K are left to go on
        going_on = []  # (sum, parent, text)
        for place, (total, i) in enumerate(zip(top.tolist(), flat.tolist())):
            parent, token = divmod(i, V)
            text = [*texts[parent], token]
            if token != eot_id:
                going_on.append((total, parent, text))
            elif place < K:  # as Hugging Face: not an end among the lower K
                ended.append((total / divisor, text))
        ended = sorted(ended, reverse=True)[:K]
        sums, parents, texts = zip(*going_on[:K])
        running = sums[0] / divisor  # the score of the best text that goes on
        if len(ended) == K and ended[-1][0] >= running:
            break
        for layer, kv in cache.layers.items():  # a beam's history follows the beam
            cache.layers[layer] = kv[:, parents]
        new = idx.new_tensor([text[-1:] for text in texts])  # (K, 1)
    best = max([*ended, (running, texts[0])])
    return idx.new_tensor(best[1])


# ---------------------------------------------------------------------------------------------
# folders: of runs and of Hugging Face GPT-2, for GPT.from_pretrained and save_pretrained

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # one file, or several of a sharded model


def config_of(path):
    """GPTConfig of a run or of a Hugging Face GPT-2 folder, without its weights."""
    file = Path(path) / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"no config.json in {path}: give the folder of a run or of a Hugging Face GPT-2. "
            "A folder is made of a model's name by: hf download openai-community/gpt2 "
            "--local-dir DIR. The released weights: hf download stanford-crfm/BioMedLM "
            "--local-dir DIR")
    try:
        return GPTConfig.from_hf(json.loads(file.read_bytes()))
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e


def without_memory(config):
    """A GPT that has shapes and names only, and spends no random numbers."""
    with torch.device("meta"):
        return GPT(config)


def read_weights(folder):
    """State dict of a folder in this model's names and layout."""
    contents = newest_checkpoint(folder)
    if contents:
        return contents["model"]
    for pattern in WEIGHTS if load_file else WEIGHTS[::-1]:  # what can be read comes first
        state = {}
        for file in sorted(folder.glob(pattern)):
            state |= load_tensors(file)
        if state:
            return transposed(state)
    raise FileNotFoundError(f"{folder} holds neither checkpoint_*.pt nor model.safetensors nor "
                            "pytorch_model.bin: give the folder of a run or of a GPT-2")


def check_tensors(state, expected, path):
    """ValueError unless the state dict has a tensor for each of the expected: as large, finite."""
    for name, like in expected.items():
        found = state.get(name)
        fits = found is not None and found.shape == like.shape
        if not fits or not found.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"{path} has no {name} of shape {tuple(like.shape)} without NaN or "
                             "infinity: use the config.json saved with the weights, or an earlier "
                             "checkpoint")


def newest_checkpoint(run):
    """Contents of a run's newest whole checkpoint; None where it has no checkpoint.

    They are what train.py saves: "model", "optimizer" and "step". A file that is damaged or lacks a
    part is skipped with a warning. ValueError where no whole one is left.
    """
    paths = sorted(Path(run).glob("checkpoint_*.pt"), reverse=True)
    if not paths:
        return None
    weights = without_memory(config_of(run)).state_dict()
    for path in paths:
        try:
            contents = load_tensors(path)
            check_tensors(contents["model"], weights, path)
            contents["optimizer"]  # KeyError where it is missing
            contents["step"]
            return contents
        except (ValueError, KeyError) as e:
            print(f"warning: skipping {path}, no whole checkpoint: {e!r}", file=sys.stderr)
    raise ValueError(f"no checkpoint in {run} is whole: restore one, or train.py --fresh")


def load_tensors(path):
    """Contents of one file, memory-mapped: a pickle of plain tensors, or safetensors.

    A pickle's checksums are read first, 0.5 s per GB. Safetensors have none.
    """
    is_safetensors = path.suffix == ".safetensors"
    if is_safetensors and load_file is None:
        raise ValueError(f"reading {path} needs: pip install safetensors")
    try:
        if is_safetensors:
            return load_file(path)
        if zipfile.ZipFile(path).testzip():  # torch.save writes a zip file since torch 1.6
            raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError,
            zipfile.BadZipFile, SafetensorError) as e:
        reason = str(e).partition("\n")[0]
        raise ValueError(f"{path} is missing, damaged or no file of plain tensors "
                         f"({type(e).__name__} {reason}): copy or download it again. One that "
                         "torch wrote before 1.6: torch.save(torch.load(FILE), FILE)") from e


def transposed(state):
    """The state dict with its blocks' matrices transposed: Hugging Face's are [in, out], ours not.

    The same function goes both ways.
    """
    other = {}
    for name, tensor in state.items():
        name = "transformer." + name.removeprefix("transformer.")  # some files leave it out
        is_block_matrix = ".h." in name and tensor.ndim == 2
        other[name] = tensor.t() if is_block_matrix else tensor
    return other


def main():
    """The export command: a run's model and tokenizer as a folder that `transformers` opens."""
    parser = argparse.ArgumentParser(description="Write a run as a Hugging Face GPT-2 folder.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("--init", type=Path, required=True, help="folder of a run or of a GPT-2")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    from tokenizer import Tokenizer  # the model itself needs nothing of the project
    model = GPT.from_pretrained(args.init)
    Tokenizer.load(args.init).save(args.out)
    model.save_pretrained(args.out)
    print(f"wrote {args.out}")


# ---------------------------------------------------------------------------------------------
# fused ops: which path runs

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache  # every launch asks
def gpu():
    """The GPU's architecture, such as "sm_90" on Hopper; "" where the kernels don't run.

    They run on NVIDIA's GPUs that have bf16 products, which begin with capability 8.0.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" if major >= 8 else ""


@torch.compiler.assume_constant_result  # torch.compile asks once and keeps the answer
def kernels_active(device="cuda"):
    """The path of ops on tensors of `device`: "triton", "triton interpreter" or "reference"."""
    if INTERPRETED:
        return "triton interpreter"
    if triton is not None and torch.device(device).type == "cuda" and gpu():
        return "triton"
    return "reference"


def runs_kernel(x):
    """True if an op on tensor x runs its kernel. The kernels are fp32 inside, so that a float64
    tensor, which only tests have, takes the reference. So does an empty one: nothing to launch."""
    kernels = kernels_active(x.device) != "reference"
    return kernels and x.dtype != torch.float64 and x.numel() > 0


def compute_dtype(x):
    """The dtype that autocast wants on x's device; outside autocast x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def at_least_fp32(x):
    """x for statistics and softmax: bf16 becomes fp32, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------------------------------
# fused ops: what all kernels share


def jit(fn):
    """triton.jit where there is triton. The seed changes every step: it must not recompile."""
    return triton.jit(fn, do_not_specialize=["seed"]) if triton else fn


@torch.compiler.disable  # torch.compile calls a kernel's op and never looks into it
def apply(function, *args):
    """Run an autograd.Function."""
    return function.apply(*args)


def run_op(function, reference, *args):
    """An op by its kernels, or by its reference: the first argument's device and dtype decide."""
    if runs_kernel(args[0]):
        return apply(function, *args)
    return reference(*args)


def n_programs(x, per_sm):
    """How many programs to start where each walks many rows: per_sm for every multiprocessor.

    The number depends on the GPU alone, so sums over rows are bit-identical every run.
    """
    if not x.is_cuda:
        return per_sm
    return per_sm * torch.cuda.get_device_properties(x.device).multi_processor_count


@jit
def load_fp32(ptr, mask, other: constexpr = 0.0):
    """Values in fp32; `other` where the mask is False. tl.store casts back by itself."""
    return tl.load(ptr, mask=mask, other=other).to(tl.float32)


# ---------------------------------------------------------------------------------------------
# fused ops: dropout
#
# Forward and backward must draw the same mask, and storing it would cost a byte an element. So the
# kernels compute it from (seed, row, column) with a 32-bit integer hash. An element is dropped if
# its hash, as a number, lies below threshold = p · 2^32. The reference computes the same mask.
#
# A row's key is made with "lowbias32" of Chris Wellons' hash-prospector, in which every input bit
# changes every output bit with probability one half. An element's hash must cost less, and is just
# good enough: without its last multiplication test_dropout_masks fails. Triton has a generator of
# its own, Philox. It takes ten times the instructions, more than attention does.


def dropout_arguments(p):
    """The kernels' dropout arguments but for the seed, an int below 2^31."""
    return dict(threshold=round(p * 2**32), factor=1 / (1 - p), DROPOUT=p > 0)


def lowbias32(x):
    """Hash of 32 bits. x: uint32 in a kernel; int64 in the reference, where "&" keeps 32 bits."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def element_hash(key, col):
    """Hash of a row's key and a column: uint32 in a kernel, int32 in the reference, since torch
    cannot shift uint32. Products wrap around alike; "&" takes away copies of int32's sign."""
    # 0x9E3779B1 is 2^32 over the golden ratio: it spreads neighbouring columns far apart.
    x = key ^ (col * 0x9E3779B1)
    x *= 0x7FEB352D  # in place, which is faster where x is a tensor of torch
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B
    return x


lowbias32_kernel = jit(lowbias32)
element_hash_kernel = jit(element_hash)


@jit
def dropout_key(seed, row):
    """The part of the hash that a row's elements share, so that it is made once a row."""
    return lowbias32_kernel(lowbias32_kernel(seed.to(tl.uint32)) ^ row.to(tl.uint32))


@jit
def keeps(key, col, threshold):
    """True where the element of a column stays; key is its row's."""
    return element_hash_kernel(key, col.to(tl.uint32)) >= threshold.to(tl.uint32)


def dropout_ref(x, p, seed):
    """Dropout of x (..., columns), bit for bit the kernels' mask. All of ... counts as rows."""
    if p == 0:
        return x
    dropout = dropout_arguments(p)
    row = torch.arange(x[..., 0].numel(), device=x.device).view(x[..., :1].shape)
    key = lowbias32(lowbias32(seed) ^ row).int()
    col = torch.arange(x.shape[-1], device=x.device, dtype=torch.int32)
    # Flipping the top bit of both sides makes int32 compare as uint32 does.
    stays = (element_hash(key, col) ^ -(2**31)) >= dropout["threshold"] - 2**31
    return x * (stays * dropout["factor"])


# ---------------------------------------------------------------------------------------------
# fused ops: dropout, residual add, LayerNorm
#
#     r = residual + dropout(x)      x̂ = (r - mean(r)) · rstd      y = x̂ · w + b
#
# Backward. g = dy · w is the gradient at x̂. A change of one r_j moves x̂_j by rstd, and through mean
# and rstd it moves every x̂ of the row. If all r grow by the same amount, mean takes it away and x̂
# stays: so dr has no part along (1, 1, …). If all r - mean grow by the same factor, rstd takes it
# away: so dr has no part along x̂. What remains of g is
#     dr = rstd · (g - mean(g) - x̂ · mean(g · x̂)) + dr_later
# where dr_later is the gradient that reaches r from later blocks, along the residual stream. Then
#     d_residual = dr      dx = dr through dropout's mask
#     dw = Σ_rows dy · x̂      db = Σ_rows dy
#
# The last two sums run over all rows. Each program walks many rows, keeps its own sums in registers
# and writes them once; then torch adds the programs' sums up. The order is fixed and there are no
# atomics, so that every run is bit-identical.
#
# A Triton block has a power of two of lanes. For C = 2560 that would be 4096, 37% of them idle. So
# a row is held as N_PIECES blocks of PIECE lanes, 2560 = 5 x 512, in a tuple. static_range unrolls
# the loop over them, because a tuple's index must be known when the kernel is compiled.


def layer_norm(x, weight, bias, eps=1e-5):
    """LayerNorm over the last dimension, without a kernel: only the first block's ln_1 has nothing
    to add. x (..., C) of any float dtype; weight, bias (C,), fp32 under autocast. Returns (..., C)
    in x's dtype, or autocast's."""
    wide = at_least_fp32(x)
    y = F.layer_norm(wide, weight.shape, weight.to(wide), bias.to(wide), eps)
    return y.to(compute_dtype(x))


def add_layer_norm_ref(x, residual, weight, bias, eps=1e-5, dropout_p=0.0, seed=0):
    branch = dropout_ref(at_least_fp32(x), dropout_p, seed)
    new_residual = (residual + branch).to(residual.dtype)
    return layer_norm(new_residual, weight, bias, eps).to(x.dtype), new_residual


@jit
def norm_forward_kernel(x_ptr,  # (N, C)
                        residual_ptr,  # (N, C)
                        w_ptr,  # (C,)
                        b_ptr,  # (C,)
                        y_ptr,  # written, (N, C)
                        r_ptr,  # written, (N, C): the new residual
                        mean_ptr,  # written, (N,)
                        rstd_ptr,  # written, (N,)
                        seed,
                        threshold,
                        factor,
                        DROPOUT: constexpr,
                        eps,
                        C: constexpr,
                        PIECE: constexpr,
                        N_PIECES: constexpr):
    """One row: its new residual r, its mean and rstd, and y."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * C passes 2^31 on long batches
    start = row * C
    lanes = tl.arange(0, PIECE)

    # Make r piece by piece and sum it. The pieces stay in registers for the two steps below.
    pieces = ()
    total = tl.zeros([PIECE], tl.float32)
    for i in tl.static_range(N_PIECES):
        cols = i * PIECE + lanes
        inside = cols < C
        r = load_fp32(x_ptr + start + cols, inside)
        if DROPOUT:
            r = tl.where(keeps(dropout_key(seed, row), cols, threshold), r, 0.0) * factor
        r += load_fp32(residual_ptr + start + cols, inside)
        stored = r.to(r_ptr.dtype.element_ty)
        tl.store(r_ptr + start + cols, stored, mask=inside)
        r = stored.to(tl.float32)  # rounded: normalise what backward will read
        total += r
        pieces += (r,)
    mean = tl.sum(total, 0) / C

    # The variance needs a second pass, over the registers. The one-pass formula, mean(r²) - mean²,
    # loses all digits at a mean of 100. Lanes outside the row must not count: r - mean isn't 0.
    total = tl.zeros([PIECE], tl.float32)
    for i in tl.static_range(N_PIECES):
        centred = tl.where(i * PIECE + lanes < C, pieces[i] - mean, 0.0)
        total += centred * centred
    rstd = 1 / tl.sqrt(tl.sum(total, 0) / C + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    # Normalise.
    for i in tl.static_range(N_PIECES):
        cols = i * PIECE + lanes
        inside = cols < C
        w = load_fp32(w_ptr + cols, inside)
        b = load_fp32(b_ptr + cols, inside)
        y = (pieces[i] - mean) * rstd * w + b
        tl.store(y_ptr + start + cols, y, mask=inside)


@jit
def norm_backward_kernel(dy_ptr,  # (N, C)
                         dlater_ptr,  # (N, C)
                         r_ptr,  # (N, C)
                         w_ptr,  # (C,)
                         mean_ptr,  # (N,)
                         rstd_ptr,  # (N,)
                         dx_ptr,  # written, (N, C)
                         dresidual_ptr,  # written, (N, C)
                         partial_ptr,  # written, (programs, 2, C)
                         n_rows,
                         seed,
                         threshold,
                         factor,
                         DROPOUT: constexpr,
                         C: constexpr,
                         PIECE: constexpr,
                         N_PIECES: constexpr):
    """Many rows: their dx and d_residual, and this program's part of dw and db."""
    # The program takes rows program, program + programs, program + 2 · programs, …
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, PIECE)
    dws = (tl.zeros([PIECE], tl.float32),) * N_PIECES
    dbs = (tl.zeros([PIECE], tl.float32),) * N_PIECES
    for step in range(0, n_rows - program, tl.num_programs(0)):
        row = program + step
        start = row * C
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)

        # Read the row once. g and x̂ stay in registers for dr below, whose two means are summed
        # here. The same values add to dw and db: new tuples, since a tuple cannot change.
        sum_g = tl.zeros([PIECE], tl.float32)
        sum_gx = tl.zeros([PIECE], tl.float32)
        gs = ()
        xhats = ()
        laters = ()
        new_dws = ()
        new_dbs = ()
        for i in tl.static_range(N_PIECES):
            cols = i * PIECE + lanes
            inside = cols < C
            dy = load_fp32(dy_ptr + start + cols, inside)
            r = load_fp32(r_ptr + start + cols, inside)
            xhat = tl.where(inside, (r - mean) * rstd, 0.0)
            g = dy * load_fp32(w_ptr + cols, inside)
            sum_g += g
            sum_gx += g * xhat
            gs += (g,)
            xhats += (xhat,)
            laters += (load_fp32(dlater_ptr + start + cols, inside),)
            new_dws += (dws[i] + dy * xhat,)
            new_dbs += (dbs[i] + dy,)
        dws = new_dws
        dbs = new_dbs
        mean_g = tl.sum(sum_g, 0) / C
        mean_gx = tl.sum(sum_gx, 0) / C

        # Write dr to the residual stream, and through dropout's mask to the branch.
        for i in tl.static_range(N_PIECES):
            cols = i * PIECE + lanes
            inside = cols < C
            dr = rstd * (gs[i] - mean_g - xhats[i] * mean_gx) + laters[i]
            tl.store(dresidual_ptr + start + cols, dr, mask=inside)
            if DROPOUT:
                dr = tl.where(keeps(dropout_key(seed, row), cols, threshold), dr, 0.0) * factor
            tl.store(dx_ptr + start + cols, dr, mask=inside)

    # The program's own sums: partial[program, 0] is its dw, partial[program, 1] its db.
    for i in tl.static_range(N_PIECES):
        cols = i * PIECE + lanes
        tl.store(partial_ptr + 2 * program * C + cols, dws[i], mask=cols < C)
        tl.store(partial_ptr + (2 * program + 1) * C + cols, dbs[i], mask=cols < C)


def norm_launch(C):
    """How a row is cut: no idle lanes where C allows it, 4 elements a thread up to a PIECE of 1024.

    2560 -> 5 pieces of 512, 4 warps; 768 -> 3 of 256, 2 warps; 1000 -> 1 of 1024, 8 warps.
    """
    piece = C & -C  # the largest power of two that divides C: its lowest bit that is set
    if piece < 128 or C // piece > 8:  # too many small pieces: one piece, with idle lanes
        piece = triton.next_power_of_2(C)
    warps = min(max(piece // 128, 1), 8)
    return dict(C=C, PIECE=piece, N_PIECES=triton.cdiv(C, piece), num_warps=warps)


class AddLayerNorm(torch.autograd.Function):
    """The two kernels as one op of autograd."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, p, seed):
        x = x.contiguous()
        residual = residual.contiguous()
        C = x.shape[-1]
        N = x.numel() // C
        y = torch.empty_like(x)
        r = torch.empty_like(residual)  # the new residual
        stats = x.new_empty(2, N, dtype=torch.float32)  # mean and rstd
        ctx.dropout = dropout_arguments(p) | {"seed": seed}
        norm_forward_kernel[(N,)](
            x, residual, weight, bias,
            y, r, *stats,
            eps=eps,
            **ctx.dropout,
            **norm_launch(C))
        ctx.save_for_backward(r, weight, stats)
        return y, r

    @staticmethod
    def backward(ctx, dy, dlater):
        r, weight, stats = ctx.saved_tensors
        dy = dy.contiguous()
        _, N = stats.shape
        C = r.shape[-1]
        dx = torch.empty_like(dy)  # y has x's dtype
        dresidual = torch.empty_like(r)
        per_sm = min(max(6144 // C, 2), 16)  # C = 2560: 2 programs a multiprocessor; 768: 8
        programs = min(N, n_programs(r, per_sm))
        partial = r.new_empty(programs, 2, C, dtype=torch.float32)
        norm_backward_kernel[(programs,)](
            dy, dlater.contiguous(), r, weight, *stats,
            dx, dresidual, partial,
            N,
            **ctx.dropout,
            **norm_launch(C))
        dw, db = partial.sum(0)
        return dx, dresidual, dw, db, None, None, None


def add_layer_norm(x, residual, weight, bias, eps=1e-5, dropout_p=0.0, seed=0):
    """new_residual = residual + dropout(x) in residual's dtype, and y = LayerNorm(new_residual) in
    x's dtype (or autocast's). x, residual (..., C). The mask is a function of seed, below 2^31.
    Returns (y, new_residual)."""
    y, new_residual = run_op(AddLayerNorm, add_layer_norm_ref,
                             x, residual, weight, bias, eps, dropout_p, seed)
    return y.to(compute_dtype(x)), new_residual


# ---------------------------------------------------------------------------------------------
# fused ops: bias + GELU
#
#     u = x + b      y = ½ u (1 + tanh z),  z = √(2/π) (u + 0.044715 u³)
#
# Since ½(1 + tanh z) = sigmoid(2z), call it s, this is y = u · s: one exponential, and safe at both
# ends (exp overflows to inf, and s to 0).
#
# Backward. The product rule gives dy/du = s + u · s', and the sigmoid's derivative is
# s' = s (1 - s) · 2z'. In 2z', 0.134145 is 3 · 0.044715:
#     dx = dy · (s + u · s (1 - s) · 2z'),  2z' = 2√(2/π) (1 + 0.134145 u²)      db = Σ_rows dx
# Backward needs u, not y: so only x and b are kept here, and s is computed again.


def bias_gelu_ref(x, bias):
    u = at_least_fp32(x)
    return F.gelu(u + bias.to(u), approximate="tanh").to(x.dtype)


@jit
def gelu_gate(u):
    """s = sigmoid(2z); 1.5957691216 = 2 √(2/π)."""
    return 1 / (1 + tl.exp(-1.5957691216057308 * u * (1 + 0.044715 * u * u)))


@jit
def gelu_forward_kernel(x_ptr,  # (N, C)
                        b_ptr,  # (C,)
                        y_ptr,  # written, (N, C)
                        C: constexpr,
                        COLS: constexpr):
    """COLS columns of one row. The tiles lie on one grid axis: the others end at 65,535."""
    n_tiles = tl.cdiv(C, COLS)
    cols = tl.program_id(0) % n_tiles * COLS + tl.arange(0, COLS)
    at = (tl.program_id(0) // n_tiles).to(tl.int64) * C + cols
    u = load_fp32(x_ptr + at, cols < C) + load_fp32(b_ptr + cols, cols < C)
    tl.store(y_ptr + at, u * gelu_gate(u), mask=cols < C)


@jit
def gelu_backward_kernel(dy_ptr,  # (N, C)
                         x_ptr,  # (N, C)
                         b_ptr,  # (C,)
                         dx_ptr,  # written, (N, C)
                         partial_ptr,  # written, (programs, C)
                         n_rows,
                         C: constexpr,
                         COLS: constexpr):
    """COLS columns of many rows: their dx, and this program's part of db."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = cols < C
    b = load_fp32(b_ptr + cols, inside)
    db = tl.zeros([COLS], tl.float32)
    program = tl.program_id(1).to(tl.int64)
    for step in range(0, n_rows - program, tl.num_programs(1)):
        at = (program + step) * C + cols
        dy = load_fp32(dy_ptr + at, inside)
        u = load_fp32(x_ptr + at, inside) + b

        # The two terms of the product rule; 0.2140644488 = 2 √(2/π) · 0.134145.
        s = gelu_gate(u)
        dx = dy * (s + u * s * (1 - s) * (1.5957691216057308 + 0.2140644488 * u * u))
        db += dx
        tl.store(dx_ptr + at, dx, mask=inside)
    tl.store(partial_ptr + program * C + cols, db, mask=inside)


GELU_COLS = 1024  # columns of a program


class BiasGelu(torch.autograd.Function):
    """The two kernels as one op of autograd."""

    @staticmethod
    def forward(ctx, x, bias):
        x = x.contiguous()
        y = torch.empty_like(x)
        C = len(bias)
        col_tiles = triton.cdiv(C, GELU_COLS)
        gelu_forward_kernel[(x.numel() // C * col_tiles,)](x, bias, y, C, GELU_COLS)
        ctx.save_for_backward(x, bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        dx = torch.empty_like(x)
        C = len(bias)
        N = x.numel() // C
        col_tiles = triton.cdiv(C, GELU_COLS)

        # The grid: col_tiles x programs. As in LayerNorm each program sums its own rows first.
        programs = min(N, triton.cdiv(n_programs(x, 8), col_tiles))
        partial = x.new_empty(programs, C, dtype=torch.float32)
        gelu_backward_kernel[col_tiles, programs](
            dy.contiguous(), x, bias,
            dx, partial,
            N,
            C, GELU_COLS)
        return dx, partial.sum(0)


def bias_gelu(x, bias):
    """GELU(x + bias), tanh approximation (GPT-2's gelu_new). x (..., C), bias (C,). Returns x's
    dtype, or autocast's."""
    return run_op(BiasGelu, bias_gelu_ref, x.to(compute_dtype(x)), bias)


# ---------------------------------------------------------------------------------------------
# fused ops: causal attention on the packed projection
#
#     S = scale · Q Kᵀ (below the diagonal)     P = softmax(S)     O = dropout(P) V
#
# Forward (FlashAttention). The T x T matrix S never exists. A program owns a tile of BM query rows
# and walks over the tiles of BN keys. For each row it keeps the largest logit so far, m, the sum of
# exp(S - m) so far, and the output so far, not yet divided by that sum. When a tile has a larger
# logit, sum and output are scaled down to the new m. Backward needs one number a row,
# lse = m + log(sum), since P = exp(S - lse). The kernels use powers of 2, which are one
# instruction: scale2 = scale · log2(e) turns logits to base 2, and lse is stored in base 2.
#
# Backward, with dropout's mask M (0 or 1) and factor f = 1/(1 - p). O = f (P∘M) V is a matrix
# product, so
#     dV = f (P∘M)ᵀ dO      dP = f (dO Vᵀ)∘M
# Softmax, row i: a logit S_ij moves P_ij by P_ij, and every P_ik of the row by -P_ik P_ij. So
#     dS_ij = P_ij (dP_ij - δ_i),  δ_i = Σ_k P_ik dP_ik
# δ needs no walk over the keys: Σ_k P_ik dP_ik = Σ_k f (P∘M)_ik (dO_i · V_k) = dO_i · O_i. Last,
#     dQ = scale · dS K      dK = scale · dSᵀ Q
# To save work in a tile, its dP and dS are taken without f, so δ is divided by f first, and the
# finished dQ, dK and dV are multiplied by f.
# dQ is a sum over keys, so a program owns a tile of queries, as in forward. dK and dV are sums over
# queries, so a program owns a tile of keys. That makes two kernels, which both make P again tile by
# tile, and neither needs atomics.
#
# qkv (B, T, 3C) is read in place through its strides, [q | k | v] as HF packs it, and the gradient
# is written in the same layout: no transposed copy. BD is D padded to a power of two.
#
# A tile that lies wholly below the diagonal needs no causal mask. So each loop over tiles stands
# twice in the compiled kernel (static_range unrolls it): with ON_DIAGONAL 0 for those, without the
# mask, and with ON_DIAGONAL 1 for the tiles that the diagonal crosses.


def split_heads(qkv, n_head):
    """(B, T, 3C) -> q, k, v, each a (B, H, T, D) view."""
    return qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attention_ref(qkv, n_head, scale, dropout_p=0.0, seed=0):
    q, k, v = split_heads(qkv, n_head)
    if dropout_p == 0:  # torch's fused op computes what stands below
        O = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)  # noqa: E741
    else:
        S = at_least_fp32(scale * q @ k.transpose(-2, -1))  # (B, H, T, T)
        causal = S.new_full(S.shape[-2:], -torch.inf).triu(1)  # 0 up to the diagonal
        P = dropout_ref((S + causal).softmax(-1), dropout_p, seed)
        O = P.to(v.dtype) @ v  # noqa: E741
    return O.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)


@jit
def load_tile(ptr, rows, stride, T,
              D: constexpr,
              BD: constexpr,
              EVEN: constexpr):
    """Rows of one head, (len(rows), BD), zero outside the tensor; EVEN: nothing lies outside."""
    d = tl.arange(0, BD)
    at = ptr + rows[:, None] * stride + d[None, :]
    if EVEN:
        return tl.load(at)
    else:
        inside = (rows < T)[:, None] & (d < D)[None, :]
        return tl.load(at, mask=inside, other=0.0)


@jit
def store_tile(ptr, tile, rows, stride, T,
               D: constexpr,
               BD: constexpr):
    d = tl.arange(0, BD)
    inside = (rows < T)[:, None] & (d < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + d[None, :], tile, mask=inside)


@jit
def head_offsets(pair, T, C: constexpr, D: constexpr):
    """Where the (batch, head) pair begins in qkv (B, T, 3C), and in an output (B, T, C)."""
    H = C // D
    batch = (pair // H).to(tl.int64)
    head = pair % H * D
    return batch * T * 3 * C + head, batch * T * C + head


@jit
def attention_forward_kernel(qkv_ptr,  # (B, T, 3C)
                             o_ptr,  # written, (B, T, C)
                             lse_ptr,  # written, (B, H, T)
                             T,
                             scale2,  # scale · log2(e)
                             seed,
                             threshold,
                             factor,  # 1 / (1 - p)
                             DROPOUT: constexpr,
                             C: constexpr,
                             D: constexpr,
                             BD: constexpr,
                             BM: constexpr,
                             BN: constexpr,
                             EVEN: constexpr):  # the tiles fit: no mask
    """O and lse of a tile of query rows."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # longest rows first: even load
    pair = tl.program_id(1)  # batch · H + head
    qkv_at, o_at = head_offsets(pair, T, C, D)
    rows = first + tl.arange(0, BM)
    row_at = pair.to(tl.int64) * T + rows  # in (B, H, T)
    dropout_keys = dropout_key(seed, pair * T + rows)

    # Q stays. acc, m and total are each row's output, largest logit and sum, so far.
    q_ptr = qkv_ptr + qkv_at
    q = load_tile(q_ptr, rows, 3 * C, T, D, BD, EVEN)
    acc = tl.zeros([BM, BD], tl.float32)
    m = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    diagonal = first // BN * BN  # key tiles before this lie below the diagonal
    last = tl.minimum(first + BM, T)  # no row of this tile sees a key from here on
    for ON_DIAGONAL in tl.static_range(2):
        if ON_DIAGONAL:
            begin = diagonal
            end = last
        else:
            begin = 0
            end = diagonal
        for start in range(begin, end, BN):
            # Logits of this key tile, in base 2.
            cols = start + tl.arange(0, BN)
            k = load_tile(q_ptr + C, cols, 3 * C, T, D, BD, EVEN)
            s = tl.dot(q, tl.trans(k)) * scale2
            if ON_DIAGONAL:  # not -inf: -inf minus -inf would be NaN
                s = tl.where(cols[None, :] <= rows[:, None], s, -1e30)

            # Where m grows, what was summed so far shrinks by alpha. The sum is P's before dropout.
            m_new = tl.maximum(m, tl.max(s, 1))
            prob = tl.exp2(s - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            total = total * alpha + tl.sum(prob, 1)

            # Add this tile's part of O.
            if DROPOUT:
                prob = tl.where(keeps(dropout_keys[:, None], cols[None, :], threshold), prob, 0.0)
            v = load_tile(q_ptr + 2 * C, cols, 3 * C, T, D, BD, EVEN)
            acc = tl.dot(prob.to(v.dtype), v, acc * alpha[:, None])
            m = m_new

    # Divide by the sum, multiply by dropout's factor: once a row, not in each step.
    tl.store(lse_ptr + row_at, m + tl.log2(total), mask=rows < T)
    store_tile(o_ptr + o_at, acc * (factor / total)[:, None], rows, C, T, D, BD)


@jit
def attention_dq_kernel(qkv_ptr,  # (B, T, 3C)
                        o_ptr,  # (B, T, C)
                        do_ptr,  # (B, T, C)
                        lse_ptr,  # (B, H, T)
                        delta_ptr,  # written, (B, H, T)
                        dropout_keys_ptr,  # written, (B, H, T)
                        dqkv_ptr,  # its first third is written, (B, T, 3C)
                        T,
                        scale,
                        scale2,
                        seed,
                        threshold,
                        factor,
                        DROPOUT: constexpr,
                        C: constexpr,
                        D: constexpr,
                        BD: constexpr,
                        BM: constexpr,
                        BN: constexpr,
                        EVEN: constexpr):
    """δ, dropout keys and dQ of a tile of query rows."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    pair = tl.program_id(1)  # batch · H + head
    qkv_at, o_at = head_offsets(pair, T, C, D)
    rows = first + tl.arange(0, BM)
    row_at = pair.to(tl.int64) * T + rows  # in (B, H, T)
    dropout_keys = dropout_key(seed, pair * T + rows)

    # δ from O and dO, without f. δ and dropout keys are stored for the kernel that runs next.
    do = load_tile(do_ptr + o_at, rows, C, T, D, BD, EVEN)
    o = load_tile(o_ptr + o_at, rows, C, T, D, BD, EVEN)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1) / factor
    tl.store(delta_ptr + row_at, delta, mask=rows < T)
    tl.store(dropout_keys_ptr + row_at, dropout_keys, mask=rows < T)

    # Walk over the key tiles as forward does.
    q_ptr = qkv_ptr + qkv_at
    q = load_tile(q_ptr, rows, 3 * C, T, D, BD, EVEN)
    lse = load_fp32(lse_ptr + row_at, rows < T)
    dq = tl.zeros([BM, BD], tl.float32)
    diagonal = first // BN * BN  # key tiles before this lie below the diagonal
    last = tl.minimum(first + BM, T)  # no row of this tile sees a key from here on
    for ON_DIAGONAL in tl.static_range(2):
        if ON_DIAGONAL:
            begin = diagonal
            end = last
        else:
            begin = 0
            end = diagonal
        for start in range(begin, end, BN):
            cols = start + tl.arange(0, BN)
            k = load_tile(q_ptr + C, cols, 3 * C, T, D, BD, EVEN)
            v = load_tile(q_ptr + 2 * C, cols, 3 * C, T, D, BD, EVEN)

            # P again: exp(S - lse) is already divided by the row's sum.
            s = tl.dot(q, tl.trans(k)) * scale2
            prob = tl.exp2(s - lse[:, None])
            if ON_DIAGONAL:
                prob = tl.where(cols[None, :] <= rows[:, None], prob, 0.0)

            # dP with dropout's mask; dS by the softmax's rule; dQ's part from this tile's keys.
            dp = tl.dot(do, tl.trans(v))
            if DROPOUT:
                dp = tl.where(keeps(dropout_keys[:, None], cols[None, :], threshold), dp, 0.0)
            ds = prob * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq)
    store_tile(dqkv_ptr + qkv_at, dq * (scale * factor), rows, 3 * C, T, D, BD)


@jit
def attention_dkv_kernel(qkv_ptr,  # (B, T, 3C)
                         do_ptr,  # (B, T, C)
                         lse_ptr,  # (B, H, T)
                         delta_ptr,  # (B, H, T)
                         dropout_keys_ptr,  # (B, H, T)
                         dqkv_ptr,  # its other two thirds are written
                         T,
                         scale,
                         scale2,
                         threshold,
                         factor,
                         DROPOUT: constexpr,
                         C: constexpr,
                         D: constexpr,
                         BD: constexpr,
                         BM: constexpr,
                         BN: constexpr,
                         EVEN: constexpr):
    """dK and dV of a tile of keys, from the query tiles at and below the diagonal.

    All is transposed: s, prob and ds are (keys, queries), as the products for dK and dV take them.
    """
    first = tl.program_id(0) * BN  # the first key tile has the most rows
    pair = tl.program_id(1)  # batch · H + head
    qkv_at, o_at = head_offsets(pair, T, C, D)
    q_ptr = qkv_ptr + qkv_at
    cols = first + tl.arange(0, BN)
    k = load_tile(q_ptr + C, cols, 3 * C, T, D, BD, EVEN)
    v = load_tile(q_ptr + 2 * C, cols, 3 * C, T, D, BD, EVEN)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)

    # Query tiles from `below` on see all these keys; those before it need the causal mask.
    below = tl.minimum(tl.cdiv(first + BN, BM) * BM, T)
    for ON_DIAGONAL in tl.static_range(2):
        if ON_DIAGONAL:
            begin = first // BM * BM
            end = below
        else:
            begin = below
            end = T
        for start in range(begin, end, BM):
            rows = start + tl.arange(0, BM)
            row_at = pair.to(tl.int64) * T + rows  # in (B, H, T)

            # P again.
            q = load_tile(q_ptr, rows, 3 * C, T, D, BD, EVEN)
            lse = load_fp32(lse_ptr + row_at, rows < T)
            s = tl.dot(k, tl.trans(q)) * scale2
            prob = tl.exp2(s - lse[None, :])
            if ON_DIAGONAL:
                prob = tl.where(cols[:, None] <= rows[None, :], prob, 0.0)

            # dV takes P as forward multiplied it with V, after dropout. The softmax's rule takes it
            # before dropout.
            do = load_tile(do_ptr + o_at, rows, C, T, D, BD, EVEN)
            delta = load_fp32(delta_ptr + row_at, rows < T)
            dp = tl.dot(v, tl.trans(do))
            dropped = prob
            if DROPOUT:
                dropout_keys = tl.load(dropout_keys_ptr + row_at, mask=rows < T, other=0)
                dropout_keys = dropout_keys.to(tl.uint32)
                kept = keeps(dropout_keys[None, :], cols[:, None], threshold)
                dropped = tl.where(kept, prob, 0.0)
                dp = tl.where(kept, dp, 0.0)
            dv = tl.dot(dropped.to(do.dtype), do, dv)
            ds = prob * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk)
    dq_ptr = dqkv_ptr + qkv_at
    store_tile(dq_ptr + C, dk * (scale * factor), cols, 3 * C, T, D, BD)
    store_tile(dq_ptr + 2 * C, dv * factor, cols, 3 * C, T, D, BD)


LOG2_E = 1.4426950408889634


def attention_tile(kernel, dtype, BD, has_dropout):
    """(BM, BN, num_warps, num_stages): the fastest on an H100; autotuning would cost minutes.

    Elsewhere nobody has measured. There each tile fits the smallest shared memory, 99 KB.
    """
    if dtype == torch.float32 or BD > 128:
        rows = min(32, 16384 // (BD * dtype.itemsize))  # the wider a row, the fewer fit
        return rows, rows, 4, 1
    forward = kernel is attention_forward_kernel
    if gpu() != "sm_90":
        return (128, 64, 8, 2) if forward else (64, 32, 4, 1)
    if kernel is attention_dkv_kernel and has_dropout:
        return 32, 64, 4, 2  # at 64 rows the dropout mask's registers would spill
    return 64, 64, 4, 3 if forward else 2


def launch_attention(kernel, qkv, *tensors, n_head, **scalars):
    """Run one attention kernel over all its tiles."""
    B, T, C3 = qkv.shape
    C = C3 // 3
    D = C // n_head
    BD = max(triton.next_power_of_2(D), 16)  # tl.dot takes no less
    BM, BN, warps, stages = attention_tile(kernel, qkv.dtype, BD, scalars["DROPOUT"])
    even = T % BM == 0 and T % BN == 0 and BD == D
    owned = BN if kernel is attention_dkv_kernel else BM  # rows of one program
    kernel[triton.cdiv(T, owned), B * n_head](
        qkv, *tensors,
        T,
        **scalars,
        C=C, D=D, BD=BD,
        BM=BM, BN=BN, EVEN=even,
        num_warps=warps,
        num_stages=stages,
        default_dot_input_precision="ieee")  # fp32 products in fp32, not rounded to tf32


class Attention(torch.autograd.Function):
    """The three kernels as one op of autograd."""

    @staticmethod
    def forward(ctx, qkv, n_head, scale, p, seed):
        qkv = qkv.contiguous()
        B, T, C3 = qkv.shape
        o = qkv.new_empty(B, T, C3 // 3)
        lse = qkv.new_empty(B, n_head, T, dtype=torch.float32)
        ctx.scale = scale
        ctx.seed = seed
        ctx.same = dict(n_head=n_head, scale2=scale * LOG2_E, **dropout_arguments(p))
        launch_attention(attention_forward_kernel, qkv, o, lse, seed=seed, **ctx.same)
        ctx.save_for_backward(qkv, o, lse)
        return o

    @staticmethod
    def backward(ctx, do):
        qkv, o, lse = ctx.saved_tensors
        same = dict(scale=ctx.scale, **ctx.same)
        do = do.contiguous()
        dqkv = torch.empty_like(qkv)
        delta = torch.empty_like(lse)
        dropout_keys = torch.empty_like(lse, dtype=torch.int32)
        # The first writes delta, the keys and dqkv's first third. The second reads delta and keys.
        launch_attention(attention_dq_kernel, qkv, o, do, lse, delta, dropout_keys,
                         dqkv, seed=ctx.seed, **same)
        launch_attention(attention_dkv_kernel, qkv, do, lse, delta, dropout_keys, dqkv, **same)
        return dqkv, None, None, None, None


@torch.compiler.disable  # each block has another scale, and would be compiled anew for it
def attention(qkv, n_head, scale, dropout_p=0.0, seed=0):
    """Causal self-attention. qkv (B, T, 3C) packed [q | k | v]; scale multiplies q·k (it holds
    1/sqrt(D) and BioMedLM's 1/(layer_idx + 1)). Returns (B, T, C) in qkv's dtype, or autocast's."""
    qkv = qkv.to(compute_dtype(qkv))
    return run_op(Attention, attention_ref, qkv, n_head, scale, dropout_p, seed)


# ---------------------------------------------------------------------------------------------
# linear layers, whose weight gradient adds up in place in training
#
#     y = x Wᵀ + b      dx = dy W      dW = dyᵀ x      db = Σ_rows dy
#
# A step's gradient is the sum over its micro-batches. Autograd writes each dW in bf16, casts it to
# fp32 and adds it to W.grad: 20 bytes a weight, 13 of BioMedLM's 267 ms a micro-batch on an H100.
# Here the product adds to W.grad itself. It is more exact, too: dW is never rounded to bf16.
#
# Backward takes the sum out of W.grad and returns it, larger by dW, as W's gradient. Autograd finds
# W.grad empty and puts it back there, at the same address. So the hooks of DDP and FSDP see what
# they always see. But torch.autograd.grad would return the whole sum: only train.py turns this on.


class Linear(nn.Linear):
    """nn.Linear, y = x Wᵀ + b, whose weight gradient can add up in place."""

    accumulates = False  # train.py: True on a GPU in bf16, else autograd's own way is as fast
    working = None  # train.py: the weight in the dtype of the products, made once a step

    def forward(self, x, with_bias=True):
        """Without the bias x Wᵀ alone: the fused op that follows adds the bias."""
        bias = self.bias if with_bias else None
        if self.accumulates and self.training:
            return apply(AccumulatingLinear, x, self.weight, bias, self.working)
        return F.linear(x, self.weight, bias)


def add_product(total, a, b):
    """Add the product a b to `total` (fp32) in place; with None return a b as a new tensor.

    bf16 operands take the tensor cores.
    """
    if a.is_cuda and a.dtype != torch.float32:
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    product = at_least_fp32(a @ b)
    return product if total is None else total.add_(product)


class AccumulatingLinear(torch.autograd.Function):
    """y = x Wᵀ + b, x (..., in), weight (out, in) fp32; dW is added to weight.grad in fp32.

    working: the weight in x's dtype, or None: it is cast here.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, working):
        if working is None:
            working = weight.to(x.dtype)
        ctx.weight = weight  # the parameter itself: backward needs its .grad
        ctx.save_for_backward(x, working)
        return F.linear(x, working, None if bias is None else bias.to(working.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, working = ctx.saved_tensors
        dx = dy @ working
        dy = dy.flatten(0, -2)  # (..., out) -> (N, out)
        total = ctx.weight.grad
        ctx.weight.grad = None
        total = add_product(total, dy.t(), x.flatten(0, -2))  # (out, N) x (N, in)
        db = dy.sum(0, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        # Autograd keeps a tensor that nobody else holds, and clones any other. DDP's bucket holds
        # `total`: detach makes a new tensor over the same memory.
        return dx, total.detach(), db, None


# ---------------------------------------------------------------------------------------------
# fused ops: cross-entropy with the head's matrix product
#
#     Z = hidden Wᵀ      loss = mean over targets that count of  log Σ_v exp(Z_v) - Z_target
#     dZ = (softmax(Z) - onehot(target)) / count      dhidden = dZ W      dW = dZᵀ hidden
#
# Backward, for one row: the derivative of log Σ exp(Z_v) by Z_v is softmax(Z)_v, and -Z_target adds
# -1 at the target. Dividing by count makes it the mean's. The rest is a matrix product's backward.
#
# For N = 16k rows Z is 0.9 GB in bf16, and would be written, read and written again as dZ. Here
# rows go in chunks, and one chunk of logits is all that ever exists. A product makes the chunk's Z,
# the kernel takes the loss and writes dZ over Z, and two products use dZ up at once. So the
# gradients are made in forward already, for a loss gradient of 1; backward multiplies by the real
# one, which nobody knows before. That reads and writes dW once more: by arithmetic 0.2 ms on an
# H100. To make the logits again in backward would be 1.7 ms. Where nobody wants gradients there is
# nothing to gain, and the reference runs.


CROSS_ENTROPY_CHUNK = 8192  # rows: a micro-batch of 8 x 1024 in one


def cross_entropy_ref(hidden, weight, targets, ignore_index=-100):
    def summed_loss(x, y):
        logits = at_least_fp32(F.linear(x, weight.to(x.dtype)))  # (chunk, V)
        return F.cross_entropy(logits, y, ignore_index=ignore_index, reduction="sum")

    *others, last = zip(hidden.split(CROSS_ENTROPY_CHUNK), targets.split(CROSS_ENTROPY_CHUNK))
    total = summed_loss(*last)
    for chunk in others:  # their logits are made again in backward, one chunk at a time
        total = total + checkpoint(summed_loss, *chunk, use_reentrant=False)
    return total / (targets != ignore_index).sum().clamp(min=1)


@jit
def cross_entropy_kernel(z_ptr,  # logits (N, V); overwritten with their gradient
                         target_ptr,  # (N,)
                         loss_ptr,  # written, (N,)
                         count_ptr,  # one number: the targets that count
                         ignore_index,
                         V: constexpr,
                         BLOCK: constexpr):
    """One row of logits: its loss and, in place, its gradient."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * V passes 2^31 at 74k rows
    target = tl.load(target_ptr + row)
    z_ptr += row * V

    # Softmax's maximum and sum in one walk over the row. Each lane keeps its own pair; where its
    # maximum grows, its sum shrinks to match. The lanes' pairs are merged at the end.
    top = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = load_fp32(z_ptr + cols, cols < V, -1e30)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
    peak = tl.max(top, 0)
    total = tl.sum(total * tl.exp(top - peak), 0)

    # The loss; 0 where the target is ignored.
    counts = target != ignore_index
    z_target = load_fp32(z_ptr + target, counts)
    loss = tl.where(counts, peak - z_target + tl.log(total), 0.0)
    tl.store(loss_ptr + row, loss)

    # Warps run apart: every one must have read z_target before any overwrites it.
    tl.debug_barrier()

    # A second walk over the row. It reads from the cache what the first walk has read.
    factor = tl.where(counts, 1.0 / tl.load(count_ptr).to(tl.float32), 0.0)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = load_fp32(z_ptr + cols, cols < V, -1e30)
        softmax = tl.exp(z - peak) / total  # not exp(z - lse): at 1e4, lse has 3 decimals
        dz = (softmax - tl.where(cols == target, 1.0, 0.0)) * factor
        tl.store(z_ptr + cols, dz, mask=cols < V)


CROSS_ENTROPY_BLOCK = 8192  # columns at a time


class CrossEntropy(torch.autograd.Function):
    """The kernel and its matrix products as one op of autograd."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index):
        w = weight.to(hidden.dtype)
        targets = targets.contiguous()
        count = (targets != ignore_index).sum().clamp(min=1)  # stays on the device: no wait
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        dhidden = torch.empty_like(hidden)
        dweight = None
        for start in range(0, len(hidden), CROSS_ENTROPY_CHUNK):
            rows = slice(start, start + CROSS_ENTROPY_CHUNK)
            z = hidden[rows] @ w.T  # (chunk, C) x (C, V) -> (chunk, V)
            cross_entropy_kernel[(len(z),)](
                z, targets[rows], losses[rows], count,
                ignore_index,
                len(weight), CROSS_ENTROPY_BLOCK,
                num_warps=16)
            # z is dZ now
            torch.mm(z, w, out=dhidden[rows])
            dweight = add_product(dweight, z.T, hidden[rows])  # (V, chunk) x (chunk, C) -> (V, C)
        ctx.save_for_backward(dhidden, dweight)
        return losses.sum() / count

    @staticmethod
    def backward(ctx, dloss):
        dhidden, dweight = ctx.saved_tensors  # made for a loss gradient of 1
        return dhidden.mul_(dloss), dweight.mul_(dloss), None, None


def cross_entropy(hidden, weight, targets, ignore_index=-100):
    """Mean cross-entropy of softmax(hidden weightᵀ) over the targets that are not ignore_index.

    hidden (N, C), weight (V, C), targets (N,) int64 below V. Returns an fp32 scalar. With every
    target ignored it is 0 with zero gradients (torch's is NaN). No host synchronisation."""
    hidden = hidden.to(compute_dtype(hidden))
    if not torch.is_grad_enabled():
        return cross_entropy_ref(hidden, weight, targets, ignore_index)
    return run_op(CrossEntropy, cross_entropy_ref, hidden, weight, targets, ignore_index)


if __name__ == "__main__":
    from tokenizer import run_command

    run_command(main)
