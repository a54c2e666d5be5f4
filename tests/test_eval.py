"""eval.py: sums of losses, likelihoods, batched generation, the audit's verdicts, tables."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_finetune import TEXT, questions, small_gpt, small_tokenizer, write_medqa

import eval as evaluate
from data import Question, load_qa, tokenize
from finetune import Example, write_lines
from model import GPT
from tokenizer import Tokenizer
from train import start_process

CPU = start_process("cpu")
DOCUMENTS = ["A patient", TEXT, "é 漢字 µg", TEXT[:90] + "naïve"] * 3


@pytest.fixture
def parts():
    return small_gpt(300, n_positions=48).eval(), small_tokenizer()


@pytest.fixture
def folder(tmp_path, parts):
    """A folder with a model, its tokenizer, and text whose bytes are more than its characters."""
    parts[0].save_pretrained(tmp_path / "m")
    parts[1].save(tmp_path / "m")
    rows = [dict(id=f"{i}", text=text) for i, text in enumerate(DOCUMENTS)]
    write_lines(tmp_path / "a.jsonl", rows)
    return tmp_path


@pytest.fixture
def call(folder, monkeypatch):
    """Run a command in this process; returns what --json holds."""
    def run(*args):
        out = folder / "result.json"
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args), "--json", str(out)])
        evaluate.main()
        return json.loads(out.read_text())
    return run


def naive_nats(gpt, ids):
    """Summed loss of ids[1:] given all before, by plain logits."""
    with torch.no_grad():
        logits = gpt(torch.tensor([ids[:-1]]))[0][0]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()


# ---------------------------------------------------------------------------------------------
# perplexity


def test_perplexity_of_text(parts, folder, call):
    """Catches a mean of documents' means, characters taken for bytes, bits for nats, a window's
    edge that is skipped or scored twice, and --limit that counts something else."""
    gpt, tokenizer = parts
    for limit in (3, 12):
        row = call("perplexity", "--init", folder / "m", "--data", folder / "a.jsonl", "--limit",
                   limit)
        nats = n_tokens = n_bytes = 0
        for text in DOCUMENTS[:limit]:
            stream = [tokenizer.eot_id, *tokenizer.encode(text)]
            nats += sum(naive_nats(gpt, stream[at:at + 49]) for at in range(0, len(stream) - 1, 48))
            n_tokens += len(stream) - 1
            n_bytes += len(text.encode())
        assert (row["tokens"], row["bytes"]) == (n_tokens, n_bytes)
        assert row["loss"] == pytest.approx(nats / n_tokens, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)


def test_perplexity_of_arrays(parts, folder, call, monkeypatch):
    """Catches a mean of batches' means, and bits a byte that leave out a row's first token."""
    gpt, tokenizer = parts
    tokenize(folder / "a.jsonl", folder / "m", folder / "arrays", val_fraction=0.6)
    ids = np.fromfile(folder / "arrays/val.bin", np.uint16).tolist()
    rows = [ids[at:at + 48] for at in range(0, len(ids), 48)]
    assert len(rows) > 2 and len(rows[-1]) < 40
    row = call("perplexity", "--init", folder / "m", "--data", folder / "arrays")
    loss = sum(naive_nats(gpt, row) for row in rows) / (len(ids) - len(rows))
    n_bytes = len(tokenizer.decode([i for i in ids if i != tokenizer.eot_id]).encode())
    assert (row["tokens"], row["bytes"]) == (len(ids) - len(rows), n_bytes)
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(loss * len(ids) / n_bytes / math.log(2), rel=1e-5)
    # Two rows, nine targets: batches of val.bin hold unlike numbers of them too.
    x = torch.tensor([ids[:8], ids[8:16]])
    y = torch.tensor([ids[1:9], ids[9:10] + [-100] * 7])
    expected = naive_nats(gpt, ids[:9]) + naive_nats(gpt, ids[8:10])
    assert evaluate.summed_loss(gpt, x, y, CPU) == (pytest.approx(expected, rel=1e-5), 9)
    Tokenizer.from_merges([]).save(folder / "m")
    with pytest.raises(ValueError, match="another tokenizer"):
        call("perplexity", "--init", folder / "m", "--data", folder / "arrays")


# ---------------------------------------------------------------------------------------------
# question answering


def test_likelihood_of_options_equals_plain_logits(parts):
    """Catches an option scored from the wrong place, without its space, or with a prompt cut at the
    wrong end; equal options that differ by rounding."""
    gpt, tokenizer = parts
    asked = questions() + [Question(id=f"cut {n}", question=TEXT[:n], options=("no", "maybe", "no"))
                           for n in range(10, 60)]
    examples, scores = evaluate.zero_shot(gpt, tokenizer, asked, CPU)
    for q, e, found in zip(asked, examples, scores, strict=True):
        options = [tokenizer.encode(" " + option) for option in q.options]
        prompt = tokenizer.encode(f"Question: {q.question}\nAnswer:")
        kept = prompt[max(0, len(prompt) + max(map(len, options)) - 48):]
        assert e.truncated == (len(kept) < len(prompt))
        for ids, got in zip(options, found, strict=True):
            expected = naive_nats(gpt, kept) - naive_nats(gpt, kept + ids)
            assert got == pytest.approx(expected, abs=2e-4)
        assert e.question.options.count("no") < 2 or found[0] == found[2]
    assert not examples[7].truncated and examples[-1].truncated


def test_prompts():
    """Catches a context behind its question, and a cloze text with "Question:" and "Answer:"."""
    q = Question(id="1", question="Does it help?", context="Rats.")
    assert evaluate.zero_shot_prompt(q) == "Rats.\nQuestion: Does it help?\nAnswer:"
    q = Question(id="1", question="Rats were given", kind="cloze, medical")
    assert evaluate.zero_shot_prompt(q) == "Rats were given"


def test_acc_norm_counts_characters():
    """Catches division by tokens, by bytes, or by the characters with the space before them."""
    asked = [Question(id="1", question="?", options=("éé", "abc"), answer=1),
             Question(id="2", question="?", options=("a", "bcd"), answer=0)]
    examples = [Example(q, []) for q in asked]
    # a character: -2 and -1.4, -2 and -2.4; a byte: -1 and -1.4; with the space: -1 and -1.8
    assert evaluate.acc_norm([[-4.0, -4.2], [-2.0, -7.2]], examples) == 1.0
    assert evaluate.acc_norm([[-4.0, -6.3], [-2.0, -5.7]], examples) == 0.0


def test_breakdown():
    """Catches a group's hits that are another's, and a question counted in no or two lengths."""
    asked = [Question(id="1", question="a b c", kind="x", subject="s"),
             Question(id="2", question="a b", context="c d", kind="x"),
             Question(id="3", question="a", kind="y")]
    rows = evaluate.breakdown(asked, [1, 0, 1])
    assert [(row["group"], row["n"], row["accuracy"]) for row in rows] == [
        ("kind x", 2, 0.5), ("kind y", 1, 1.0), ("subject s", 1, 1.0), ("words < 2", 1, 1.0),
        ("words < 4", 1, 1.0), ("words < 8", 1, 0.0)]


def test_qa_command(folder, call):
    """Catches a split or limit that is ignored, and figures that are not the predictions'."""
    write_medqa(folder / "qa")
    command = ("qa", "--zero_shot", "--task", "medqa", "--data", folder / "qa", "--init",
               folder / "m", "--predictions", folder / "p.jsonl")
    row = call(*command, "--limit", 6)
    lines = [json.loads(line) for line in (folder / "p.jsonl").read_text().splitlines()]
    asked = load_qa("medqa", folder / "qa", "test")[::2]
    assert [line["id"] for line in lines] == [q.id for q in asked]
    right = sum(q.answer == np.argmax(line["scores"]) for q, line in zip(asked, lines))
    assert (row["split"], row["available"], row["n"]) == ("test", 12, 6)
    assert row["accuracy"] == right / 6 and [group["n"] for group in row["groups"]] == [6, 6]
    call(*command, "--split", "dev")
    assert "dev-0" in (folder / "p.jsonl").read_text()


# ---------------------------------------------------------------------------------------------
# generation


@pytest.mark.parametrize("decoding", [dict(temperature=0.0),
                                      dict(num_beams=3, no_repeat_ngram_size=2),
                                      dict(temperature=0.0, no_repeat_ngram_size=1)])
def test_ragged_prompts_in_one_batch_equal_each_alone(parts, decoding):
    """Catches padding that is attended to, counted as a position, taken for repeated text, or left
    over for the next batch."""
    gpt, tokenizer = parts
    texts = ("the trial of insulin in rats", "A", "Which drug", "Which drug")
    prompts = [tokenizer.encode(text) for text in texts]
    together = evaluate.continue_prompts(gpt, tokenizer, prompts, 12, batch_size=2, **decoding)
    alone = [evaluate.continue_prompts(gpt, tokenizer, [prompt], 12, **decoding)[0]
             for prompt in prompts]
    assert together == alone and len(set(together)) > 1


def test_flags_of_generate_reach_the_model(folder, call, parts, monkeypatch):
    """Catches a flag without effect, text after end-of-text, a prompt without its last token."""
    given = []

    def generate(self, idx, max_new_tokens, eot_id=None, **decoding):
        given.append((idx.tolist(), self.transformer.wte.weight.dtype, max_new_tokens, decoding))
        new = torch.tensor([[65, 66, eot_id, 67]]).repeat(len(idx), 1)
        return torch.cat([idx, new], dim=1)

    monkeypatch.setattr(GPT, "generate", generate)
    tokenizer = parts[1]
    command = ("generate", "--init", folder / "m", "--prompt", "A drug", "")
    flags = dict(temperature=0.5, top_k=7, top_p=0.9, seed=3, num_beams=2, length_penalty=0.25)
    result = call(*command, "--dtype", "bfloat16", "--max_new_tokens", 9,
                  *(part for name, value in flags.items() for part in (f"--{name}", value)))
    assert result["texts"] == [tokenizer.decode([65, 66])] * 2
    tokenizer.add_special_tokens(["<|startoftext|>"])
    tokenizer.save(folder / "m")
    call(*command, "--paper")
    (rows, dtype, n_new, decoding), (rows_tuned, _, _, paper) = given
    ids = tokenizer.encode("A drug")
    assert rows[0] == ids and rows[1][-1] == tokenizer.eot_id
    assert (dtype, n_new) == (torch.bfloat16, 9)
    assert decoding.pop("n_pad").tolist() == [0, len(ids) - 1] and decoding == flags
    assert rows_tuned[0] == ids + [tokenizer.special["<|startoftext|>"]]
    assert paper.pop("n_pad") is not None
    assert paper == dict(num_beams=5, no_repeat_ngram_size=6, length_penalty=-0.5)


# ---------------------------------------------------------------------------------------------
# numbers


def test_numbers_and_their_verdicts():
    """Catches units lost at a plural, 1,500 read as two numbers, the 6 of IL-6, a power read as two
    numbers or without its factor, and a unit that doesn't matter."""
    found = evaluate.numbers_in("1,500 mg for 2 years, 5.5% of IL-6 in 10 patients; p53, 20mcg.")
    assert found == [(1500, "mg"), (2, "year"), (5.5, "%"), (10, "patient"), (20, "µg")]
    for text in ("10^5", "10(5)", "1 × 10^5", "1x10(5)", "0.1 × 10^6", "100,000"):
        assert evaluate.numbers_in(text) == [(1e5, "")], text
    assert evaluate.numbers_in("3 × 10^−6 g, 110(5)") == [(3e-6, "g"), (110, ""), (5, "")]
    known = evaluate.numbers_in("1500 mg for 3 years in 40 rats")
    for number, expected in (((1500, "mg"), "supported"), ((1500, ""), "supported"),
                             ((40, "kg"), "supported"), ((1500, "year"), "contradicted"),
                             ((2, "year"), "contradicted"), ((7, "kg"), "unsupported"),
                             ((7, ""), "unsupported")):
        assert evaluate.verdict(number, known) == expected, number


def test_perturbed_text_differs_in_one_number():
    """Catches a "perturbed" text equal to the true one, whose comparison would count as a loss."""
    for seed in range(30):
        text = "In 2018, 7 of 40 patients took 250 mg."
        other = evaluate.perturb(text, seed)
        changed = [(a, b) for a, b in zip(text.split(), other.split(), strict=True) if a != b]
        assert len(changed) == 1 and len(other) == len(text)
    assert evaluate.perturb("no number: p53, 1.5", 0) is None


def test_audit_and_its_controls(folder, call, monkeypatch):
    """Catches an answer judged by another's source, a control that is the question's own reference,
    a reference judged by itself, and a preference for the changed text."""
    targets = ["It took 11 days.", "It took 22 days.", "None at all."]
    asked = [Question(id="1", question="Of 5 rats?", target=targets[0]),
             Question(id="2", question="How long?", context="After 22 days.", target=targets[1]),
             Question(id="3", question="How?", target=targets[2])]
    monkeypatch.setattr(evaluate, "load_qa", lambda task, dir, split: asked)
    prompts = []

    def answer(gpt, tokenizer, given, *args, **decoding):
        prompts.extend(given)
        return ["5 of 11 days", "11 days or 22 kg", "7 kg"]

    monkeypatch.setattr(evaluate, "continue_prompts", answer)
    monkeypatch.setattr(evaluate, "text_loss",
                        lambda gpt, text, *_: (1.0 if text == targets[0] else 2.0, 1))
    result = call("numbers", "--init", folder / "m", "--data", folder, "--max_new_tokens", 40)
    assert prompts[0] == small_tokenizer().encode("Question: Of 5 rats?\nAnswer:")[-7:]
    columns = ("n", "with_numbers", "numbers", "supported", "contradicted", "unsupported")
    assert [[row[c] for c in columns] for row in result["numbers"]] == [
        [3, 3, 5, 2 / 5, 1 / 5, 2 / 5],  # 5, 11 days | 11 days | 22 kg, 7 kg
        [3, 2, 2, 0.0, 1 / 2, 1 / 2],  # 22 days to question 1, 11 days to question 3
        [3, 2, 2, 1 / 2, 0.0, 1 / 2]]  # 11 days and nothing, 22 days and the context
    taste = result["perturbed"]  # a tie is no preference
    assert (taste["texts_with_numbers"], taste["true_preferred"]) == (2, 0.5)
    assert taste["nats_gap"] == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------
# tokenizer, curves, mistakes


def test_tokenizer_tables(folder, call):
    """Catches a space counted as a piece, characters taken for bytes, a term missed for its capital
    or its comma."""
    text = " ".join(["Genome, (genome) é"] * 6)
    (folder / "t.txt").write_text(text)
    words, groups, of_text, bands = call("tokenizer", "--tokenizer", folder / "m", "--text",
                                         folder / "t.txt")
    tokenizer = small_tokenizer()
    lengths = []
    for term in [term for terms in evaluate.SPECIALTIES.values() for term in terms][:210]:
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(f" {term}")]
        lengths.append(len(pieces) - (pieces[0] == " "))
    shares = [sum(n <= most for n in lengths) / 210 for most in (1, 2)]
    expected = f"{shares[0]:.0%}, {shares[1]:.0%}, {sum(lengths) / 210:.2f}"
    assert list(groups[-1].values()) == ["the ten together", 210, expected]
    assert words[-1][str(folder / "m")] == "t/h/r/o/m/b/in"
    n_tokens = len(tokenizer.encode(text + "\n"))
    assert list(of_text[0].values())[1:] == [18, n_tokens, n_tokens / 18, 120 / n_tokens]
    assert [(row["group"], row["terms"]) for row in bands] == [("10 to 99", 1), ("never", 239)]


def test_curves(folder, call):
    """Catches validation rows taken for training rows, epochs for steps."""
    pytest.importorskip("matplotlib")  # an optional package
    rows = [dict(step=s, tokens=s * 10, loss=5.0 - s / 10) for s in range(10)]
    rows.append(dict(step=9, val_loss=4.5))
    tuned = [dict(epoch=1, loss=1.0, dev=0.5), dict(epoch=2, loss=0.5, dev=0.25), dict(dev=0.5)]
    for name, log in (("m", rows), ("tuned", tuned)):
        (folder / name).mkdir(exist_ok=True)
        write_lines(folder / name / "log.jsonl", log)
    result = call("curves", folder / "m", folder / "tuned", "--out", folder / "c.png")
    assert (folder / "c.png").read_bytes()[1:4] == b"PNG"
    last = [list(row.values())[1:] for row in result["last"]]
    assert last == [[4.1, 4.5, None], [0.5, None, 0.25]]


def test_mistakes(folder, call, monkeypatch, capsys):
    """Catches tracebacks for a user's mistakes, and --json whose folder is missed too late."""
    write_medqa(folder / "qa")
    model = ("--init", folder / "m")
    for args, needs in ((["curves", folder / "qa"], "log.jsonl"),
                        (["qa", "--task", "medqa", "--data", folder / "qa", *model], "--zero_shot"),
                        (["generate", *model, "--prompt", TEXT], "context")):
        with pytest.raises((ValueError, OSError), match=needs):
            call(*args)
    monkeypatch.setattr(sys, "argv", ["eval.py", "perplexity", *map(str, model), "--data",
                                      str(folder / "a.jsonl"), "--json", str(folder / "no/r.json")])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "make it first" in capsys.readouterr().err
