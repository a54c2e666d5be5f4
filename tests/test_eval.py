"""eval.py: perplexity, likelihoods, batched generation, the audits."""

import json
import math
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from conftest import run
from test_finetune import TEXT, questions, small_gpt, small_tokenizer, write_medqa

import eval as evaluate
from finetune import Env

CPU = Env("cpu")


@pytest.fixture
def parts():
    return small_gpt(300, n_positions=48).eval(), small_tokenizer()


def naive_nats(gpt, ids):
    """Summed loss of ids[1:] given all before, by plain logits."""
    with torch.no_grad():
        logits = gpt(torch.tensor([ids[:-1]]))[0][0]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()


def test_every_token_of_a_text_is_scored_once(parts):
    """Catches a first token or a window's edge that is skipped or counted twice."""
    gpt, tokenizer = parts
    texts = ["A patient", TEXT, "é 漢字"]
    for text, (nats, n_tokens) in zip(texts, evaluate.score_text(gpt, texts, tokenizer, CPU)):
        ids = tokenizer.encode(text)
        stream = [tokenizer.eot_id, *ids]
        assert n_tokens == len(ids)
        expected = sum(naive_nats(gpt, stream[at:at + 49]) for at in range(0, len(ids), 48))
        assert nats == pytest.approx(expected, rel=1e-5)
    assert len(tokenizer.encode(TEXT)) > 48  # several windows


def test_perplexity_of_a_uniform_model(tmp_path):
    """Catches nats taken for bits, tokens for bytes: a uniform model costs ln V a token."""
    gpt, tokenizer = small_gpt(300, n_positions=48), small_tokenizer()
    for p in gpt.parameters():
        torch.nn.init.zeros_(p)
    gpt.save_pretrained(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    (tmp_path / "a.txt").write_text(TEXT + "é")
    result = run("eval.py", "perplexity", "--init", tmp_path / "m", "--data", tmp_path / "a.txt",
                 "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stderr
    row = json.loads((tmp_path / "r.json").read_text())
    assert row["loss"] == pytest.approx(math.log(300), rel=1e-6)
    assert row["bytes"] == len(TEXT) + 2 and row["tokens"] == len(tokenizer.encode(TEXT + "é"))
    assert row["bits_per_byte"] == pytest.approx(math.log2(300) * row["tokens"] / row["bytes"])


def test_likelihood_of_options_equals_plain_logits(parts):
    """Catches an option scored from the wrong position, or in sight of another option."""
    gpt, tokenizer = parts
    examples, scores = evaluate.zero_shot(gpt, tokenizer, questions(), CPU)
    for e, sums, by_token in zip(examples, scores["sum"], scores["per token"]):
        prefix, options = e.rows[0]
        for ids, got, mean in zip(options, sums, by_token, strict=True):
            expected = naive_nats(gpt, prefix) - naive_nats(gpt, prefix + ids)
            assert got == pytest.approx(expected, abs=2e-4)
            assert mean == pytest.approx(got / len(ids))


@pytest.mark.parametrize("how", [dict(temperature=0.0), dict(num_beams=3, no_repeat_ngram_size=2),
                                 dict(temperature=0.0, no_repeat_ngram_size=1)])
def test_ragged_prompts_in_one_batch_equal_each_alone(parts, how):
    """Catches padding that is attended to, counted as a position, or taken for repeated text."""
    gpt, tokenizer = parts
    prompts = [tokenizer.encode(t) for t in ("the trial of insulin in rats", "A", "Which drug")]
    together = evaluate.continue_texts(gpt, tokenizer, prompts, CPU, 12, **how)
    for prompt, ids in zip(prompts, together):
        assert ids == evaluate.continue_texts(gpt, tokenizer, [prompt], CPU, 12, **how)[0]


def test_bf16_on_a_cpu_reads_the_same_weights(tmp_path, parts):
    """Catches a matrix transposed on the mapped path that fp32 loading doesn't take."""
    from model import GPT
    parts[0].save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    plain = GPT.from_pretrained(tmp_path).to(torch.bfloat16)
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(a, b), name
    idx = torch.arange(20)[None]
    torch.testing.assert_close(ours(idx)[0], plain(idx)[0], atol=0.15, rtol=0.05)


def test_numbers_and_their_verdicts():
    """Catches units lost at a plural, 1,500 read as two numbers, the 6 of IL-6."""
    found = evaluate.numbers_in("1,500 mg for 2 years, 5.5% of IL-6 in 10 patients; p53, 20mcg.")
    assert found == [(1500, "mg"), (2, "year"), (5.5, "%"), (10, "patient"), (20, "µg")]
    known = evaluate.numbers_in("1500 mg for 3 years in 40 rats")
    for number, expected in (((1500, "mg"), "supported"), ((2, "year"), "contradicted"),
                             ((40, ""), "supported"), ((7, "kg"), "unsupported")):
        assert evaluate.verdict(number, known) == expected


def test_perturbed_text_differs_in_one_number():
    """Catches a "perturbed" text equal to the true one, whose comparison would count as a loss."""
    for seed in range(30):
        text = "In 2018, 7 of 40 patients took 250 mg."
        other = evaluate.perturb(text, seed)
        changed = [(a, b) for a, b in zip(text.split(), other.split(), strict=True) if a != b]
        assert len(changed) == 1 and len(other) == len(text)
    assert evaluate.perturb("no number: p53, 1.5", 0) is None


def test_curves_and_mistakes(tmp_path, monkeypatch, parts):
    """Catches validation rows taken for training rows, and tracebacks for a user's mistakes."""
    rows = [dict(step=s, tokens=s * 10, loss=5.0 - s / 10) for s in range(10)]
    rows.append(dict(step=9, val_loss=4.5))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        evaluate.main()

    command = ("curves", tmp_path, "--out", tmp_path / "c.png", "--json", tmp_path / "c.json")
    if find_spec("matplotlib"):  # an optional package
        call(*command)
        assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"
        last = json.loads((tmp_path / "c.json").read_text())["last"]
        assert last == {str(tmp_path): 4.1, f"{tmp_path}, validation": 4.5}
    else:
        with pytest.raises(ValueError, match="pip install matplotlib"):
            call(*command)
    write_medqa(tmp_path / "qa")
    parts[0].save_pretrained(tmp_path / "m")
    parts[1].save(tmp_path / "m")
    for args, needs in ((["curves", tmp_path / "qa"], "log.jsonl"),
                        (["qa", "--task", "medqa", "--data", tmp_path / "qa", "--init",
                          tmp_path / "m"], "--zero_shot"),
                        (["generate", "--init", tmp_path / "m", "--prompt", TEXT], "context")):
        with pytest.raises((ValueError, OSError), match=needs):
            call(*args)
