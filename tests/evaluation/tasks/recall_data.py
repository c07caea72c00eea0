"""The tiny task's data, from the file beside it."""

import json
from pathlib import Path


def load(**_):
    import datasets  # what lm-evaluation-harness brings; pytest imports this file without it

    lines = (Path(__file__).parent / "recall.jsonl").read_text().splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
