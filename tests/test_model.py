"""model.py without its kernels: GPT-2's shape, numbers, generation and folders."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import GPT, GPTConfig, KVCache, config_of, load_tensors, newest_checkpoint, sample
from tokenizer import Tokenizer

FIXTURE = json.loads((Path(__file__).parent / "fixtures/hf_gpt2.json").read_text())
LN = "transformer.ln_f.bias"
TINY = GPTConfig(n_layer=3, n_head=2, n_embd=16, n_positions=32, vocab_size=61, dropout=0.0)


def waves(config):
    """A model with parameters from a formula: a fixture of numbers needs no weights beside it."""
    model = GPT(GPTConfig.from_hf(config)).eval()
    for i, (_, p) in enumerate(sorted(model.named_parameters())):
        wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) ** 2 * 0.37 + i)
        p.data.copy_((0.8 * wave).view(p.shape))
    return model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(replace(TINY)).eval()


@pytest.fixture
def idx():
    """32 tokens: the whole context."""
    return torch.randint(61, (2, 32), generator=torch.Generator().manual_seed(1))


def test_parameter_count():
    """A missing bias, an untied head or another width would change the published count."""
    for preset, count in ("biomedlm", 2_594_247_680), ("gpt2-124m", 124_439_808):
        assert model_module.without_memory(GPTConfig.preset(preset)).n_params() == count


@pytest.mark.parametrize("case", FIXTURE["models"])
def test_logits_and_gradients_equal_hugging_face(case):
    """A scale, constant, GELU, layout or transposition other than the released model's, or a
    gradient that is cut."""
    model, idx = waves(case["config"]), torch.tensor(FIXTURE["idx"])
    torch.testing.assert_close(model(idx)[0], torch.tensor(case["logits"]), atol=1e-5, rtol=1e-5)
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(case["gradient_norms"], rel=1e-4)


def test_dropout_is_where_it_should_be(idx, monkeypatch):
    """A branch, the embeddings or a masked attention left out, masks alike, dropout in eval; a
    block recomputed with other masks: gradients of a function never evaluated."""
    drawn = []  # (rate, seed or None) of all that drops; what is dropped stays
    attend = F.scaled_dot_product_attention

    def attends(*qkv, dropout_p=0.0, **options):
        drawn.append((dropout_p, None))
        return attend(*qkv, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attends)
    monkeypatch.setattr(F, "dropout", lambda x, p: drawn.append((p, None)) or x)
    monkeypatch.setattr(model_module, "dropout_ref",
                        lambda x, p, seed: drawn.append((p, seed)) or x)
    model = GPT(replace(TINY, dropout=0.2))
    model.activation_checkpointing = True
    loss = model(idx, idx)[1]
    # the embeddings, three layers' attention and two branches; no two with the same mask
    assert len(drawn) == len(set(drawn)) == 1 + 3 * 3 and {p for p, _ in drawn} == {0.2}
    loss.backward()
    assert len(drawn) > len(set(drawn)) == 10
    drawn.clear()
    model.hidden(idx, mask=torch.ones(32, 32).tril().bool())
    assert [p for p, _ in drawn] == [0.2] * 10
    drawn.clear()
    model.eval()(idx)
    assert {p for p, _ in drawn} == {0.0}


def test_beams_equal_hugging_face():
    """A beam search that scores, bans n-grams or ends otherwise than the paper's decoding."""
    model = waves(FIXTURE["models"][0]["config"])
    prompts = torch.tensor(FIXTURE["idx"])[:, :4]
    for case in FIXTURE["beams"]:
        assert model.generate(prompts, 12, **case["settings"]).tolist() == case["tokens"]


def test_rows_of_a_batch_are_those_of_each_alone(model):
    """A row that another changes, that goes on when its text is over, or repeats what it may not.
    """
    for p in model.parameters():
        p.data.mul_(8 if p.dim() == 2 else 1)  # at the initialisation no token is likely
    batch = torch.randint(61, (5, 9))
    greedy = {"temperature": 0, "no_repeat_ngram_size": 1}
    for end in (6, 41):  # rows end in them at unlike times, or never
        together = model.generate(batch, 12, eot_id=end, **greedy)
        for row, prompt in zip(together, batch):
            [alone] = model.generate(prompt[None], 12, eot_id=end, **greedy).tolist()
            assert row.tolist() == alone + [end] * (21 - len(alone))
            assert len({*alone[9:]} - {*alone[:9]}) == len(alone) - 9


def test_cache_equals_full_forward(model, idx):
    """Positions, mask or layers of the KV cache mixed up, and its end not noticed; cuDNN's
    attention, which is slow at each new length."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    cache = KVCache()
    parts = [model.hidden(piece, cache) for piece in idx.split([5, 26, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(idx))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(ValueError, match="context of 32"):
        model.hidden(idx[:, :1], cache)


def test_init_statistics():
    """A layer left at torch's own initialisation, or residual projections not scaled down."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=256, n_positions=64, vocab_size=997,
                          initializer_range=0.01))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            # 8 layers are 16 branches; 4 is the root of 16
            expected = 0.01 / 4 if name.endswith("c_proj.weight") else 0.01
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
        else:  # LayerNorm's weights are 1, the biases 0
            assert (p == name.endswith("weight")).all(), name


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_save_and_load(model, idx, tmp_path, weights, monkeypatch):
    """A folder that loses a tensor, the configuration, or the tie between wte and the head; a cut
    file that passes or ends in a traceback."""
    if weights == "pytorch_model.bin":
        monkeypatch.setattr(model_module, "load_file", None)
    else:
        pytest.importorskip("safetensors")
    model.config.dropout = 0.2
    model.save_pretrained(tmp_path)
    files = list(tmp_path.iterdir())
    assert {path.name for path in files} == {"config.json", "tokenizer_config.json", weights}
    assert {path.stat().st_mode & 0o044 for path in files} == {0o044}  # umask's 022
    square = "transformer.h.0.attn.c_proj.weight"  # Hugging Face's are [in, out]
    assert torch.equal(load_tensors(tmp_path / weights)[square], model.state_dict()[square].t())
    file = tmp_path / weights
    file = file.rename(file.with_stem(f"{file.stem}-00001-of-00001"))  # as of a sharded model
    if weights == "pytorch_model.bin":  # the other kind, which can't be read, stands beside it
        (tmp_path / "model.safetensors").touch()
    again = GPT.from_pretrained(tmp_path, dropout=0.0)
    assert again.config == TINY and not again.training
    assert torch.equal(again(idx)[0], model(idx)[0])
    half = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.config.dropout == 0.2
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    for damaged in file.read_bytes()[:-5], b"":
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            GPT.from_pretrained(tmp_path)


def test_loads_what_old_versions_saved(model, idx, tmp_path):
    """The released file's mask buffers and a head saved beside wte, or a bare prefix, refused; NaN
    without a word."""
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    state = model_module.transposed(model.state_dict())
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    torch.save({name: bare.pop(name) for name in list(bare)[::2]}, tmp_path / "pytorch_model.bin")
    torch.save(bare, tmp_path / "pytorch_model-00002-of-00002.bin")
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], model(idx)[0])
    torch.save({**state, LN: torch.full((16,), 6e4).half()}, tmp_path / "pytorch_model.bin")
    GPT.from_pretrained(tmp_path)  # large, but finite: its sum is not in fp16
    torch.save({**state, LN: state[LN] / 0}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=LN):
        GPT.from_pretrained(tmp_path)


def test_folders_of_others(tmp_path):
    """Defaults other than Hugging Face's; an end beyond the vocabulary; another architecture read
    as a GPT-2, or refused without the mend."""
    hf = TINY.to_hf()
    assert GPTConfig.from_hf({**hf, "eos_token_id": 50256}).eot_id == 60
    assert GPTConfig.from_hf({"vocab_size": 50304}).eot_id == 50256  # padded
    config = replace(TINY, dropout=0.2)
    assert GPTConfig.from_hf(config.to_hf() | {"n_inner": 64}) == config
    assert GPTConfig.from_hf({}) == GPTConfig.preset("gpt2-124m")
    assert [name for name in model_module.PRESETS
            if not GPTConfig.preset(name).scale_attn_by_inverse_layer_idx] == ["gpt2-124m"]
    for name, value, mend in (("tie_word_embeddings", False, "is False.*use a GPT-2 folder"),
                              ("quantization_config", {}, "quantized.*dequantize")):
        (tmp_path / "config.json").write_text(json.dumps({**hf, name: value}))
        with pytest.raises(ValueError, match=f"config.json: .*{mend}"):
            config_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: "):
        config_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download stanford-crfm/BioMedLM"):
        config_of("gpt2")


def test_damaged_checkpoints(model, tmp_path, capsys):
    """A spoiled checkpoint loaded without a word or with a traceback, or one that keeps the good
    one from use."""
    def saved(contents):
        file = io.BytesIO()
        torch.save(contents, file)
        return file.getvalue()

    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    good, bad = tmp_path / "checkpoint_0000001.pt", tmp_path / "checkpoint_0000002.pt"
    weights = model.state_dict()
    contents = {"model": weights, "optimizer": {}, "step": 2}  # what train.py saves
    good.write_bytes(saved({**contents, "step": 1}))
    whole = saved(contents)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    others = (Path("code"),
              {"model": weights, "optimizer": {}},
              {"model": weights, "step": 2},
              {**contents, "model": {}},
              {**contents, "model": {**weights, LN: torch.zeros(17)}},
              {**contents, "model": {**weights, LN: torch.zeros(16) / 0}})
    for damaged in b"", whole[:-5], flipped, *map(saved, others):
        bad.write_bytes(damaged)
        assert newest_checkpoint(tmp_path)["step"] == 1
        warning = capsys.readouterr().err
        assert warning.startswith(f"warning: skipping {bad}") and warning.count("\n") == 1
    good.unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        GPT.from_pretrained(tmp_path)
    bad.unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        GPT.from_pretrained(tmp_path)


def test_generate(model, idx):
    """Sampling that ignores its seed, a top_k that cuts nothing, an end that nobody asked for, a
    limit that isn't told."""
    prompt = idx[:, :4]
    a, b, other = (model.generate(prompt, 8, seed=seed) for seed in (0, 0, 4))
    assert torch.equal(a, b) and not torch.equal(a, other) and torch.equal(a[:, :4], prompt)
    greedy = model.generate(prompt, 8, temperature=0)
    model.config.eot_id = greedy[0, 5].item()  # ends nothing, unless eot_id says so
    assert torch.equal(greedy, model.generate(prompt, 8, top_k=1))
    for start, n, mend in (0, 29, "context of 32"), (0, 0, "1 or more"), (4, 4, "1 or more"):
        with pytest.raises(ValueError, match=mend):
            model.generate(prompt[:, start:], n)


def test_sampled_shares():
    """A temperature or top_k that changes nothing, or cuts one token too many."""
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    for top_k, kept in (9, [0, 1, 2, 3]), (3, [1, 2, 3]):
        want = torch.zeros(4)
        want[kept] = (logits[kept] / 2).softmax(0)
        drawn = sample(logits.repeat(20_000, 1), temperature=2, top_k=top_k)
        assert torch.allclose(drawn.flatten().bincount(minlength=4) / 20_000, want, atol=0.015)


def test_export_command(idx, tmp_path, monkeypatch):
    """A run exported without its tokenizer."""
    model = GPT(replace(TINY, vocab_size=259)).eval()
    out = tmp_path / "out"
    torch.save({"model": model.state_dict(), "optimizer": {}, "step": 1},
               tmp_path / "checkpoint_0000001.pt")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_hf()))
    Tokenizer.from_merges([]).save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 257, "<|ANSWER|>": 258}')
    monkeypatch.setattr(sys, "argv", ["", "export", "--init", str(tmp_path), "--out", str(out)])
    model_module.main()
    assert {"added_tokens.json", "merges.txt", "vocab.json"} < {p.name for p in out.iterdir()}
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written["pad_token"] == "[PAD]" and written["model_max_length"] == 32
    assert written["additional_special_tokens"] == ["[PAD]", "<|ANSWER|>"]
    assert torch.equal(GPT.from_pretrained(out)(idx)[0], model(idx)[0])
