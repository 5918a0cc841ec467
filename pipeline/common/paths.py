"""The paths of the files that stages exchange.

This module is no dependency of any stage: a changed path also changes in dvc.yaml, and a test compares both.
"""

from pathlib import Path

RAW = Path("data/raw")  # facts, phrasings and documents
CURATED = Path("data/curated")  # the user's rows
CORPUS = Path("data/corpus")  # raw text: documents and rows
EXAM = Path("data/questions.jsonl")  # tests what the model is trained for
GENERAL_EXAM = Path("data/general.jsonl")  # tests what the model must not forget
PREFERENCES = Path("data/preferences")  # the user's pairs of a better and a worse answer
PREFERENCE_EXAM = Path("data/preferences_exam.jsonl")  # held-out pairs: does the model prefer the better answers?
PROMPTS = Path("data/prompts.txt")  # everyday prompts, which the base answers for replay

GENERATED = Path("data/train.jsonl")
REPLIES = Path("data/replies.jsonl")
UNGROUNDED = Path("data/ungrounded.jsonl")
REPLAY = Path("data/replay.jsonl")
TRAIN_ROWS = Path("data/train_merged.jsonl")
VALID_ROWS = Path("data/valid.jsonl")
QUARANTINE = Path("data/quarantine.jsonl")
CONFLICTS = Path("data/conflicts.jsonl")
CORPUS_TRAIN = Path("data/corpus_train.jsonl")
CORPUS_VALID = Path("data/corpus_valid.jsonl")
CORPUS_QUARANTINE = Path("data/corpus_quarantine.jsonl")
TOKENS = Path("data/tokens")
PAIRS_TRAIN = Path("data/pairs_train.jsonl")
PAIRS_VALID = Path("data/pairs_valid.jsonl")
PAIRS_QUARANTINE = Path("data/pairs_quarantine.jsonl")
PAIR_TOKENS = Path("data/pair_tokens")

BASE = Path("models/base.json")
LICENSE = Path("models/license.json")
CHAT_TEMPLATE = Path("models/chat_template.jinja")  # as it is trained with and ships
TRAINED = Path("outputs/trained")  # the adapter of train_qlora (SFT)
ALIGNED = Path("outputs/aligned")  # the adapter that ships, after preference training, without its card
ADAPTER = Path("outputs/adapter")
MERGED = Path("models/merged")
GGUF = Path("models/gguf")

# Metrics have the few numbers that people compare. Details are JSON lists, of which DVC shows no numbers.
GENERATE_METRICS = Path("metrics/generate.json")
DATA_METRICS, DATA_DETAILS = Path("metrics/data.json"), Path("metrics/details/data.json")
CORPUS_METRICS, CORPUS_DETAILS = Path("metrics/corpus.json"), Path("metrics/details/corpus.json")
LENGTHS_METRICS, LENGTHS_DETAILS = Path("metrics/lengths.json"), Path("metrics/details/lengths.json")
TRAIN_METRICS, TRAIN_DETAILS = Path("metrics/train.json"), Path("metrics/details/train.json")
PAIRS_METRICS, PAIRS_DETAILS = Path("metrics/pairs.json"), Path("metrics/details/pairs.json")
ALIGN_METRICS, ALIGN_DETAILS = Path("metrics/align.json"), Path("metrics/details/align.json")
EXAM_METRICS, GENERAL_METRICS = Path("metrics/evaluate.json"), Path("metrics/general.json")
EXAM_DETAILS = Path("metrics/details/evaluate.json")  # of both exams
BASE_PERPLEXITY, PERPLEXITY = Path("metrics/perplexity_base.json"), Path("metrics/perplexity.json")
BASE_PREFERENCES, SFT_PREFERENCES = Path("metrics/preferences_base.jsonl"), Path("metrics/preferences_sft.jsonl")
TUNED_PREFERENCES = Path("metrics/preferences.jsonl")
PREFERENCE_METRICS = Path("metrics/preferences.json")
GGUF_METRICS, GGUF_DETAILS = Path("metrics/gguf.json"), Path("metrics/details/gguf.json")

BASE_ANSWERS, BASE_GENERAL_ANSWERS = Path("metrics/answers_base.jsonl"), Path("metrics/answers_general_base.jsonl")
SFT_ANSWERS, SFT_GENERAL_ANSWERS = Path("metrics/answers_sft.jsonl"), Path("metrics/answers_general_sft.jsonl")
ANSWERS, GENERAL_ANSWERS = Path("metrics/answers.jsonl"), Path("metrics/answers_general.jsonl")
GGUF_ANSWERS = Path("metrics/answers_gguf.jsonl")

DATA_PAGE = Path("metrics/data.md")
CORPUS_PAGE = Path("metrics/corpus.md")
PAIRS_PAGE = Path("metrics/pairs.md")
MASK_PAGE = Path("metrics/mask.md")
LENGTHS_TABLE = Path("metrics/lengths.csv")
LOSS_TABLE = Path("metrics/loss.csv")
ALIGN_TABLE = Path("metrics/align.csv")
TAGS_TABLE = Path("metrics/tags.csv")
VARIANTS_TABLE = Path("metrics/variants.csv")
REPORT_PAGE = Path("metrics/report.html")
REPORT_SUMMARY = Path("metrics/report.md")
