"""Measure a model: perplexity, question answering, generation, audits, curves.

    python eval.py perplexity --init out/demo --data data/demo
    python eval.py qa --task pubmedqa --data data/demo/qa/pubmedqa --init out/demo-pubmedqa
    python eval.py generate --init out/demo --prompt "The drug"

Reads a run of train.py or finetune.py, or a Hugging Face GPT-2 folder (--init); prints tables, and
with --json writes them. Leaves out training and several GPUs: one process, one device.
"""

import argparse
import itertools
import json
import math
import random
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import finetune
from data import load_meta, load_qa, read_documents, val_batches
from model import GPT
from tokenizer import Tokenizer, block_text, input_files, load_named, read_blocks
from train import memory_gib

# ---------------------------------------------------------------------------------------------
# perplexity


def windows(text, tokenizer, context):
    """Rows of one document, as examples: every token a target once, the first after end-of-text.

    A document longer than the context is cut without overlap, so later pieces start with less
    context than they could have: an upper bound on the loss.
    """
    ids = [tokenizer.eot_id, *tokenizer.encode(text)]
    for at in range(0, len(ids) - 1, context):
        row = ids[at:at + context + 1]
        yield finetune.Example(None, [finetune.Row([], [row])], n_targets=len(row) - 1)


@torch.no_grad()
def score_text(gpt, texts, tokenizer, env):
    """(sum of nats, number of tokens) of each text, given nothing but itself."""
    model, totals = finetune.TaskModel(gpt, "text"), []
    for text in texts:
        nats = n_tokens = 0
        rows = list(windows(text, tokenizer, gpt.config.n_positions))
        for chunk in finetune.micro_batches(rows, max_tokens=8192):
            with env.autocast():
                nats += model(finetune.collate(chunk, env.device)).item()
            n_tokens += sum(e.n_targets for e in chunk)
        totals.append((nats, n_tokens))
    return totals


@torch.no_grad()
def score_arrays(gpt, data, env):
    """(sum of nats, number of targets) of val.bin, in rows of the context as in training."""
    context, nats, count = gpt.config.n_positions, 0.0, 0
    for x, y in val_batches(data, context, max(1, 8192 // context), device=env.device):
        n = int((y != -100).sum())
        with env.autocast():
            nats, count = nats + gpt(x, y)[1].item() * n, count + n
    return nats, count


def perplexity(args, env):
    """{loss (nats a token), bits_per_byte, tokens, bytes} of arrays' val.bin, or of text.

    A row of an array has no target at its first token: bits a byte count that token at the mean.
    """
    gpt, tokenizer = GPT.from_pretrained(args.init, device=env.device), Tokenizer.load(args.init)
    if (Path(args.data) / "meta.json").exists():
        meta = load_meta(args.data)
        if meta["tokenizer_sha256"] != tokenizer.fingerprint:
            raise ValueError(f"{args.data} was tokenized with another tokenizer than the model's: "
                             "tokenize with the model's, or give --data the text itself")
        nats, count = score_arrays(gpt, args.data, env)
        tokens, n_bytes = meta["val"]["tokens"], meta["val"]["bytes"]
    else:
        texts = [text for _, text in itertools.islice(read_documents(args.data), args.limit)]
        totals = score_text(gpt, tqdm(texts, unit="document", leave=False), tokenizer, env)
        nats, count = map(sum, zip(*totals))
        tokens, n_bytes = count, sum(len(text.encode()) for text in texts)
    if not count:
        raise ValueError(f"{args.data} holds no token to score: give a folder with text")
    loss = nats / count
    result = dict(loss=loss, bits_per_byte=tokens / n_bytes * loss / math.log(2), tokens=count,
                  bytes=n_bytes)
    table([result])
    return result


# ---------------------------------------------------------------------------------------------
# question answering: a fine-tuned head, or likelihood


def plain_prompt(question):
    return f"{question.context}\nQuestion: {question.question}\nAnswer:".lstrip()  # our choice


def zero_shot_examples(questions, tokenizer, limit):
    """Rows of a plain prompt and " " + option, for a model without a head."""
    examples = []
    for q in questions:
        options = [tokenizer.encode(" " + o)[:limit - 1] for o in q.options]
        ids = tokenizer.encode(plain_prompt(q))
        room = limit - max(map(len, options))
        # cut at the start: the question stands at the end
        examples.append(finetune.Example(q, [finetune.Row(ids[-room:], options)], len(ids) > room))
    return examples


@torch.no_grad()
def log_likelihoods(gpt, batch, examples):
    """Summed log-probability of each option's tokens, a list an example."""
    hidden = gpt.hidden(batch.idx, positions=batch.positions, mask=batch.mask)
    found = []
    for b, e in enumerate(examples):
        row, at, scores = e.rows[0], len(e.rows[0].prefix), []
        for ids in row.suffixes:
            before = [len(row.prefix) - 1, *range(at, at + len(ids) - 1)]
            logits = F.linear(hidden[b, before], gpt.transformer.wte.weight).float()
            scores.append(logits.log_softmax(-1)[range(len(ids)), ids].sum().item())
            at += len(ids)
        found.append(scores)
    return found


def zero_shot(gpt, tokenizer, questions, env):
    """(examples, {"sum", "per token", "per byte": scores an example})."""
    examples = zero_shot_examples(questions, tokenizer, gpt.config.n_positions)
    total = {}
    for chunk in tqdm(list(finetune.micro_batches(examples, max_tokens=8192)), leave=False):
        with env.autocast():
            scores = log_likelihoods(gpt, finetune.collate(chunk, env.device), chunk)
        total |= {id(e): s for e, s in zip(chunk, scores)}
    total = [total[id(e)] for e in examples]
    n_tokens = [[len(ids) for ids in e.rows[0].suffixes] for e in examples]
    n_bytes = [[len(o.encode()) + 1 for o in e.question.options] for e in examples]
    divide = lambda by: [[s / n for s, n in zip(*pair)] for pair in zip(total, by)]  # noqa: E731
    return examples, {"sum": total, "per token": divide(n_tokens), "per byte": divide(n_bytes)}


def breakdown(examples, hits):
    """Accuracy by subject, kind of question and length: (name, n, accuracy, interval) rows."""
    groups = {}
    for e, hit in zip(examples, hits):
        length = max(len(r.prefix) + max(map(len, r.suffixes)) for r in e.rows)
        bucket = 2 ** math.ceil(math.log2(max(length, 16)))
        for name in (f"length <= {bucket}", e.question.subject and f"subject {e.question.subject}",
                     e.question.kind and f"kind {e.question.kind}"):
            if name:
                groups.setdefault(name, []).append(hit)
    natural = lambda pair: (pair[0].split()[0], len(pair[0]), pair[0])  # noqa: E731
    return [dict(group=name, n=len(hits), accuracy=statistics.fmean(hits),
                 ci95=finetune.wilson(statistics.fmean(hits), len(hits)))
            for name, hits in sorted(groups.items(), key=natural)]


def answer_questions(args, env):
    """The qa command: a fine-tuned head, or with --zero_shot three ways to score by likelihood."""
    split, official = find_split(args)
    questions = finetune.labeled(official, args.limit)
    if not questions:
        raise ValueError(f"the {split} split of {args.task} has no labels: use --split dev")
    if args.zero_shot:
        gpt = GPT.from_pretrained(args.init, device=env.device)
        print("note: the base model was not made to answer questions; this is its likelihood")
        examples, scores = zero_shot(gpt, Tokenizer.load(args.init), questions, env)
    else:
        model, tokenizer, limit = finetune.load_finetuned(args.init, args.task, env.device)
        examples = finetune.encode_all(questions, args.task, tokenizer, limit)
        scores = {"head": finetune.score_examples(model, examples, env)}
    results = []
    for how, given in scores.items():
        hits = finetune.correct(given, examples)
        results.append(finetune.summarise(args.task, split, len(official), examples,
                                          [statistics.fmean(hits)]) | dict(scored_by=how))
        print(f"{how}: {finetune.describe(results[-1])}")
    groups = breakdown(examples, finetune.correct(next(iter(scores.values())), examples))
    table(groups)
    if args.predictions:
        rows = finetune.predictions(next(iter(scores.values())), examples)
        finetune.write_lines(args.predictions, rows)
    return results[0] | dict(groups=groups, others=results[1:])


def find_split(args):
    """(name, questions) of --split, else of test, or of dev where test is missing or unlabeled."""
    for split in [args.split] if args.split else ["test", "dev"]:
        try:
            questions = load_qa(args.task, args.data, split)
        except FileNotFoundError:
            if split == args.split or split == "dev":
                raise
            continue
        if args.split or finetune.labeled(questions):
            break
    return split, questions


def table(rows):
    """Print dictionaries of the same keys as aligned columns."""
    def cell(value):
        if isinstance(value, list):
            return "-".join(map(cell, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    wide = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(c.ljust(w) for c, w in zip(line, wide)).rstrip())


# ---------------------------------------------------------------------------------------------
# generation

PAPER_DECODING = dict(num_beams=5, no_repeat_ngram_size=6, length_penalty=-0.5)  # BioMedLM
PAPER_NEW_TOKENS = 400  # at most, after a question


def continue_texts(gpt, tokenizer, prompts, env, max_new_tokens, batch_size=16, **how):
    """Token ids that gpt adds to each prompt (lists of ids), end-of-text and after left out."""
    order, found = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    for at in tqdm(range(0, len(order), batch_size), disable=len(order) <= batch_size, leave=False):
        chunk = order[at:at + batch_size]
        T = max(len(prompts[i]) for i in chunk)
        n_pad = [T - len(prompts[i]) for i in chunk]
        idx = [[0] * n + prompts[i] for n, i in zip(n_pad, chunk)]
        if any(n_pad):
            how["n_pad"] = torch.tensor(n_pad, device=env.device)
        with env.autocast():
            out = gpt.generate(torch.tensor(idx, device=env.device), max_new_tokens,
                               eot_id=tokenizer.eot_id, **how)[:, T:].tolist()
        for i, ids in zip(chunk, out):
            found[i] = ids[:ids.index(tokenizer.eot_id)] if tokenizer.eot_id in ids else ids
    return [found[i] for i in range(len(prompts))]


def load_for_generation(init, env):
    """(GPT with weights of env's dtype, tokenizer, ids that follow a prompt's)."""
    GPT.config_of(init)  # first: says what to give in place of a folder that holds no model
    tokenizer, dtype = Tokenizer.load(init), env.dtype
    env.dtype = torch.float32  # the weights themselves have the dtype: no autocast
    start = []
    if finetune.read_run(init).get("task") == "text":
        start = tokenizer.add_special_tokens(["<|startoftext|>"])
    return GPT.from_pretrained(init, dtype=dtype, device=env.device), tokenizer, start


def generate(args, env):
    """The generate command: prompts as one batch, texts in their order."""
    begin = time.perf_counter()
    gpt, tokenizer, start = load_for_generation(args.init, env)
    load_s, begin = time.perf_counter() - begin, time.perf_counter()
    prompts = [(tokenizer.encode(text) or [tokenizer.eot_id]) + start for text in args.prompt]
    how = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    if args.num_beams > 1:
        how = dict(num_beams=args.num_beams, length_penalty=args.length_penalty)
    outputs = continue_texts(gpt, tokenizer, prompts, env, args.max_new_tokens,
                             **PAPER_DECODING if args.paper else how)
    seconds = time.perf_counter() - begin
    texts = [tokenizer.decode(ids) for ids in outputs]
    for prompt, text in zip(args.prompt, texts):
        print(f"{prompt}\033[1m{text}\033[0m" if sys.stdout.isatty() else prompt + text)
    n_new = sum(map(len, outputs))
    print(f"loaded in {load_s:.1f} s; {n_new} tokens in {seconds:.1f} s, {n_new / seconds:.1f} a "
          f"second; peak memory {memory_gib(env.device):.2f} GiB", file=sys.stderr)
    return dict(texts=texts, tokens=n_new, seconds=seconds, load_s=load_s,
                peak_memory_gib=memory_gib(env.device))


# ---------------------------------------------------------------------------------------------
# audit: are the numbers of generated answers made up?

UNITS = ("%|percent|mg/dl|mg/kg|mg|mcg|µg|μg|ug|kg|g/dl|g|ml|dl|l|mmol/l|mmol|iu|units?|mm ?hg|mm|"
         "cm|years?|months?|weeks?|days?|hours?|hrs?|minutes?|mins?|seconds?|times|cases|people|"
         "patients|calories|degrees")
# not the 53 of p53, nor the 6 of IL-6
NUMBER = re.compile(r"(?<![\w.])(?<![a-zA-Z]-)(\d+(?:,\d{3})*(?:\.\d+)?)"
                    rf"(?:[ -]?({UNITS})(?![\w/]))?", re.IGNORECASE)


def numbers_in(text):
    """[(value, unit or "")] of a text: "1,500 mg" is (1500.0, "mg"), "2 years" (2.0, "year")."""
    same = {"percent": "%", "mcg": "µg", "ug": "µg", "μg": "µg", "hr": "hour", "min": "minute"}
    found = []
    for value, unit in NUMBER.findall(text):
        unit = unit.lower().removesuffix("s")
        found.append((float(value.replace(",", "")), same.get(unit, unit)))
    return found


def verdict(number, known):
    """supported: known has the value (with its unit, or one side names none); contradicted: known
    has that unit with other values only; unsupported: neither."""
    value, unit = number
    if any(v == value and (u == unit or not u or not unit) for v, u in known):
        return "supported"
    return "contradicted" if unit and any(u == unit for _, u in known) else "unsupported"


def perturb(text, seed):
    """text with one of its numbers replaced by another of as many digits; None without numbers."""
    places = list(re.finditer(r"(?<![\w.,])\d+(?![\w.,]*\d)", text))
    if not places:
        return None
    rng = random.Random(seed)
    place = rng.choice(places)
    other = place[0]
    while other == place[0]:
        other = rng.choice("123456789") + "".join(rng.choices("0123456789", k=len(place[0]) - 1))
    return text[:place.start()] + other + text[place.end():]


def audit_row(name, answers, sources):
    """Counts over all numbers of answers, each judged by its own question's source."""
    verdicts = [verdict(n, numbers_in(source)) for answer, source in zip(answers, sources)
                for n in numbers_in(answer)]
    shares = {k: verdicts.count(k) / len(verdicts) if verdicts else math.nan
              for k in ("supported", "contradicted", "unsupported")}
    return dict(answers=name, n=len(answers), with_numbers=sum(map(bool, map(numbers_in, answers))),
                numbers=len(verdicts), **shares)


def audit_numbers(args, env):
    """Numbers of generated answers against question, context and reference; then the model's taste.

    The second row is the control: answers to other questions, whose agreement is chance. The last
    table needs no generation: how often a true text is likelier than with one number changed.
    """
    questions = load_qa(args.task, args.data, args.split or "test")
    questions = [q for q in finetune.labeled(questions, args.limit) if q.target]
    gpt, tokenizer, start = load_for_generation(args.init, env)
    room = gpt.config.n_positions - args.max_new_tokens - 1
    if room < 1:
        raise ValueError(f"--max_new_tokens {args.max_new_tokens} leaves no room for a question: "
                         f"use less than {gpt.config.n_positions - 1}")
    prompts = [tokenizer.encode(q.question if start else plain_prompt(q))[-room:] + start
               for q in questions]
    outputs = continue_texts(gpt, tokenizer, prompts, env, args.max_new_tokens,
                             **PAPER_DECODING if args.paper else dict(temperature=0.0))
    answers = [tokenizer.decode(ids) for ids in outputs]
    sources = [f"{q.question}\n{q.context}\n{q.target}" for q in questions]
    references = [q.target for q in questions]
    contexts = [f"{q.question}\n{q.context}" for q in questions]
    rows = [audit_row("generated", answers, sources),
            audit_row("another question's reference", references[1:] + references[:1], sources),
            audit_row("reference, against the question alone", references, contexts)]
    table(rows)
    pairs = [(r, p) for i, r in enumerate(references) if (p := perturb(r, i)) is not None]
    if not pairs:
        raise ValueError(f"no reference answer of {args.data} holds a number: nothing to perturb")
    true, false = (score_text(gpt, texts, tokenizer, env) for texts in zip(*pairs))
    wins = statistics.fmean(t[0] < f[0] for t, f in zip(true, false))
    taste = dict(texts_with_numbers=len(pairs), true_preferred=wins,
                 ci95=finetune.wilson(wins, len(pairs)),
                 nats_gap=statistics.fmean(f[0] - t[0] for t, f in zip(true, false)))
    print("a true text against itself with one number changed (chance 0.5):")
    table([taste])
    return dict(numbers=rows, perturbed=taste, answers=answers)


# ---------------------------------------------------------------------------------------------
# curves


def read_log(run):
    """Rows of a run's log.jsonl, as dictionaries."""
    path = Path(run) / "log.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: give folders that train.py or finetune.py wrote")
    return [json.loads(line) for line in path.read_text().splitlines()]


PANELS = {"loss": "loss (nats a token), validation dashed", "val_bits_per_byte":
          "validation, bits a byte", "lr": "learning rate", "grad_norm": "gradient norm",
          "tokens_per_s": "tokens a second", "dev": "fine-tuning: accuracy on dev"}


def curves(args, env):
    """What log.jsonl holds of each run, by step (rows of finetune.py: by epoch), as a PNG.

    Loss compares runs of one tokenizer only, bits a byte any. Needs matplotlib.
    """
    logs = {run: read_log(run) for run in args.runs}
    try:
        import matplotlib
    except ImportError:
        raise ValueError("curves needs: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = {key: title for key, title in PANELS.items()
              if key == "loss" or any(key in row for rows in logs.values() for row in rows)}
    figure, axes = pyplot.subplots(math.ceil(len(panels) / 2), 2, figsize=(11, 7), dpi=100,
                                   layout="constrained", squeeze=False)
    last = {}

    def draw(ax, rows, key, label, **style):
        axis = "step" if any("step" in row for row in rows) else "epoch"
        if axis == "epoch":  # several seeds pass the same epochs
            style |= dict(marker=".", linestyle="")
        points = [(row[axis], row[key]) for row in rows if axis in row and key in row]
        if points:
            ax.plot(*zip(*points), label=label, **style)
            if "loss" in key:
                last[label] = points[-1][1]

    for ax, (key, title) in zip(axes.flat, panels.items()):
        for i, (run, rows) in enumerate(logs.items()):
            draw(ax, rows, key, run, color=f"C{i}", linewidth=1)
            if key == "loss":
                draw(ax, rows, "val_loss", f"{run}, validation", color=f"C{i}", linestyle="--",
                     marker="o", markersize=3)
        ax.set(title=title, xlabel="epoch" if key == "dev" else "step")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(args.out, metadata={"Software": None})
    table([dict(run=run, last_loss=loss) for run, loss in last.items()])
    return dict(last=last)


# ---------------------------------------------------------------------------------------------
# tokenizer: fragmentation by specialty

# BioMedLM: the words of the paper's table 3
TABLE_3 = ["chromatography", "cytotoxicity", "ECG", "GATA", "Immunohistochemistry", "myocardium",
           "nanoparticles", "photosynthesis", "probiotic", "thrombin"]

SPECIALTIES = {name: words.split() for name, words in {
    "oncology": """adenocarcinoma carcinoma lymphoma melanoma metastasis metastatic chemotherapy
        radiotherapy glioblastoma leukemia myeloma sarcoma neuroblastoma mesothelioma angiogenesis
        oncogene neoadjuvant cisplatin tumorigenesis cholangiocarcinoma retinoblastoma""",
    "cardiology": """myocardial infarction arrhythmia tachycardia bradycardia fibrillation
        stenosis atherosclerosis cardiomyopathy ischemia thrombosis angioplasty echocardiography
        hypertension endocarditis pericarditis defibrillator troponin ventricular
        electrocardiogram stent""",
    "genetics": """genome genotype phenotype allele heterozygous homozygous polymorphism mutation
        chromosome autosomal transcriptome methylation exome haplotype epigenetic microRNA
        telomere aneuploidy missense penetrance mitochondrial""",
    "neurology": """epilepsy seizure dementia Parkinson Alzheimer neuropathy sclerosis
        encephalopathy hippocampus cerebellum dopaminergic aphasia ataxia migraine meningitis
        myelin neurotransmitter neurodegenerative dyskinesia astrocytes polyneuropathy""",
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
        inclisiran semaglutide tirzepatide remdesivir molnupiravir nirmatrelvir lecanemab
        aducanumab teprotumumab zolgensma alkaptonuria ochronosis fibrodysplasia
        mucopolysaccharidosis lymphangioleiomyomatosis pseudoxanthoma cystinosis
        abetalipoproteinemia hidradenitis chikungunya melioidosis naegleria tularemia
        trichothiodystrophy ehrlichiosis""",
}.items()}


def pieces_of(tokenizer, word):
    """A word's pieces inside a sentence, where a space stands before it (and is not shown)."""
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(" " + word)]
    return [piece for piece in (pieces[0].removeprefix(" "), *pieces[1:]) if piece]


def markdown(header, rows):
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def fragmentation_rows(groups, tokenizers):
    """[group, terms, then whole, one or two pieces, mean pieces of each tokenizer] a group."""
    for group, words in filter(lambda item: item[1], groups.items()):
        row = [group, len(words)]
        for tokenizer in tokenizers.values():
            lengths = [len(pieces_of(tokenizer, word)) for word in words]
            whole, two = (sum(n <= most for n in lengths) / len(words) for most in (1, 2))
            row += [f"{whole:.0%}", f"{two:.0%}", f"{sum(lengths) / len(words):.2f}"]
        yield row


def read_text(path, tokenizers):
    """Words, bytes, {name: tokens} and the count of each listed term in the text at path."""
    listed = {word.lower() for words in SPECIALTIES.values() for word in words}
    n_words, n_bytes, tokens, seen = 0, 0, Counter(), Counter()
    for block in read_blocks(input_files([path]), progress=True):
        text = block_text(*block)
        words = text.split()
        n_words, n_bytes = n_words + len(words), n_bytes + len(text.encode())
        seen.update(w for w in (word.lower().strip(".,;:()[]\"'") for word in words) if w in listed)
        for name, tokenizer in tokenizers.items():
            tokens[name] += len(tokenizer.encode(text))
    return n_words, n_bytes, tokens, seen


def fragmentation(args, _env):
    """Print table 3 of the paper, how the listed terms break, and, with --text, tokens per word and
    bytes per token there, and how terms break by how often the text has them."""
    names = filter(None, (args.tokenizer, args.against))
    tokenizers = {name.rstrip("/").split("/")[-1]: load_named(name) for name in names}
    markdown(["word", *tokenizers],
             ([word, *("/".join(pieces_of(one, word)) for one in tokenizers.values())]
              for word in TABLE_3))
    columns = [f"{name}: {head}" for name in tokenizers for head in ("whole", "≤ 2", "pieces")]
    ten = [word for name, words in SPECIALTIES.items() if "rare" not in name for word in words]
    groups = SPECIALTIES | {"the ten together": ten}
    markdown(["specialty", "terms", *columns], fragmentation_rows(groups, tokenizers))
    if not args.text:
        return
    n_words, n_bytes, tokens, seen = read_text(args.text, tokenizers)
    markdown(["tokenizer", "words", "tokens", "tokens per word", "bytes per token"],
             ([name, f"{n_words:,}", f"{tokens[name]:,}", f"{tokens[name] / n_words:.3f}",
               f"{n_bytes / tokens[name]:.3f}"] for name in tokenizers))
    groups = {}
    for least, most, name in ((100, 1e9, "100 or more"), (10, 99, "10 to 99"), (1, 9, "1 to 9"),
                              (0, 0, "never")):
        groups[name] = [word for words in SPECIALTIES.values() for word in words
                        if least <= seen[word.lower()] <= most]
    markdown(["times in the text", "terms", *columns], fragmentation_rows(groups, tokenizers))


# ---------------------------------------------------------------------------------------------
# the command line


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    positive = finetune.positive

    def command(name, text, init="run or Hugging Face GPT-2 folder"):
        p = commands.add_parser(name, help=text, description=text)
        p.add_argument("--json", metavar="FILE", help="also write the result here (default: none)")
        if init:
            p.add_argument("--init", required=True, metavar="DIR", help=init)
            p.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
            p.add_argument("--dtype", choices=["float32", "bfloat16"],
                           help="(default: bfloat16 on cuda, float32 on a CPU)")
        return p.add_argument

    def questions(add, tasks):
        add("--task", choices=tasks, required=len(tasks) > 2, default="text", help="which set")
        add("--data", required=True, metavar="DIR", help="folder with the official files")
        add("--split", choices=["train", "dev", "val", "test"], help="(default: test, else dev)")
        add("--limit", type=positive, help="N questions, evenly over the split (default: all)")

    add = command("perplexity", "nats a token and bits a byte")
    add("--data", required=True, metavar="DIR_OR_TEXT",
        help="folder of arrays (its val.bin), or a text file or folder: each document on its own")
    add("--limit", type=positive, help="only the first N documents of text (default: all)")
    add = command("qa", "accuracy on a question set", "folder of finetune.py; --zero_shot: any")
    questions(add, sorted(set(finetune.KINDS) - {"text"}))
    add("--zero_shot", action="store_true", help="score options by likelihood (default: off)")
    add("--predictions", metavar="FILE", help="also write a JSON line a question (default: none)")
    add = command("numbers", "audit of made-up numbers in generated answers")
    questions(add, ["text", "pubmedqa"])
    add("--max_new_tokens", type=positive, default=128, help="of an answer at most (default: 128)")
    add("--paper", action="store_true", help="BioMedLM's beams (default: greedy)")
    add = command("generate", "continue a text")
    add("--prompt", required=True, nargs="+", help="one or several texts")
    add("--max_new_tokens", type=positive, default=64, help="tokens to add at most (default: 64)")
    add("--temperature", type=float, default=0.8, help="0 = greedy (default: 0.8)")
    add("--top_k", type=int, help="sample among the k likeliest tokens (default: all)")
    add("--top_p", type=float, help="sample within this probability mass (default: all)")
    add("--num_beams", type=int, default=1, help="beam search instead of sampling (default: 1)")
    add("--length_penalty", type=float, default=1.0, help="exponent, beams only (default: 1.0)")
    add("--seed", type=int, default=1, help="of sampling (default: 1)")
    add("--paper", action="store_true",
        help="BioMedLM's decoding: 5 beams, no repeated 6-gram, length penalty -0.5 (default: off)")
    add = command("curves", "loss, rate, gradient norm and speed of runs as a picture", init=None)
    add("runs", nargs="+", metavar="RUN", help="folders with log.jsonl")
    add("--out", default="curves.png", help="picture to write (default: curves.png)")
    add = command("tokenizer", "how biomedical words break, as Markdown tables", init=None)
    add("--tokenizer", required=True, metavar="DIR", help="folder of a tokenizer, or gpt2")
    add("--against", metavar="DIR", help="folder of a second one, or gpt2 (default: none)")
    add("--text", metavar="PATH", help="file or folder of text to measure on (default: none)")
    return parser.parse_args()


def main():
    args = parse_args()
    env = finetune.Env(getattr(args, "device", None), getattr(args, "dtype", None))
    commands = dict(perplexity=perplexity, qa=answer_questions, numbers=audit_numbers,
                    generate=generate, curves=curves, tokenizer=fragmentation)
    result = commands[args.command](args, env)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"eval.py: error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
