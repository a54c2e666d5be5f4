"""Evaluation: python eval.py tokenizer --tokenizer DIR [--against gpt2] [--text PATH].

What a tokenizer does to biomedical words, as Markdown tables on standard output.
"""

import argparse
import sys
from collections import Counter

from tokenizer import block_text, input_files, load_named, read_blocks

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


def table(header, rows):
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


def tokenizer_main(args):
    """Print table 3 of the paper, how the listed terms break, and, with --text, tokens per word and
    bytes per token there, and how terms break by how often the text has them."""
    names = filter(None, (args.tokenizer, args.against))
    tokenizers = {name.rstrip("/").split("/")[-1]: load_named(name) for name in names}
    table(["word", *tokenizers], ([word, *("/".join(pieces_of(one, word))
                                          for one in tokenizers.values())] for word in TABLE_3))
    columns = [f"{name}: {head}" for name in tokenizers for head in ("whole", "≤ 2", "pieces")]
    ten = [word for name, words in SPECIALTIES.items() if "rare" not in name for word in words]
    groups = SPECIALTIES | {"the ten together": ten}
    table(["specialty", "terms", *columns], fragmentation_rows(groups, tokenizers))
    if not args.text:
        return
    n_words, n_bytes, tokens, seen = read_text(args.text, tokenizers)
    table(["tokenizer", "words", "tokens", "tokens per word", "bytes per token"],
          ([name, f"{n_words:,}", f"{tokens[name]:,}", f"{tokens[name] / n_words:.3f}",
            f"{n_bytes / tokens[name]:.3f}"] for name in tokenizers))
    groups = {}
    for least, most, name in ((100, 1e9, "100 or more"), (10, 99, "10 to 99"), (1, 9, "1 to 9"),
                              (0, 0, "never")):
        groups[name] = [word for words in SPECIALTIES.values() for word in words
                        if least <= seen[word.lower()] <= most]
    table(["times in the text", "terms", *columns], fragmentation_rows(groups, tokenizers))


# ---------------------------------------------------------------------------------------------
# the command line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = parser.add_subparsers(dest="command", required=True)
    part = sub.add_parser("tokenizer", help="how biomedical words break")
    part.add_argument("--tokenizer", required=True, help="a tokenizer's folder, or gpt2 (required)")
    part.add_argument("--against", help="folder of a second one, or gpt2 (default: none)")
    part.add_argument("--text", help="file or folder of text to measure on (default: none)")
    tokenizer_main(parser.parse_args())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:  # a user's mistake: one line with its mend, no traceback
        sys.exit(f"eval.py: error: {e}")
