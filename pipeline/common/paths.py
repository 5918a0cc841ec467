"""The files that stages hand to each other, by the names that dvc.yaml has for them.

No stage depends on this list: another path here is another path in dvc.yaml, and a test holds that both agree.
"""

from pathlib import Path

RAW = Path("data/raw")  # facts, phrasings and documents
CURATED = Path("data/curated")  # rows of the user's own
EXAM = Path("data/questions.jsonl")  # what the model is trained for
GENERAL_EXAM = Path("data/general.jsonl")  # what the model must not forget

GENERATED = Path("data/train.jsonl")
REPLIES = Path("data/replies.jsonl")
UNGROUNDED = Path("data/ungrounded.jsonl")
TRAIN_ROWS = Path("data/train_merged.jsonl")
VALID_ROWS = Path("data/valid.jsonl")
QUARANTINE = Path("data/quarantine.jsonl")
CONFLICTS = Path("data/conflicts.jsonl")
TOKENS = Path("data/tokens")

BASE = Path("models/base.json")
LICENSE = Path("models/license.json")
TRAINED = Path("outputs/trained")  # the adapter without its card
ADAPTER = Path("outputs/adapter")
MERGED = Path("models/merged")
GGUF = Path("models/gguf")

# What people compare, and beside each the details, which are no metrics of DVC.
GENERATE_METRICS = Path("metrics/generate.json")
DATA_METRICS, DATA_DETAILS = Path("metrics/data.json"), Path("metrics/details/data.json")
LENGTHS_METRICS, LENGTHS_DETAILS = Path("metrics/lengths.json"), Path("metrics/details/lengths.json")
TRAIN_METRICS, TRAIN_DETAILS = Path("metrics/train.json"), Path("metrics/details/train.json")
EXAM_METRICS, GENERAL_METRICS = Path("metrics/evaluate.json"), Path("metrics/general.json")
EXAM_DETAILS = Path("metrics/details/evaluate.json")  # of both exams
GGUF_METRICS, GGUF_DETAILS = Path("metrics/gguf.json"), Path("metrics/details/gguf.json")

BASE_ANSWERS, BASE_GENERAL_ANSWERS = Path("metrics/answers_base.jsonl"), Path("metrics/answers_general_base.jsonl")
ANSWERS, GENERAL_ANSWERS = Path("metrics/answers.jsonl"), Path("metrics/answers_general.jsonl")
GGUF_ANSWERS = Path("metrics/answers_gguf.jsonl")

DATA_PAGE = Path("metrics/data.md")
MASK_PAGE = Path("metrics/mask.md")
LENGTHS_TABLE = Path("metrics/lengths.csv")
LOSS_TABLE = Path("metrics/loss.csv")
TAGS_TABLE = Path("metrics/tags.csv")
VARIANTS_TABLE = Path("metrics/variants.csv")
REPORT_PAGE = Path("metrics/report.html")
REPORT_SUMMARY = Path("metrics/report.md")
