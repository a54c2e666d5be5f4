"""data.py: loader, arrays, question sets, extraction, downloads from a faulty server."""

import gzip
import hashlib
import http.server
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import data
from data import (
    FILES,
    Question,
    cloze,
    download,
    extract,
    load_meta,
    load_qa,
    tokenize,
    train_batches,
    val_batches,
)
from tokenizer import (
    ALPHABET,
    Tokenizer,
    hash64,
    read_documents,
    read_records,
    text_files,
    train_bpe,
)

DATA = ROOT / "data.py"

# ---------------------------------------------------------------------------------------------
# small inputs, written here


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer():
    """A folder's name: a few tokens more than the bytes."""
    Tokenizer.from_merges(train_bpe({" dose": 2, " drug": 2}, 300)).save("tokenizer")
    return "tokenizer"


def write(path, body):
    """A file in a folder that is made where missing: bytes as they are, text compressed if the
    name says so. Returns its Path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(body, str):
        body = body.encode()
        if path.suffix == ".gz":
            body = gzip.compress(body)
    path.write_bytes(body)
    return path


def lines(rows):
    return "\n".join(map(json.dumps, rows))


def write_text(path, records):
    """Text as extract leaves it; a document without text is deleted."""
    rows = [{"id": ident} | ({"deleted": True} if text is None else {"text": text})
            for ident, text in records]
    write(path, lines(rows))


def write_arrays(tokenizer, train, val=(0,), vocab_size=2**16):
    """Token arrays in the test's folder, as tokenize would leave them."""
    t = Tokenizer.load(tokenizer)
    t.save(".")
    meta = {"vocab_size": vocab_size, "eot_id": t.eot_id, "tokenizer_sha256": t.fingerprint}
    for split, ids in ("train", train), ("val", val):
        raw = np.asarray(ids, np.uint16).tobytes()
        write(f"{split}.bin", raw)
        meta[split] = {"tokens": len(ids), "sha256": hashlib.sha256(raw).hexdigest()}
    write("meta.json", json.dumps(meta))


def citation(pmid, title="A title", abstract="An abstract.", more="", notes="", ids=""):
    if abstract and "<A" not in abstract:
        abstract = f"<AbstractText>{abstract}</AbstractText>"
    return (
        f'<PubmedArticle><MedlineCitation><PMID Version="1">{pmid}</PMID><Article>'
        f"<ArticleTitle>{title}</ArticleTitle><Abstract>{abstract}</Abstract>"
        f"{more}</Article>{notes}</MedlineCitation><PubmedData>"
        f"<ArticleIdList>{ids}</ArticleIdList></PubmedData></PubmedArticle>")


def pubmed_file(path, *items):
    body = '<?xml version="1.0" encoding="utf-8"?><!DOCTYPE PubmedArticleSet SYSTEM "pubmed.dtd">'
    return write(path, f"{body}<PubmedArticleSet>{' '.join(items)}</PubmedArticleSet>")


def texts(out="out"):
    return dict(read_documents(out))


def records(out):
    """All files' records in one dictionary: the last one of an id stands."""
    return dict(itertools.chain.from_iterable(map(read_records, text_files(out))))


def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(message, function, *args, **kwargs):
    """It raises one of the two errors that a command prints in a line, and nothing else."""
    with pytest.raises((ValueError, OSError), match=message):
        function(*args, **kwargs)


# ---------------------------------------------------------------------------------------------
# the loader


def test_training_order(tokenizer):
    """A row twice or never in an epoch; an order tied to ranks, to the micro-batch or to where a
    run went on, or the same in every epoch or for every seed; another order than numpy's frozen
    one, so that a resumed run repeats and skips rows; a target that isn't the next token; an id
    above 2**15 read as negative; another tokenization's ids, or a crash, in a run that was started
    before it."""
    assert data.epoch_order(9, seed=17, epoch=3).tolist() == [7, 8, 0, 3, 2, 5, 1, 4, 6]
    order = [row for epoch in range(3) for row in data.epoch_order(60, 4, epoch)]
    for world_size, micro_batch, start in (1, 1, 0), (4, 7, 12):
        write_arrays(tokenizer, 2**15 + np.arange(60 * 8 + 5))
        ranks = [train_batches(".", 8, micro_batch, 4, start, rank, world_size)
                 for rank in range(world_size)]
        found = []
        for _ in range(5):
            for x, y in map(next, ranks):
                assert x.dtype == y.dtype == torch.int64
                assert (y[:, :-1] == x[:, :-1] + 1).all() and (y[:, -1] == -100).all()
                found += ((x[:, 0] - 2**15) // 8).tolist()
            Path("train.bin").unlink(missing_ok=True)
        assert found == order[start : start + len(found)]


def test_validation_rows(tokenizer):
    """A dropped short last row; ranks with unequal numbers of batches (FSDP would hang); max_tokens
    that scores only the array's beginning, or other rows with more ranks."""
    write_arrays(tokenizer, [0] * 8, 2**15 + np.arange(8 * 1500 + 3))

    def targets(world_size, max_tokens=None):
        ranks = [list(val_batches(".", 8, 2, r, world_size, max_tokens))
                 for r in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        return sorted(torch.cat([y[y >= 0] - 2**15 for rank in ranks for _, y in rank]).tolist())

    some = targets(1, 8 * 99 + 1)
    assert len(some) == 700 and 5000 < np.mean(some) < 7000
    for world_size in (1, 2, 4):
        assert targets(world_size) == [t for t in range(12_003) if t % 8]
        assert targets(world_size, 8 * 99 + 1) == some


def test_end_of_text_targets_can_be_ignored(tokenizer):
    """ignore_eot that drops other targets, or the inputs with them, or serves one loader only."""
    eot = Tokenizer.load(tokenizer).eot_id
    write_arrays(tokenizer, *[[1, eot, 2, 3] * 4] * 2)
    for ignore, target in (True, -100), (False, eot):
        for loader in (train_batches(".", 16, 1, seed=0, ignore_eot=ignore),
                       val_batches(".", 16, 1, ignore_eot=ignore)):
            x, y = next(loader)
            assert (x == eot).sum() == 4
            assert y[0].tolist() == [target, 2, 3, 1] * 3 + [target, 2, 3, -100]


def test_bad_arrays_are_refused_with_the_mend(tokenizer):
    """Training for days on a cut array, another tokenizer, or ids beyond the vocabulary."""
    write_arrays(tokenizer, [0] * 16, [300] * 16, vocab_size=300)
    refused("less than one sequence", next, train_batches(".", 128, 1, seed=0))
    refused("beyond the vocabulary of", load_meta, ".", True)
    refused("val.bin holds id 300, beyond the vocabulary", next, val_batches(".", 8, 2))
    path = Path("val.bin")
    raw = path.read_bytes()
    path.write_bytes(raw[:-2] + b"\0\0")
    load_meta(".")  # only verify reads the whole array
    refused("sha256", load_meta, ".", True)
    for other in raw[:-2], raw * 2:
        path.write_bytes(other)
        refused("cut or replaced.*tokenize", load_meta, ".")
    path.write_bytes(raw)
    Tokenizer.from_merges([]).save(".")
    refused("is not the one that made the arrays", load_meta, ".")
    refused("data.py tokenize", load_meta, "nothing")


def test_memory_stays_flat(tokenizer):
    """A memmap kept open: its touched pages count as resident and grow with every batch."""
    write_arrays(tokenizer, np.zeros(20_000_000, np.uint16))
    pages = []
    for _ in itertools.islice(train_batches(".", 1024, 16, seed=0), 400):
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert pages[-1] - pages[0] < 3000, "of the array's 9765"


# ---------------------------------------------------------------------------------------------
# extract



# PMID|title|abstract|rest of <Article>|after it|ids; or XML as it is. Indented lines go on.
CITATIONS = """1|The <i>p53</i> gene &amp; H<sub>2</sub>O|
  &lt;5% of 10<sup>5</sup> β-cells     in 東京
2|A title|<AbstractText Label="A">To see.</AbstractText><AbstractText/>
  <AbstractText>Seen.</AbstractText>
3|A title|
4|A title|An abstract.|||<ArticleId IdType="pmc">PMC4</ArticleId>
5|A title|An abstract.|||</ArticleIdList><Reference><ArticleIdList>
  <ArticleId IdType="pmc">PMC4</ArticleId></ArticleIdList></Reference><ArticleIdList>
6|A title|TNF-&alpha;
<PubmedBookArticle><BookDocument><PMID>7</PMID><ArticleTitle>A chapter</ArticleTitle>
  <Abstract><AbstractText>On books.</AbstractText>
  </Abstract></BookDocument></PubmedBookArticle>
<PubmedBookArticle><BookDocument><PMID>8</PMID><Book><BookTitle>A book</BookTitle></Book>
  <Abstract><AbstractText>On books.</AbstractText></Abstract>
  </BookDocument></PubmedBookArticle>
9|First
9|Last
<DeleteCitation><PMID>11</PMID><PMID Version="2">14</PMID></DeleteCitation>
<DeleteDocument><PMID>12</PMID></DeleteDocument>
16|[Not Available].|An abstract.|<VernacularTitle>Ein Titel</VernacularTitle>
18|[In Process Citation]
20|A title|An abstract.|<PublicationType>Retracted Publication</PublicationType>
21|A title|An abstract.|<PublicationType>Retraction of Publication</PublicationType>
22|A title|An abstract.|<PublicationType>Retraction Notice</PublicationType>
23|A title|An abstract.|<PublicationType>Published Erratum</PublicationType>
24|A title|An abstract.|<PublicationType>Expression of Concern</PublicationType>
25|A title|An abstract.||<CommentsCorrections RefType="RetractionIn"/>
26|A title|An abstract.||<CommentsCorrections RefType="RetractionOf"/>
27|A title|An abstract.||<CommentsCorrections RefType="ErratumFor"/>
28|A title|An abstract.||<CommentsCorrections RefType="ExpressionOfConcernFor"/>
29|Retracted: A title
30|A title|An abstract.||<CommentsCorrections RefType="ErratumIn"/>
31|A title|Retracted: not this."""
JSON_LINES = r"""{"id": "13", "title": "T", "abstract": ""}
{"pmid": 15, "title": " T", "abstract": "A "}
{"id": 0, "title": null, "abstract": "A\ud800"}
{"pmcid": "PMC1", "text": "Keep"}
{"text": "Keep", "meta": {"pile_set_name": "PubMed Central"}}
{"title": "no id"}
{"text": "Drop", "meta": {"pile_set_name": "Enron Emails"}}"""
# A document whose record gives no id has the hash of its text for one.
EXPECTED = r"""{
"0": "A\ufffd", "1": "The p53 gene & H2O\n<5% of 10^5 β-cells in 東京",
"2": "A title\nTo see. Seen.", "3": null, "4": "A title\nAn abstract.",
"5": "A title\nAn abstract.", "6": "A title\nTNF-α", "7": "A chapter\nOn books.",
"8": "A book\nOn books.", "9": "Last\nAn abstract.",
"10": "A title\nAn abstract.", "11": null, "12": null, "13": null, "14": null, "15": "T\nA",
"16": "Ein Titel\nAn abstract.", "17": "A title\nAn abstract.", "18": "An abstract.",
"19": "A title\nAn abstract.", "20": null, "21": null, "22": null, "23": null, "24": null,
"25": null, "26": null, "27": null, "28": null, "29": null, "30": "A title\nAn abstract.",
"31": "A title\nRetracted: not this.", "PMC1": "Keep",
"567cfe458bccbe99": "Keep", "a1724b79b0cf2b07": "An article\u2028of one line"}"""


def test_pubmed_json_lines_and_txt(monkeypatch):
    """Text lost at inline tags, labels, entities (in the first 128 KiB only), other scripts; books,
    no abstract. The baseline's text of a record that an update drops, of an earlier record, of a
    deleted or retracted one, or that notice itself. "[Not Available]" for a title; a book's title,
    a null, an id 0, a `pmid` lost. The Pile's other parts; a document without a stable id."""
    rows = [row if row[0] == "<" else citation(*row.split("|"))
            for row in re.sub("\n  ", "", CITATIONS).split("\n")]
    pubmed_file("p20n0999.xml", *map(citation, range(1, 32)))
    pubmed_file("p20n1000.xml.gz", rows[0], " " * 2**17, *rows[1:])
    write("p20n1001.jsonl", JSON_LINES)
    write("own.txt", "An article\u2028of one line\n")
    expected = json.loads(EXPECTED)
    monkeypatch.setattr(data, "RECORD_LIMIT", 132_000)  # less than the file, more than a record
    extract(["."], "out")
    assert records("out") == expected
    extract(["."], "out", skip_pmc=True)  # in the place of the other text
    assert records("out") == expected | {"4": None}


ARTICLE = """<article article-type="{kind}" xmlns:mml="m"><front><article-meta>{ids}
<title-group><article-title>On <italic>mice</italic></article-title></title-group>
<abstract><p>We saw mice.</p></abstract><abstract abstract-type="graphical"><p>IMAGE</p></abstract>
<abstract abstract-type="teaser"><p>TEASER</p></abstract><abstract abstract-type="toc"><p>TOC</p>
</abstract><abstract abstract-type="precis"><p>PRECIS</p></abstract><kwd-group><kwd>KEYWORD</kwd>
</kwd-group></article-meta></front><body><sec><label>1.</label><title>Methods</title>
<p>All 40<sup><xref ref-type="bibr">3</xref></sup> grew [<xref ref-type="bibr">4</xref>]
 in vivo<xref ref-type="bibr">7</xref>,<xref ref-type="bibr">8</xref>,
 by <inline-formula><alternatives><tex-math>\\documentclass{{a}}
\\begin{{document}}$x^2$\\end{{document}}</tex-math><mml:math><mml:mi>x</mml:mi></mml:math>
</alternatives></inline-formula>.<fn><p>FOOT</p></fn></p><table-wrap><label>Table 1</label>
<caption><p>Ages</p></caption><alternatives><graphic/>
<table><tr><td/><th>Drug</th><td/></tr><tr><td><p>n</p></td><td>5</td></tr></table>
<table><tr><td/><th>Placebo</th></tr><tr><td>n</td><td>6</td></tr></table></alternatives>
<table-wrap-foot><fn><label>a</label><p>P &lt; 0.05</p></fn></table-wrap-foot></table-wrap></sec>
<sec sec-type="supplementary-material"><p>SUPPLEMENT</p></sec></body><back><ack><p>THANKS</p></ack>
<glossary><def-item><term>BMI</term><def><p>body mass index</p></def></def-item></glossary>
<ref-list><ref>REFERENCE</ref></ref-list></back><floats-group><fig><label>Fig. 1</label><caption>
<p>A mouse</p></caption></fig></floats-group><sub-article><body><p>REVIEW</p></body></sub-article>
</article>"""
ARTICLE_TEXT = """On mice
We saw mice.
1. Methods
All 40 grew [4] in vivo, by $x^2$.
Table 1 Ages
| Drug
n | 5
| Placebo
n | 6
a P < 0.05
Fig. 1 A mouse
BMI: body mass index"""


def article(kind="research-article", **ids):
    ids = [f'<article-id pub-id-type="{kind}">{ident}</article-id>' for kind, ident in ids.items()]
    return ARTICLE.format(kind=kind, ids="".join(ids))


def test_jats():
    """A part of an article lost, or one kept that is none (in capitals); a correction taken for an
    article, a retracted one kept; ids of PubMed, of PMC with or without version, of the file's
    name; bulk articles mixed up; one in OAI's wrapper; an abstract without a body, or the other way
    round, dropped."""
    write("PMC12.1.xml", article())
    notices = ("correction", "retraction", "partial-retraction", "expression-of-concern",
               "retracted-article")
    forward = '<related-article related-article-type="retraction-forward"/><title-group>'
    front, body, back = re.split("(?s)(<body>.*</body>)(?=<back>)", article(pmid=14))
    no_text = re.sub("(?s)<abstract>.*", "</article-meta></front>", front)
    bulk = [article(pmid=11, pmc=6), article(pmcid="PMC5.1"),
            *(article(kind, pmc=7) for kind in notices),
            article(pmc=7).replace("<title-group>", forward),
            no_text.replace(">14<", ">15<") + "</article>",
            front + back, f"<article>{body}</article>"]
    write("bulk.xml.gz", f"<articles xmlns:mml='m'>{''.join(bulk)}</articles>")
    wrapped = article(pmid=13).replace("<article ", "<article xmlns='https://jats.nlm.nih.gov/' ")
    write("PMC77.xml", f"<OAI-PMH xmlns='oai'><GetRecord>{wrapped}</GetRecord></OAI-PMH>")
    extract(["PMC77.xml", "PMC12.1.xml", "bulk.xml.gz"], "out", workers=2)
    lines = ARTICLE_TEXT.split("\n")
    outside, inside = "\n".join(lines[:2] + lines[-2:]), "\n".join(lines[2:-2])
    expected = dict.fromkeys(("PMC12", "PMC6", "13", "PMC5"), ARTICLE_TEXT)
    assert texts() == expected | {"14": outside, f"{hash64(inside):016x}": inside}


def test_numbers_and_tables():
    """A power, fraction or citation that reads as another number or word: 10<sup>5</sup> as 105; a
    formula read twice or not at all. A dose under the drug's name, since a rowspan or colspan
    covers its place; a span beyond the table, or one that is no number; a note's letter read as a
    part of its cell."""
    for text, expected in {
        "10<sup>5</sup> and 10<sup>−6</sup>": "10^5 and 10^-6",
        "11.0<sup>1</sup>, 10<i>2</i><sup>1.5</sup>": "11.0^1, 102^1.5",
        "L<sup>-1</sup> (kg·d)<sup>–1</sup>": "L^-1 (kg·d)^-1",
        "log2<sub>10</sub>": "log2_10",
        "10<i><sup>5</sup></i>": "10^5",
        "m<sup>2</sup> R<sup>2</sup> Ca<sup>2+</sup>": "m2 R2 Ca2+",
        "H<sub>2</sub>O T<sub>max</sub> 2<sup>nd</sup>": "H2O Tmax 2nd",
        "SO<sub>4</sub><sup>2−</sup>": "SO4^2−",
        "<mfrac><mn>1</mn><mn>2</mn></mfrac>": "(1)/(2)",
        "<msup><mn>10</mn><mrow><mo>−</mo><mn>3</mn></mrow></msup>": "10^-3",
        "<msup><mi>e</mi><mrow><mi>k</mi><mi>t</mi></mrow></msup>": "e^kt",
        "<msup><mn>2</mn><mrow><mi>n</mi><mo>+</mo><mn>1</mn></mrow></msup>": "2^(n+1)",
        "<msqrt><mi>x</mi><mo>+</mo><mn>1</mn></msqrt>": "sqrt(x+1)",
        "<mfenced open='['><mn>1</mn><mn>2</mn></mfenced>": "[1,2)",
        "<munderover><mo>∑</mo><mn>1</mn><mn>10</mn></munderover>": "∑_1^10",
        "[<xref ref-type='bibr'>15</xref><xref ref-type='bibr'>16</xref>]": "[15, 16]",
        "5<sup><xref ref-type='fn'>1</xref></sup> mg": "5 mg",
        "6<xref ref-type='table-fn'>a</xref> mg": "6 mg",
        "<table><tr><td colspan='99'>E</td><td>3</td></tr></table>":
            "E" + " |" * data.LARGEST_SPAN + " 3",
        "<i>Atrx<sup>null</sup></i> CD4<sup>hi</sup>": "Atrx^null CD4^hi",
        "<math><semantics><mi>x</mi><annotation-xml>y</annotation-xml></semantics></math>": "x",
        "<alternatives><tex-math>\\begin{document}$$ $$\\end{document}</tex-math><graphic/>"
        "<math><mi>y</mi></math><textual-form>y</textual-form></alternatives>": "y",
        "<alternatives><graphic/><textual-form>z</textual-form></alternatives>": "z",
        """<table><thead><tr><th rowspan="2">Drug</th><th colspan="2">Dose<sup>a, b</sup></th>
        <th>P</th></tr><tr><th>low</th><th>high</th></tr></thead><tbody><tr><td rowspan="9">A</td>
        <td colspan="x">5<sup><i>b</i></sup></td><td>10<sup>5</sup></td></tr><tr><td/>
        <td>m<sup>R</sup></td></tr></tbody><tbody><tr><td rowspan="0">B</td><td>6</td></tr>
        </tbody></table><table><tr><td rowspan="2">C</td><td>7</td></tr><tr><td>8</td></tr>
        </table><table><tr><td rowspan="2" colspan="2">D</td><td>1</td></tr><tr><td>2</td></tr>
        </table>""": "Drug | Dose | | P\n| low | high\nA | 5 | 10^5\n| | m^R\nB | 6\nC | 7\n| 8\n"
        "D | | 1\n| | 2",
    }.items():
        mml = text.replace("<m", "<mml:m").replace("</m", "</mml:m")
        body = ET.fromstring(f"<article xmlns:mml='m'><body><p>{mml}</p></body></article>")
        assert data.jats_document(body, "a.xml")[1] == expected


def test_files_beside_the_data():
    """A file list or an article's other forms as documents of their own, or as damaged files; a
    note of the user's left out, or a file that is given by its name."""
    for name in ("README.txt", "a/oa_comm.filelist.txt", "a/PMC1.1.txt", "a/PMC1.1.json",
                 "a/notes.txt", "LICENSE.txt"):
        write(f"raw/{name}", name)
    write("raw/a/PMC1.1.xml.gz", article(pmc=1))
    extract(["raw"], "out")
    assert sorted(texts().values()) == [ARTICLE_TEXT, "a/notes.txt"]
    extract(["raw/README.txt"], "named")
    assert [*texts("named").values()] == ["README.txt"]


def test_what_is_bad_is_skipped(capsys):
    """A file lost for a record without PMID, good text for a damaged file beside it; a bad one
    unnamed, or an error though it is one of a hundred; the FIFO of a folder read, which never ends;
    a write error (a full disk, say) reported as a damaged input; a bar in a log file."""
    bad = citation(1).replace("PMID", "ID")
    pubmed_file("a.xml", bad, *map(citation, range(2, 102)))
    for i in range(500, 603):
        pubmed_file(f"raw/{i}.xml", citation(i), *["<PubmedArticle>"] * (i == 501))
    os.mkfifo("raw/503.x.xml")
    counts = extract(["a.xml", "raw"], "out")
    assert counts["bad records"] == counts["damaged files"] == 1
    assert len(texts()) == 100 + 103 and "501" in texts()  # it stands before the damage
    said = capsys.readouterr()
    for reason in "a.xml: record 1: ", "raw/501.xml: malformed XML":
        assert f"skipped {Path.cwd()}/{reason}" in said.out
    assert not said.err
    refused("no/folder.gz", data.extract_files, (Path("no/folder.gz"), ["a.xml"], False))


def outputs(out):
    """Names of the text files, without their hashes."""
    return [path.name.rpartition("-")[0] for path in text_files(out)]


def test_rerun_makes_what_changed(monkeypatch):
    """A replaced file with an older time skipped, or its old text left beside the new; an output
    for each of millions of files, or one that a new file has moved left twice; another command's
    text removed, or beside; an input of an earlier one's name over it; the output as an input."""
    monkeypatch.setattr(data, "OUTPUT_BYTES", 3)
    for i in (1, 2, 3, 5, 11):
        write(f"raw/{i}.txt", str(i))
    first = write("raw/a/10.txt", "large")
    out = "raw/out"
    extract(["raw"], out)
    before = contents(out)
    assert outputs(out) == ["1", "3", "11", "a-10"]
    assert extract(["raw"], out) == {} and contents(out) == before
    assert all(raw[4:8] == bytes(4) for raw in before.values())  # gzip's time of writing
    write(first, "other")
    os.utime(first, (1, 1))
    write("raw/0.txt", "0")
    extract(["raw"], out)
    assert outputs(out) == ["0", "2", "11", "a-10"]
    assert sorted(texts(out).values()) == ["0", "1", "11", "2", "3", "5", "other"]
    before = contents(out)
    write("b/raw/0.txt", "0")
    for others in ["raw/a"], [write("b/a-10.txt", "large")], ["b/raw"]:
        refused("is not made of these inputs: .*another --out", extract, others, out)
    assert contents(out) == before
    extract([first, write("b/10.txt", "b"), pubmed_file("b/10.xml", citation(3))], "new")
    assert outputs("new") == ["10"] * 3 and len(texts("new")) == 3


ENTITY = b'<!ENTITY a "aa">]><articles/>'
DEEP = b"<article><body>" + b"<p>a" * 50_000 + b"</p>" * 50_000 + b"</body></article>"


@pytest.mark.parametrize("name, body, message", [
    ("a.xml", b"<PubmedArticleSet><PubmedArticle>", "malformed XML"),
    ("a.xml", b"<html><body>404</body></html>", "no record of PubMed or JATS"),
    ("a.xml", "<a/>".encode("utf-16"), "is UTF-16.*: convert it"),
    ("a.xml", b"<!-- -->" * 2**18 + b"<a/>", "no XML element"),
    ("a.xml.gz", gzip.compress(b"<!DOCTYPE x [" + b" " * (2**16 - 17)) + gzip.compress(ENTITY),
     "declares an entity"),
    ("a.xml.gz", gzip.compress(b"<articles></articles>")[:-9], "damaged gzip"),
    ("a.xml", DEEP, "recursion"),
    ("a.xml.gz", gzip.compress(b"<articles>" + b"a" * (60 * 2**20)), "record beyond 32")])
def test_bad_input_is_named(name, body, message, capsys):
    """A full memory, a traceback, an unnamed file, or another file's text lost, by damaged or
    hostile input."""
    write(name, body)
    good = pubmed_file("good.xml", citation(1))
    refused("1 (bad records|damaged files) of 2", extract, [name, good], "out")
    assert re.search(f"skipped .*{name}.*{message}", capsys.readouterr().out)
    assert set(texts()) == {"1"}


# ---------------------------------------------------------------------------------------------
# tokenize, and what a kill leaves


@pytest.fixture
def corpus():
    """Records of invented text, in six files, with versions, deletions and equal texts across them;
    many begin alike, and some differ in a capital only."""
    rng = random.Random(0)
    found = []
    for _ in range(600):
        text = f"Über die Wirkung auf {rng.choice('Ss')}chmerzen: {rng.randrange(150)} µg"
        found.append((str(rng.randrange(400)), rng.choice([None] + [text] * 9)))
    for i in range(6):
        write_text(f"text/f{i}.jsonl.gz", found[100 * i : 100 * i + 100])
    return found


def documents(folder):
    """Yield the set of texts in train.bin, then in val.bin."""
    t = Tokenizer.load(folder)
    for split in ("train", "val"):
        text = t.decode(np.fromfile(f"{folder}/{split}.bin", np.uint16).tolist())
        found = text.split("<|endoftext|>")[:-1]
        assert len(set(found)) == len(found)
        yield set(found)


def test_last_record_of_an_id_stands(tokenizer, corpus, monkeypatch, capsys):
    """An outdated version, a deleted document or an equal text in the arrays; one on another side
    than its id's hash tells, so that added text moves it; characters for bytes."""
    held_out, seen = {}, set()
    for ident, text in reversed(corpus):
        if text and ident not in seen:
            held_out.setdefault(text, hash64(ident) < 0.2 * 2**64)
        seen.add(ident)
    tokenize("text", tokenizer, "out", val_fraction=0.2)
    said = capsys.readouterr().out
    assert said.startswith("600 records read: 289 replaced by a later one of their id, 34 deleted, "
                           "98 equal to another's text\n")
    for found, split in zip(documents("out"), ("train", "val")):
        expected = {text for text in held_out if held_out[text] == (split == "val")}
        sizes = load_meta("out")[split]
        assert found == expected and sizes["documents"] == len(expected) > 20
        assert sizes["bytes"] == len("".join(expected).encode())
    flags = f"tokenize --text text --tokenizer {tokenizer} --out plain --no_eot --workers 1"
    monkeypatch.setattr(sys, "argv", ["data.py", *flags.split()])
    data.main()
    meta = load_meta("plain")
    assert meta["eot_id"] not in np.fromfile("plain/train.bin", "H")
    assert meta["val"]["documents"] == 1  # --val_fraction is 0.002


def test_same_bytes_for_any_workers(tokenizer, corpus, monkeypatch):
    """Arrays that depend on the number of processes, or on what an earlier run left; new arrays
    beside an old meta.json."""
    tokenize("text", tokenizer, "one", val_fraction=0.05)
    one = contents("one")
    write("one/train.bin.1.tmp", "left by a killed run")
    tokenize("text", tokenizer, "one", val_fraction=0.05)
    monkeypatch.setattr(data, "BATCH", 3)
    tokenize("text", tokenizer, "two", val_fraction=0.05, workers=2)
    assert contents("one") == contents("two") == one
    assert set(one) == {"train.bin", "val.bin", "meta.json", "vocab.json", "merges.txt"}
    monkeypatch.setattr(Tokenizer, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize("text", tokenizer, "one", val_fraction=0.1)
    refused("no meta.json", load_meta, "one")


def test_small_corpora(tokenizer):
    """Documents on one side only, and so an empty array that training or validation dies of; ids of
    a tokenizer that stood in the folder before; half-written arrays."""
    write_text("t/t.jsonl.gz", [("1", "one"), ("2", "two"), ("3", "three")])
    for merges in [], [("o", "n")]:
        Tokenizer.from_merges(merges).save("t")
        meta = tokenize("t/t.jsonl.gz", "t", "out", 1e-9)
        assert [meta[split]["documents"] for split in ("train", "val")] == [2, 1]
        assert set.union(*documents("out")) == {"one", "two", "three"}
    Tokenizer.from_merges([*itertools.product(ALPHABET, repeat=2)]).save("large")
    refused("uint16 holds 65,536", tokenize, "t", "large", "bad")
    refused("no document to train on", tokenize, "t/t.jsonl.gz", tokenizer, "bad", 1 - 1e-9)
    assert not contents("bad")


def test_mistakes_are_one_line():
    """A traceback for a user's mistake, or exit code 0."""
    done = run(DATA, "extract", "no", "--out", "o", cwd=".")
    assert done.returncode == 1 and re.fullmatch(".*nothing to extract in .*\n", done.stderr)


def test_demo(capsys):
    """A question of dev or test in the corpus; a train question answered wrongly; a drug in two
    splits, or with two diseases; a bar in a log file."""
    data.make_demo("demo")
    assert not capsys.readouterr().err
    assert Path("demo/text/demo.jsonl.gz").read_bytes()[4:8] == bytes(4)  # gzip's time of writing
    corpus = texts("demo/text").values()
    studies = defaultdict(str)
    for text in corpus:
        if text.startswith("A study of "):
            studies[text.split()[3]] += text
    asked = "\n".join(text for text in corpus if "?" in text)
    split_of = {}
    for task, split in itertools.product(("medqa", "pubmedqa"), ("train", "dev", "test")):
        for q in load_qa(task, "demo", split):
            right = q.options[q.answer]
            told = re.findall(rf"{re.escape(q.question)}(?:\nAnswer:)? (\w*)", asked)
            assert set(told) == ({right} if split == "train" else set())
            if task == "medqa":
                drug = re.search(r"[A-Z]\w+in\b", q.question)[0]
                assert split_of.setdefault(drug, split) == split and len({*q.options}) == 4
                assert [option for option in q.options if option in studies[drug]] == [right]
    assert Counter(split_of.values()) == {"train": 32, "dev": 8, "test": 24}


@pytest.mark.slow
def test_kill_and_rerun(tokenizer):
    """A partial file taken for whole, or left-overs beside it, after a SIGKILL."""
    for i in range(4):
        found = [citation(f"{i}{n}", abstract=f"pain {i}{n} mg " * 40) for n in range(8000)]
        pubmed_file(f"raw/pubmed20n{i:04}.xml.gz", *found)
    for out, flags in (("text", "extract raw"),
                       ("arrays", f"tokenize --text text --tokenizer {tokenizer}")):
        command = [sys.executable, DATA, *flags.split(), "--workers", "2", "--out"]
        start = time.perf_counter()
        subprocess.run([*command, out], check=True)
        seconds = time.perf_counter() - start
        command.append("killed/" + out)
        for _ in range(10):
            process = subprocess.Popen(command, start_new_session=True)
            time.sleep(random.uniform(0.2, 0.9) * seconds)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(command, check=True)
        assert contents("killed/" + out) == contents(out)


# ---------------------------------------------------------------------------------------------
# download from a server with faults


class Faulty(http.server.BaseHTTPRequestHandler):
    """Serves server.files; each request meets the next of server.faults (None: no fault)."""

    def do_GET(self):
        body = self.server.files.get(self.path[1:])
        fault = next(self.server.faults)
        if body is None or fault == 429:
            return self.send_error(fault or 404)
        if fault == "html":
            body = b"<!DOCTYPE html><html>Please wait</html>"
        self.send_response(200)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body[:-1] if fault == "cut" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(files, *faults) -> URL of a local server; retries without waits."""
    monkeypatch.setattr(data, "BACKOFF_S", 0.001)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(files, *faults):
        vars(server).update(files=files, faults=itertools.cycle(faults or [None]))
        return f"http://127.0.0.1:{server.server_port}/"

    yield serve
    server.shutdown()
    server.server_close()


def no_download(message, name, *args):
    refused(message, download, name, "bad", *args)


@pytest.fixture
def pubmed_site():
    """Files of a server, by their paths."""
    files = {"baseline/": b"", "updatefiles/": b""}
    for i, folder in enumerate(["baseline/", "baseline/", "updatefiles/"], 1):
        name = f"pubmed26n000{i}.xml.gz"
        files[folder] += f'<a href="{name}">{name}</a>'.encode()
        files[folder + name] = body = random.Random(i).randbytes(30_000)
        files[folder + name + ".md5"] = f"MD5({name})= {hashlib.md5(body).hexdigest()}\n".encode()
    return files


def test_download_survives_faults(serve, pubmed_site, monkeypatch):
    """A cut, wrong or HTML file taken for the whole one; others not fetched after a wrong one, or
    fetched again when they are whole; one outside of the range."""
    monkeypatch.setattr(data, "CONNECTIONS", 1)  # so that a file meets all faults, one by one
    download("pubmed", "out", serve(pubmed_site, "cut", "html", 429, "cut", None))
    whole = {path.split("/")[1]: body for path, body in pubmed_site.items() if path[-2:] == "gz"}
    assert contents("out") == whole
    name = "pubmed26n0002.xml.gz"
    md5 = {f"baseline/{name}.md5": b"MD5(x)= " + b"0" * 32}
    refused("1 of 3 files failed.*checksum differs", download, "pubmed", "new",
            serve(pubmed_site | md5))
    assert contents("new") == {path: whole[path] for path in whole if path != name}
    write(f"new/{name}.part", "half")
    download("pubmed", "new", serve(pubmed_site))
    listings = {path: pubmed_site[path] for path in ("baseline/", "updatefiles/")}
    download("pubmed", "new", serve(listings))
    assert contents("new") == whole
    download("pubmed", "one", serve(pubmed_site), files="3")
    assert [*contents("one")] == ["pubmed26n0003.xml.gz"]


def test_download_errors_are_clear(serve, pubmed_site):
    """Endless retries of a 404 or a cut file; a web page, or a part, taken for a question set."""
    no_download("numbered 7-9", "pubmed", serve(pubmed_site), "7-9")
    no_download("give a number or a range", "pubmed", None, "1-x")
    no_download("404.*--base_url$", "pubmedqa", serve(pubmed_site))
    files = dict.fromkeys(FILES["pubmedqa"], b" <html>Log in</html>")
    no_download("a web page", "pubmedqa", serve(files))
    no_download("IncompleteRead", "pubmedqa", serve(files, "cut"))
    assert not contents("bad")


# S3's answer to a listing, by its reference
S3_LISTING = """<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Prefix>{0}</Prefix>
<CommonPrefixes><Prefix>{0}2026-08-01T01-00Z/</Prefix></CommonPrefixes>
<CommonPrefixes><Prefix>{0}2026-09-01T01-00Z/</Prefix></CommonPrefixes>
<CommonPrefixes><Prefix>{0}data/</Prefix></CommonPrefixes>
<CommonPrefixes><Prefix>{0}hive/</Prefix></CommonPrefixes></ListBucketResult>"""


def test_download_pmc(serve, capsys):
    """An outdated version or inventory, a retracted or closed article is fetched; odd metadata of
    one article end the whole download, or a missing or wrong one doesn't; a bar in a log."""
    prefix = "inventory-reports/pmc-oa-opendata/metadata/"
    files = {f"?list-type=2&delimiter=/&prefix={prefix}": S3_LISTING.format(prefix).encode()}
    articles = {"PMC1.10": {}, "PMC1.2": {}, "PMC4.1": {"is_pmc_openaccess": False},
                "PMC5.1": {"xml_url": None}, "PMC8.1": {"xml_url": "s3://pmc/PMC8.1/PMC8.1.xml"}}
    articles |= {f"PMC{i}.1": {"is_retracted": True} for i in range(100, 350)}
    for name, changes in articles.items():
        md5 = hashlib.md5(name.encode()).hexdigest()  # in some it is missing, as in PMC8.1
        about = {"pmcid": name, "is_pmc_openaccess": True, "is_retracted": False,
                 "xml_url": f"s3://pmc/{name}/{name}.xml?md5={md5}"}
        files[f"metadata/{name}.json"] = json.dumps(about | changes).encode()
        files[f"{name}/{name}.xml"] = name.encode()
    rows = "".join(f'"x","metadata/{name}.json"\n' for name in articles)
    files[prefix + "data/i.csv.gz"] = inventory = gzip.compress(rows.encode())
    key = {"key": prefix + "data/i.csv.gz", "MD5checksum": hashlib.md5(inventory).hexdigest()}
    files[f"{prefix}2026-09-01T01-00Z/manifest.json"] = json.dumps({"files": [key]}).encode()
    download("pmc", "out", serve(files))
    assert contents("out") == {"0/PMC1.10.xml": b"PMC1.10", "0/PMC8.1.xml": b"PMC8.1"}
    said = capsys.readouterr()
    assert "left out PMC5.1.xml: Attribute" in said.out and not said.err
    refused("1 of 2 files failed", download, "pmc", "out", serve(files), "3-7")
    files["PMC1.10/PMC1.10.xml"] = b"wrong"
    refused("2 of 254 files failed", download, "pmc", "wrong", serve(files))
    files[prefix + "data/i.csv.gz"] += b"x"
    no_download("checksum differs", "pmc", serve(files))


def test_download_unpacks(serve):
    """A question set left in its archive, half unpacked by a killed run; a file outside of it."""
    write("data/a.csv", "whole")
    os.symlink("a.csv", "data/link")
    write("mmlu/unpacked/data/a.csv", "hal")
    shutil.make_archive("data", "tar", ".", "data")
    shutil.make_archive("master", "zip", ".", "data")
    url = serve({name: Path(name).read_bytes() for name in ("data.tar", "master.zip")})
    for source in "mmlu", "mmlu", "medquad":
        download(source, source, url)
        assert Path(source, "unpacked/data/a.csv").read_text() == "whole"
    assert not Path("mmlu/unpacked/data/link").exists()
    with tarfile.open("data.tar", "a") as tar:
        tar.add("data/a.csv", "../outside.csv")
    url = serve({"data.tar": Path("data.tar").read_bytes(), "master.zip": b"no archive"})
    no_download("delete it", "mmlu", url)
    no_download("delete it", "medquad", url)
    assert not [*Path(".").rglob("outside.csv")]


# ---------------------------------------------------------------------------------------------
# question sets


# What the official split_dataset.py makes of 96 questions, of which 10 are "maybe" and 32 "no".
PUBMEDQA_SPLITS = {"dev": "84 22 63 38 3", "train": """69 95 33 83 2 44 93 18 13 7 82 15 89 71 23 39
    80 58 68 0 79 45 31 86 27 65 35 11 77 34 12 41 29 87 59 74 19 8 10 17 43 76 30""", "test": """55
    57 92 49 70 85 25 67 91 20 75 40 24 94 32 72 47 60 42 52 62 64 37 14 54 90 50 48 51 36 88 81 46
    53 21 73 28 56 26 16 78 66 61 1 4 5 6 9"""}


PUBMEDQA = {"QUESTION": "Q?", "CONTEXTS": ["A.", "B."], "LONG_ANSWER": "Long."}
MEDQA = {"question": "Q?", "options": {"B": "no", "A": "yes"}, "answer_idx": "B", "answer": "no",
         "meta_info": "step1"}
MEDMCQA = {"question": "a &lt; b", "opa": "1", "opb": "2", "opc": "3", "opd": "&gt; 4",
           "subject_name": "Dental", "choice_type": "one"}


def test_pubmedqa_split_is_the_official_one():
    """Another test set than everyone else's, or labels in another order."""
    items = {}
    for i in range(96):
        label = "maybe" if i < 10 else "no" if i % 5 in (1, 3) and i < 90 else "yes"
        items[str(i)] = PUBMEDQA | {"QUESTION": f"Q{i}?", "final_decision": label}
    write("ori_pqal.json", json.dumps(items))
    for split, ids in PUBMEDQA_SPLITS.items():
        found = load_qa("pubmedqa", ".", split)
        assert [q.id for q in found] == ids.split()
        for q in found:
            labels = ("maybe", "no", "yes")  # BioMedLM's order
            answer = labels.index(items[q.id]["final_decision"])
            assert q == Question(q.id, f"Q{q.id}?", "A. B.", labels, answer, "Long.")


def test_official_test_set(shared):
    """Another test set than the official one, or an answer off by one."""
    truth = json.loads((shared / "qa/pubmedqa/test_ground_truth.json").read_text())
    asked = load_qa("pubmedqa", shared / "qa", "test")
    assert [(q.id, q.options[q.answer]) for q in asked] == list(truth.items())


def load(task, name, body, split="dev"):
    write(name, body)
    return load_qa(task, ".", split)


def test_official_layouts():
    """A subject that isn't asked, or not; a row cut at its comma or quotes; letters, labels or
    columns in another order; every answer off by one; a lost entity, subject or line."""
    subjects = ["anatomy", "clinical_knowledge", "college_biology", "college_medicine",
                "medical_genetics", "professional_medicine", "virology"]
    for subject in subjects:
        found = load("mmlu", f"{subject}_dev.csv", '"Is ""it"", so?","a, b",c,d,e,C\n')
    assert [q.subject for q in found] == subjects[:6]
    assert found[0] == Question("anatomy-dev-0", 'Is "it", so?', answer=2, subject="anatomy",
                                options=("a, b", "c", "d", "e"))
    assert load("mmlu", "anatomy_val.csv", "V?,a,b,c,d,A\n", "val")[0].question == "V?"
    assert load("medqa", "phrases_no_exclude_dev.jsonl", json.dumps(MEDQA)) == [
        Question("dev-0", "Q?", options=("yes", "no"), answer=1, kind="step1")]
    for cops, answers in (
            ([4, 1, None], [3, 0, None]), ([3, 0, -1], [3, 0, None])):  # Hugging Face's copy
        items = [MEDMCQA | {"id": str(cop), "cop": cop} for cop in cops]
        found = load("medmcqa", "validation.json", lines(items))
        assert [q.answer for q in found] == answers
    assert found[1] == Question("0", "a < b", "", ("1", "2", "3", "> 4"), 0, subject="Dental",
                                kind="one")
    found = load("bioasq", "dev.tsv", "i1\tIs it?\ta\u2028b\tyes\ni2\tIs it?\tText\tno\n")
    assert found[0] == Question("i1", "Is it?", "a\u2028b", ("no", "yes"), 1, kind="yesno")
    assert found[1].answer == 0 and len(found) == 2
    write("val.target", "d\ne\n")  # the authors' name for dev
    found = load("text", "val.source", "a\u2028b\nc\n", "val")
    assert [(q.question, q.target) for q in found] == [("a\u2028b", "d"), ("c", "e")]


def test_bioasqs_own_files():
    """The golden answers trained on; questions of other types; labels swapped; a year's file, which
    holds the years before, refused, or one question in train and dev."""
    item = {"type": "yesno", "body": "Is it?", "snippets": [{"text": "A."}, {"text": "B."}]}
    items = [item | {"id": str(i), "exact_answer": ["Yes", ["no"]][i % 2]} for i in range(20)]
    write("7b_train.json", json.dumps({"questions": [*items, {"type": "list"}]}))
    write("6b_train.json", json.dumps({"questions": items[:13]}))
    write("pubmedqa/ori_pqal.json", "{}")
    golden = items[5] | {"id": "golden"}
    write("7B1_golden.json", json.dumps({"questions": [golden]}))
    train, dev, test = (load_qa("bioasq", ".", split) for split in ("train", "dev", "test"))
    assert [q.id for q in train] == [str(i) for i in range(20) if i % 10]
    assert [q.id for q in dev] == ["0", "10"] and [q.id for q in test] == ["golden"]
    assert dev[0] == Question("0", "Is it?", "A. B.", ("no", "yes"), 1, kind="yesno")


def test_bad_question_files_are_refused():
    """A guessed answer, a traceback, or a score on a damaged or missing set; not told in which file
    and where."""
    os.mkfifo("test.tsv")
    refused("put the official files", load_qa, "bioasq", ".", "test")
    good = MEDMCQA | PUBMEDQA | {"id": "1", "cop": 1, "final_decision": "yes"}
    for task, name, body in (
            ("medqa", "phrases_no_exclude_test.jsonl",
             lines([MEDQA, MEDQA | {"answer_idx": None}])),
            ("medmcqa", "test.json", lines([good, good | {"id": "2", "cop": 7}])),
            ("medmcqa", "test.json", lines([good, good])),
            ("mmlu", "anatomy_test.csv", "Q?,a,b,c,d,A\nQ?,a,b,c,d,AB"),
            ("mmlu", "anatomy_test.csv", "Q?,a,b,c,d,A\na,b,c,d,A"),
            ("pubmedqa", "ori_pqal.json",
             json.dumps({1: good, 2: good | {"final_decision": "x" * 10**6}})),
            ("text", "test.source", "a\nb\n")):
        write("test.target", "a\n")
        with pytest.raises(ValueError, match=f"^{name}, after 1 questions: .*") as caught:
            load(task, name, body, "test")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    refused("is empty", load, "medmcqa", "dev.json", "")
    refused("^dev.json", load, "medmcqa", "dev.json", '{"question": ' + "[" * 90_000)


def test_medquad_split_shares_no_text():
    """A question or a whole answer of the test that was trained on, in another file or not; an
    answer that its authors withhold."""
    pairs = [(f"Q{i}?", f"A{i}.") for i in range(200)]
    pairs += [(f"Q{i}?", f"A{i + 1}.") for i in range(100, 120)]  # a long chain
    for i, (question, answer) in enumerate([*pairs, ("Withheld?", "")]):
        pair = f"<Question qtype='use'>{question}</Question><Answer>{answer}</Answer>"
        write(f"1_GHR/{i}.xml", f"<QAPairs><QAPair>{pair}</QAPair></QAPairs>")
    split_of, sizes = {}, []
    for split in ("train", "dev", "test"):
        found = load_qa("text", ".", split)
        sizes.append(len(found))
        for q in found:
            assert (q.subject, q.kind) == ("1_GHR", "use")
            assert {split} == {split_of.setdefault(text, split) for text in (q.question, q.target)}
    assert sum(sizes) == len(pairs) and sizes[0] > 0.6 * len(pairs)
    assert min(sizes) > 0.05 * len(pairs)


# ---------------------------------------------------------------------------------------------
# cloze


def test_cloze_questions(monkeypatch):
    """Options that differ in more than a word, a word that the text gave away, others of another
    ending or frequency, a question on a document that was trained on, or counts of a held-out; a
    piece of a compound asked, a long document as one passage."""
    monkeypatch.setattr(data, "COMMONEST", 1)
    lead = "x " * 99
    counts = {"cystitis": 40, "gastritis": 39, "bronchitis": 21, "hepatitis": 20, "dermatitis": 20,
              "arthritis": 10, "colitis": 9, "carcinoma": 20}
    counts |= {letter + "asis": 5 for letter in "bcdfghkl"}
    trained = [(word, lead + f"of {word}. " * count) for word, count in counts.items()]
    paragraphs = [
        f"Dermatitis {lead}of hepatitis or x. End.",  # asked
        f"{lead}of basis, casis, dasis, fasis.",  # three of the four are asked, and no more below
        f"Hepatitis {lead}of hepatitis.",  # given away
        f"{lead}of non-hepatitis.", f"{lead}of hepatitis-like.",
        f"{lead[2:]}of hepatitis.",  # too little before it
        f"{lead}of hepatitis",  # no sentence
        f"{lead}of colitis.",  # too few of its frequency
        lead * 20]
    # The hashes of these two ids are in the lowest hundredth, those of the words are not.
    held_out = [("3", "\n".join(paragraphs)), ("68", f"x\n{lead[2:]}of arthritis!")]
    write_text("text/t.jsonl.gz", trained + held_out)
    Tokenizer.from_merges(train_bpe({" hepatitis": 2}, 999)).save("everyday")
    cloze("text", "text", ".", 0.01, "everyday")
    asked = load_qa("medqa", ".", "test")
    for q, question, words, rest, sort in (
            (asked[0], f"x\n{lead[2:]}of", "arthritis hepatitis dermatitis colitis", "!",
             "medical"),
            (asked[1], f"Dermatitis {lead}of", "hepatitis gastritis bronchitis arthritis", " or x.",
             "everyday")):
        options = [word + rest for word in words.split()]
        assert q.question == question and q.options[q.answer] == options[0]
        assert sorted(q.options) == sorted(options)
        assert q.kind == f"cloze, seen 10 to 99 times, {sort}"
    assert len(asked) == 5 and len({q.answer for q in asked}) > 1
    refused("raise --val_fraction", cloze, "text", "text", "d", 1e-9)
