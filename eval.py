"""Measure a model: how well it predicts text, answers questions and writes.

    python eval.py perplexity --init out/demo --data data/demo
    python eval.py qa --task pubmedqa --data data/demo --init out/demo-pm
    python eval.py generate --init out/demo --prompt "The drug"

Reads a run of train.py or finetune.py, or a Hugging Face GPT-2 folder (--init). Prints tables, and
writes the same figures with --json FILE. Three commands more: numbers (does the model make up
numbers?), tokenizer (how do medical words break?), curves (pictures of training).
Leaves out training and several GPUs: one process, one device.

Dimensions: B rows, T time, C width, V vocabulary.
"""

import argparse
import itertools
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import finetune
from data import TASKS, load_meta, load_qa, val_batches, write_lines, zero_shot_prompt
from model import GPT, Linear, cross_entropy
from tokenizer import COUNT, json_lines, load_named, read_documents, run_command, write_json
from train import COUNT_OR_0, POSITIVE_OR_0, evaluate, start_process

# ---------------------------------------------------------------------------------------------
# perplexity: how well does the model predict text?
#
# The loss is the mean of -ln p over all tokens, in nats a token; its exponential is the perplexity.
# Two tokenizers cut a text into unlike numbers of tokens, and a long token is harder to guess than
# a short one. So losses compare models of one tokenizer only.
#
# Bits a byte compare any two models on the same text: how many bits does a byte of it cost, if the
# model's guesses are used to compress it? The text costs loss × tokens nats in all, a nat is
# 1 / ln 2 = 1.44 bits, and the text's length is counted in bytes of UTF-8:
#
#     bits_per_byte = loss × tokens / ln 2 / bytes
#
# Example: 3 nats a token are 4.33 bits; at 4.5 bytes a token that is 0.96 bits a byte.


def perplexity(args):
    """The perplexity command: {loss, bits_per_byte, tokens, bytes} of val.bin, or of a text.

    tokens: how many were predicted. In arrays a row's first token isn't, as nothing stands before
    it. bytes counts it, so bits_per_byte gives it the mean loss.
    """
    gpt, tokenizer, process = load_model(args)
    context = gpt.config.n_positions
    n_tokens = None  # of a text all are predicted
    if (Path(args.data) / "meta.json").exists():
        meta = load_meta(args.data)
        if meta["tokenizer_sha256"] != tokenizer.fingerprint:
            raise ValueError(f"{args.data} was tokenized with another tokenizer than the model's: "
                             "tokenize with the model's, or give --data the text itself")
        batches = val_batches(args.data, context, max(1, 8192 // context), device=process.device)
        n_tokens = meta["val"]["tokens"]
        n_bytes = meta["val"]["bytes"]
    else:
        texts = [text for _, text in read_documents(args.data)]
        batches = text_rows(texts, tokenizer, context, process.device)
        n_bytes = len("".join(texts).encode())
    nats, n_scored = evaluate(gpt, tqdm(batches, leave=False, disable=None), process)
    if not n_scored:
        raise ValueError(f"{args.data} holds no token to score: give a folder with text")
    loss = nats / n_scored
    bits_per_byte = loss * (n_tokens or n_scored) / math.log(2) / n_bytes
    result = dict(loss=loss, bits_per_byte=bits_per_byte, tokens=int(n_scored), bytes=n_bytes)
    print_table([result])
    return result


def load_model(args, to_generate=False):
    """(GPT, its Tokenizer, this process) by --init, --device and --dtype.

    Usually weights are fp32, and autocast casts them for each matrix product. To generate, a step
    reads every weight for one token: weights of half the size take half the time. So they are cast
    here, once, and there is no autocast.
    """
    process = start_process(args.device, args.dtype)
    dtype = process.dtype if to_generate else torch.float32
    if dtype == torch.int8:
        gpt = quantized(GPT.from_pretrained(args.init, None)).to(process.device)
    else:
        gpt = GPT.from_pretrained(args.init, dtype, process.device)
    return gpt, finetune.load_tokenizer(args.init, gpt.config), process


def text_rows(texts, tokenizer, context, device):
    """Yields x, y of one row (1, T <= context) at a time. No document sees another.

    End-of-text stands before a document, so that its first token is predicted, too. A document
    longer than the context is cut into rows, and a row doesn't see the one before. If it did, the
    loss would be lower: so this one is an upper bound.
    """
    for text in filter(None, texts):
        ids = torch.tensor([[tokenizer.eot_id, *tokenizer.encode(text)]], device=device)
        yield from zip(ids[:, :-1].split(context, dim=1), ids[:, 1:].split(context, dim=1))


def print_table(rows):
    """Print one or more dictionaries of the same keys as aligned columns."""
    table = [list(rows[0])]
    table += [list(map(cell, row.values())) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(map(str.ljust, line, widths)))
    print()


def cell(value):
    if isinstance(value, list):  # an interval
        return "-".join(map(cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------
# question answering: a fine-tuned head, or the likelihood of each option
#
# Without fine-tuning (--zero_shot) the answer is the option that the model finds likeliest after
# the question:
#
#     Question: Which drug helps?
#     Answer: aspirin                 log p of " aspirin" -7.1, of " heparin" -9.4: aspirin it is


def answer_questions(args):
    """The qa command: accuracy of a fine-tuned head, or of likelihoods with --zero_shot.

    Returns finetune.summarise's figures, with "groups" and, for likelihoods, "acc_norm".
    """
    split, official = find_questions(args)
    questions = finetune.labeled(official, args.limit)
    if args.zero_shot:
        gpt, tokenizer, process = load_model(args)
        examples, scores = zero_shot(gpt, tokenizer, questions, process)
    else:
        process = start_process(args.device, args.dtype)
        model, tokenizer, settings = finetune.load_finetuned(args.init, args.task, process.device)
        examples = finetune.encode_all(questions, args.task, tokenizer, settings)
        scores = finetune.score_examples(model, examples, process)
    hits = finetune.correct(scores, examples)
    result = finetune.summarise(args.task, split, len(official), examples, [fmean(hits)])
    print(finetune.describe(result))
    if args.zero_shot:
        result["acc_norm"] = acc_norm(scores, examples)
        print(f"by likelihood over length (acc_norm): {result['acc_norm']:.1%}")
    result["groups"] = breakdown(questions, hits)
    if result["groups"]:
        print_table(result["groups"])
    if args.predictions:
        write_lines(args.predictions, finetune.predictions(scores, examples))
    return result


def find_questions(args):
    """(split, its questions): --split, or test, or dev where test has no file or no answers."""
    for split in [args.split] if args.split else ["test", "dev"]:
        questions = finetune.find_split(args.task, args.data, split)
        if finetune.labeled(questions):  # MedMCQA's test has no answers
            return split, questions
    load_qa(args.task, args.data, split)  # says which file is missing, if one is
    raise ValueError(f"{args.task}'s {split} split has no answers: give another --split")


@torch.no_grad()
def zero_shot(gpt, tokenizer, questions, process):
    """(examples, scores: for each example a list of its options' log-likelihoods).

    Options share a row behind their prompt, which is computed once: 4 times cheaper on MedMCQA.
    A prompt that is too long loses its start: the question stands at the end.
    """
    limit = gpt.config.n_positions
    examples = []
    for q in questions:
        prompt = tokenizer.encode(zero_shot_prompt(q))
        options = [tokenizer.encode(" " + option)[:limit - 1] for option in q.options]
        room = limit - max(map(len, options))
        row = finetune.Row(prompt[-room:], options)
        examples.append(finetune.Example(q, [row], truncated=len(prompt) > room))

    def score(chunk):
        batch = finetune.collate(chunk, process.device)
        with process.autocast():
            hidden = gpt.hidden(batch.idx, positions=batch.positions, mask=batch.mask)
            # (B, T, C) -> B times (T, C)
            return [option_scores(gpt, *row) for row in zip(chunk, batch.idx, hidden)]

    return examples, finetune.in_order(examples, 8192, score)


def option_scores(gpt, example, idx, hidden):
    """Log-likelihoods, in nats, of an example's options, by its row: idx (T,), hidden (T, C).

    The hidden state of one token predicts the next. Every option's first token is predicted by the
    prompt's last one:

        row               P0  P1  A0  A1  B0  B1
        A's predictions       A0  A1
        B's predictions       B0          B1
    """
    prompt, options = example.rows[0]
    start = len(prompt)
    scores = []
    for ids in options:
        end = start + len(ids)
        before = [len(prompt) - 1, *range(start, end - 1)]
        mean = cross_entropy(hidden[before], gpt.transformer.wte.weight, idx[start:end])
        scores.append(-mean.item() * len(ids))
        start = end
    # Equal options must score the same, to the last bit: each takes the first one's score.
    texts = example.question.options
    return [scores[texts.index(text)] for text in texts]


def acc_norm(scores, examples):
    """Accuracy (0 to 1) when each log-likelihood is divided by its option's length in characters.

    A long option has many tokens, so its sum is low. The name and the measure, which doesn't count
    the space before the option, are those of EleutherAI's lm-evaluation-harness. Its "acc" takes
    the sum itself, as our accuracy does.
    """
    by_length = []
    for sums, example in zip(scores, examples):
        options = example.question.options
        by_length.append([score / max(len(option), 1) for score, option in zip(sums, options)])
    return fmean(finetune.correct(by_length, examples))


def breakdown(questions, hits):
    """Rows of accuracy by the question's kind and by its subject."""
    groups = defaultdict(list)
    for q, hit in zip(questions, hits):
        for name, value in ("kind", q.kind), ("subject", q.subject):
            if value:  # many sets name no kind or no subject
                groups[name, value].append(hit)
    return [dict(group=" ".join(group), n=len(of_group), accuracy=fmean(of_group),
                 ci95=finetune.wilson(fmean(of_group), len(of_group)))
            for group, of_group in sorted(groups.items())]


# ---------------------------------------------------------------------------------------------
# generation

DECODING = ("temperature", "top_k", "num_beams", "seed")
# BioMedLM: its decoding, for answers of at most 400 tokens
PAPER_DECODING = dict(num_beams=5, no_repeat_ngram_size=6, length_penalty=-0.5)


def generate(args):
    """The generate command: prints each prompt with what the model adds.

    Returns {"texts": what was added to each prompt}.
    """
    gpt, tokenizer, _ = load_model(args, to_generate=True)
    prompts = [tokenizer.encode(text) or [tokenizer.eot_id] for text in args.prompt]
    decoding = PAPER_DECODING if args.paper else {name: vars(args)[name] for name in DECODING}
    texts = continue_prompts(gpt, tokenizer, prompts, args.max_new_tokens, **decoding)
    for prompt, text in zip(args.prompt, texts):
        print(prompt + text)
    return dict(texts=texts)


def continue_prompts(gpt, tokenizer, prompts, max_new_tokens, **decoding):
    """The text that gpt adds to each prompt (a list of ids), up to end-of-text.

    A prompt ends in <|startoftext|> if the tokenizer has it (after finetune.py --task text). One
    prompt at a time: they have unlike lengths.
    """
    start = tokenizer.special.get("<|startoftext|>")
    texts = []
    for ids in tqdm(prompts, leave=False, disable=None):  # a bar on a terminal
        if start is not None:
            ids = [*ids, start]
        idx = torch.tensor([ids], device=gpt.transformer.wte.weight.device)  # (1, T)
        out = gpt.generate(idx, max_new_tokens, eot_id=tokenizer.eot_id, **decoding)
        new = itertools.takewhile(lambda i: i != tokenizer.eot_id, out[0, len(ids):].tolist())
        texts.append(tokenizer.decode(new))
    return texts


# ---------------------------------------------------------------------------------------------
# int8 weights: 2.59 billion parameters in 3 GB
#
#     s_i = max_j |W_ij| / 127      Q_ij = round(W_ij / s_i)      y_i = s_i Σ_j Q_ij x_j + b_i
#
# A row of a matrix becomes whole numbers from -127 to 127 and one scale. A weight is off by at most
# s_i / 2, so y_i by at most s_i / 2 · Σ_j |x_j|, and mostly by far less: the errors' signs differ.
# Q is made with the scale as it is stored, in bf16. So the scale's rounding adds no error.
#
# A step of generation reads every weight once: half of bf16's bytes, half of its time. torch has a
# product that reads int8, for a CPU and a few rows. A long prompt has many rows, and a GPU has
# memory that is fast: there the matrix is made bf16 for the moment.


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with weights of one byte; x is bf16."""

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = weight.float().contiguous()  # (out, in)
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, x, with_bias=True):
        rows = x.flatten(0, -2)  # (..., in) -> (N, in)
        if x.is_cpu and len(rows) <= 64 and x.size(-1) % 16 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        if with_bias and self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def quantized(gpt):
    """The GPT in bf16; its blocks' matrices and its head become int8, one at a time."""
    gpt.head = Int8Linear(gpt.transformer.wte.weight)  # the largest one first: memory is still free
    gpt.logits = gpt.head.forward  # GPT.logits would read wte
    finetune.replace_modules(gpt, Linear, lambda linear: Int8Linear(linear.weight, linear.bias))
    return gpt.to(torch.bfloat16)  # which leaves whole numbers as they are


# ---------------------------------------------------------------------------------------------
# numbers: does the model make them up?
#
# A number of an answer counts as supported if the question, its context or the reference answer
# has the same value and unit. This is a rough measure. It misses a rounded number and a sum, and a
# right value about the wrong thing passes.

UNITS = ("%|percent|mg/dl|mg/kg|mg|mcg|µg|μg|ug|kg|g/dl|g|ml|dl|l|mmol/l|mmol|iu|units?|mm ?hg|mm|"
         "cm|years?|months?|weeks?|days?|hours?|hrs?|minutes?|mins?|seconds?|times|cases|people|"
         "patients|calories|degrees")
SAME_UNIT = {"percent": "%", "mcg": "µg", "ug": "µg", "μg": "µg", "hr": "hour", "min": "minute"}
NUMBER = re.compile(
    r"(?<![\w.])(?<![a-zA-Z]-)"  # not the 53 of p53, nor the 6 of IL-6
    r"(\d+(?:,\d{3})*(?:\.\d+)?)"  # 1,500.5
    r"(?:( ?[×x*·] ?10|(?<=\b10))"  # × 10, or the number itself is 10; then its power:
    r"(?:\^\(?|\()([+-]?\d+)\)?)?"  # ^5, ^(5), or (5) as MEDLINE writes it
    rf"(?:[ -]?({UNITS})(?![\w/]))?", re.IGNORECASE)


def audit_numbers(args):
    """The numbers command: judge the numbers of generated answers by question and reference.

    A control shows what chance does: references of other questions, as if they were answers.
    """
    _, questions = find_questions(args)
    questions = finetune.labeled(questions, args.limit)
    references = [q.target for q in questions]
    gpt, tokenizer, _ = load_model(args, to_generate=True)
    finetuned = "<|startoftext|>" in tokenizer.special  # by finetune.py --task text
    room = gpt.config.n_positions - args.max_new_tokens - 1  # 1: the place of <|startoftext|>
    prompts = []
    for q in questions:
        text = q.question if finetuned else zero_shot_prompt(q)
        prompts.append(tokenizer.encode(text)[-room:])  # a long one loses its start
    decoding = PAPER_DECODING if args.paper else {"temperature": 0.0}
    answers = continue_prompts(gpt, tokenizer, prompts, args.max_new_tokens, **decoding)
    sources = [f"{q.question}\n{q.context}\n{q.target}" for q in questions]
    rows = [judge("generated", answers, sources),
            judge("another question's reference", references[1:] + references[:1], sources)]
    print_table(rows)
    return dict(numbers=rows, answers=answers)


def judge(name, answers, sources):
    """Shares of verdicts over all numbers of answers, each against its own question's source."""
    verdicts = []
    n_with_numbers = 0
    for answer, source in zip(answers, sources):
        known = numbers_in(source)
        of_answer = [verdict(number, known) for number in numbers_in(answer)]
        verdicts += of_answer
        n_with_numbers += bool(of_answer)
    result = dict(answers=name, n=len(answers), with_numbers=n_with_numbers, numbers=len(verdicts))
    for outcome in ("supported", "contradicted", "unsupported"):
        result[outcome] = verdicts.count(outcome) / len(verdicts) if verdicts else None
    return result


def numbers_in(text):
    """[(value, unit or "")] of a text.

    "1,500 mg" is (1500.0, "mg"), "2 years" (2.0, "year"). "10^5", "10(5)" and "1 × 10^5" are all
    (100000.0, "").
    """
    found = []
    for value, times_ten, power, unit in NUMBER.findall(text.replace("−", "-")):
        if power and not times_ten:  # the 10 is the power's base
            value = "1"
        value = float(value.replace(",", "") + "e" + (power or "0"))
        unit = unit.lower().removesuffix("s")
        found.append((value, SAME_UNIT.get(unit, unit)))
    return found


def verdict(number, known):
    """What the numbers that a source holds say about one.

    supported: the source has its value with its unit, or one of both names no unit.
    contradicted: the source has its unit, but with other values only. unsupported: neither.
    """
    value, unit = number
    for known_value, known_unit in known:
        if known_value == value and (known_unit == unit or not known_unit or not unit):
            return "supported"
    if unit and any(known_unit == unit for _, known_unit in known):
        return "contradicted"
    return "unsupported"


# ---------------------------------------------------------------------------------------------
# tokenizer: how do medical words break?
#
# BioMedLM's tokenizer learned its merges from PubMed, so it keeps whole many words that GPT-2's
# cuts. Terms of ten specialties and rare or new ones show where, and how far that goes.

# BioMedLM: the words of the paper's table 3
TABLE_3 = ["chromatography", "cytotoxicity", "ECG", "GATA", "Immunohistochemistry", "myocardium",
           "nanoparticles", "photosynthesis", "probiotic", "thrombin"]

SPECIALTIES = {name: words.split() for name, words in {
    "oncology": """adenocarcinoma carcinoma lymphoma melanoma metastasis metastatic chemotherapy
        radiotherapy glioblastoma leukemia myeloma sarcoma neuroblastoma mesothelioma angiogenesis
        oncogene neoadjuvant cisplatin tumorigenesis cholangiocarcinoma retinoblastoma""",
    "cardiology": """myocardial infarction arrhythmia tachycardia bradycardia fibrillation stenosis
        atherosclerosis cardiomyopathy ischemia thrombosis angioplasty echocardiography hypertension
        endocarditis pericarditis defibrillator troponin ventricular electrocardiogram stent""",
    "genetics": """genome genotype phenotype allele heterozygous homozygous polymorphism mutation
        chromosome autosomal transcriptome methylation exome haplotype epigenetic microRNA telomere
        aneuploidy missense penetrance mitochondrial""",
    "neurology": """epilepsy seizure dementia Parkinson Alzheimer neuropathy sclerosis
        encephalopathy hippocampus cerebellum dopaminergic aphasia ataxia migraine meningitis myelin
        neurotransmitter neurodegenerative dyskinesia astrocytes polyneuropathy""",
    "infectious disease": """tuberculosis malaria hepatitis influenza pneumonia sepsis bacteremia
        antimicrobial staphylococcus streptococcus pseudomonas candidiasis toxoplasmosis
        leishmaniasis dengue cytomegalovirus coronavirus helminth schistosomiasis brucellosis
        antiretroviral""",
    "pharmacology": """pharmacokinetics bioavailability metformin warfarin aspirin ibuprofen
        acetaminophen omeprazole simvastatin atorvastatin amoxicillin vancomycin heparin morphine
        fentanyl clopidogrel methotrexate cyclosporine tacrolimus hepatotoxicity agonist""",
    "immunology": """cytokine interleukin lymphocyte macrophage neutrophil antibody antigen
        immunoglobulin autoimmune inflammation chemokine interferon complement eosinophil
        immunosuppression autoantibodies phagocytosis opsonization rituximab adalimumab
        histamine""",
    "endocrinology": """diabetes insulin glucagon thyroid hypothyroidism hyperthyroidism cortisol
        aldosterone estrogen testosterone progesterone pituitary acromegaly hypoglycemia
        hyperglycemia thyroxine parathyroid osteoporosis pheochromocytoma adiponectin
        hyperprolactinemia""",
    "surgery": """laparoscopic appendectomy cholecystectomy anastomosis resection hysterectomy
        thoracotomy laparotomy arthroplasty transplantation hemostasis suture debridement
        tracheostomy gastrectomy colectomy mastectomy perioperative anesthesia herniorrhaphy
        nephrectomy""",
    "radiology": """tomography radiograph ultrasonography mammography angiography gadolinium
        fluoroscopy attenuation echogenic hyperintense hypointense opacification calcification
        fluorodeoxyglucose scintigraphy elastography radiotracer hypodense perfusion voxel
        cholangiopancreatography""",
    "rare and new terms": """onasemnogene elexacaftor nusinersen tisagenlecleucel sotorasib
        inclisiran semaglutide tirzepatide remdesivir molnupiravir nirmatrelvir lecanemab aducanumab
        teprotumumab zolgensma alkaptonuria ochronosis fibrodysplasia mucopolysaccharidosis
        lymphangioleiomyomatosis pseudoxanthoma cystinosis abetalipoproteinemia hidradenitis
        chikungunya melioidosis naegleria tularemia trichothiodystrophy ehrlichiosis""",
}.items()}


def tokenizer_tables(args):
    """The tokenizer command: table 3 of the paper, and how the terms of a specialty break."""
    tokenizers = {name: load_named(name) for name in [args.tokenizer, *args.against]}
    words = [dict(word=word) | {name: "/".join(pieces_of(word, tokenizer))
                                for name, tokenizer in tokenizers.items()}
             for word in TABLE_3]
    *ten, _ = SPECIALTIES.values()  # the last group is no specialty
    groups = SPECIALTIES | {"the ten together": sum(ten, [])}
    tables = [words, fragmentation(groups, tokenizers)]
    for table in tables:
        print_table(table)
    return tables


def pieces_of(word, tokenizer):
    """A word's pieces inside a sentence, where a space stands before it (and is not shown).

    GPT-2's of "myocardium": ["my", "ocard", "ium"].
    """
    pieces = [tokenizer.decode([i]).strip(" ") for i in tokenizer.encode(" " + word)]
    return [piece for piece in pieces if piece]  # without a piece that is the space alone


def fragmentation(groups, tokenizers):
    """A row a group of words. Of each tokenizer: share of words kept whole, in at most two pieces,
    and the mean number of pieces."""
    rows = []
    for group, words in groups.items():
        row = dict(group=group, terms=len(words))
        for name, tokenizer in tokenizers.items():
            lengths = [len(pieces_of(word, tokenizer)) for word in words]
            whole = fmean(n == 1 for n in lengths)
            two = fmean(n <= 2 for n in lengths)
            row[f"{name}: whole, ≤ 2, pieces"] = f"{whole:.0%}, {two:.0%}, {fmean(lengths):.2f}"
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# curves: pictures of training

CURVES = ("loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm", "tokens_per_s", "dev")


def curves(args):
    """The curves command: a picture of what the runs' log.jsonl hold. Returns their rows.

    train.py counts steps, finetune.py epochs. Runs of unlike tokenizers compare by bits a byte
    only. Needs matplotlib.
    """
    logs = {run: [row for _, row in json_lines(Path(run) / "log.jsonl")] for run in args.runs}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("curves needs: pip install matplotlib") from None
    written = set().union(*itertools.chain(*logs.values()))
    names = [name for name in CURVES if name in written]
    if not names:
        raise ValueError(f"{args.runs}: no log.jsonl has a row to draw: train longer")
    figure = Figure(figsize=(8, 3 * len(names)), layout="constrained")
    for ax, name in zip(figure.subplots(len(names), squeeze=False).flat, names):
        for run, rows in logs.items():
            points = [(row.get("step", row.get("epoch")), row[name]) for row in rows if name in row]
            if points:  # no line joins them, since several seeds pass the same epochs
                ax.plot(*zip(*points), ".", markersize=3, label=run)
        ax.set_title(name)
        ax.legend()
    figure.savefig(args.out)
    return logs


# ---------------------------------------------------------------------------------------------
# the command line


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    floats = finetune.FLOATS

    def command(name, function, sentence, dtypes=()):
        """add_argument of a new command."""
        sub = commands.add_parser(name, help=sentence, parents=[finetune.shared_flags(dtypes)])
        sub.set_defaults(function=function)
        return sub.add_argument

    def add_questions(add):
        add("--data", required=True, help="folder with the question set's official files")
        add("--split", choices=("train", "dev", "test"), help="(default: test, else dev)")
        add("--limit", type=COUNT, help="N questions, evenly over the split (default: all)")

    add = command("perplexity", perplexity, "nats a token and bits a byte", floats)
    add("--data", required=True, help="arrays (their val.bin), or text: each document on its own")

    add = command("qa", answer_questions, "accuracy on a question set", floats)
    sets = [name for name in TASKS if name != "text"]  # text has no options
    add("--task", choices=sets, required=True, help="question set")
    add_questions(add)
    add("--zero_shot", action="store_true",
        help="score options by likelihood, not by a fine-tuned head (default: off)")
    add("--predictions", help="also write a JSON line a question (default: none)")

    add = command("generate", generate, "continue a text", [*floats, "int8"])
    add("--prompt", required=True, nargs="+", help="one or several texts")
    add("--max_new_tokens", type=COUNT, default=64, help="tokens to add at most (default: 64)")
    add("--paper", action="store_true", help="BioMedLM's decoding: 5 beams, no repeated 6-gram, "
        "length penalty -0.5 (default: off)")
    add("--temperature", type=POSITIVE_OR_0, default=0.8, help="0 = greedy (default: 0.8)")
    add("--top_k", type=COUNT, help="sample among the k likeliest tokens (default: all)")
    add("--num_beams", type=COUNT, default=1, help="beam search instead of sampling (default: 1)")
    add("--seed", type=COUNT_OR_0, default=1, help="of sampling (default: 1)")

    add = command("numbers", audit_numbers, "audit of made-up numbers in generated answers",
                  [*floats, "int8"])
    add("--task", choices=TASKS, default="text", help="question set (default: text)")
    add_questions(add)
    add("--max_new_tokens", type=COUNT, default=128, help="tokens an answer (default: 128)")
    add("--paper", action="store_true", help="BioMedLM's decoding (default: greedy)")

    add = command("tokenizer", tokenizer_tables, "how biomedical words break")
    add("--tokenizer", required=True, help="folder of a tokenizer, or gpt2")
    add("--against", nargs="+", default=[], help="folders of others, or gpt2 (default: none)")

    add = command("curves", curves, "loss, rate, gradient norm and speed of runs as a picture")
    add("runs", nargs="+", help="folders with log.jsonl")
    add("--out", default="curves.png", help="picture to write (default: curves.png)")
    return parser.parse_args()


def main():
    args = parse_args()
    result = args.function(args)
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run_command(main)
