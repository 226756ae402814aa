"""Wikipedia summaries as packaged (one JSON object, title to record) into JSON Lines."""

import json
from pathlib import Path


def write_summaries(files: list[Path], folder: Path) -> None:
    """Write `documents.jsonl`, one object with `title` and `text` per line, in the order of the source.

    Raises:
        ValueError: the source is not an object of records with `title` and `extract`.
    """
    try:
        records = json.loads(files[0].read_text(encoding="utf-8"))
        rows = [{"title": record["title"], "text": record["extract"]} for record in records.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{files[0]} is not a JSON object of records with title and extract: {error}") from error
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as out:
        for row in rows:
            if row["text"].strip():
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
