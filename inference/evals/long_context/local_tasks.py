"""longbench-local as tasks: rows made to measure for the model's tokenizer, then LongBench's own code."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .code_lines import standard_library
from .haystack import check_documents
from .local_sets import CodeRows, MakeRow, WikipediaRows
from .longbench import format_prompt
from .longbench_files import SetRows, Templates, read_templates
from .longbench_sets import LOCAL_SETS
from .options import LongContextOptions
from .prompts import PromptFitter
from .sizing import largest_that_fits

DEFAULT_SAMPLES = 10
CONFIG_FOLDER = Path(__file__).parent / "longbench_local"
_FEWEST_DOCUMENTS = 32


def local_templates() -> Templates:
    """Prompt templates and generation lengths of longbench-local, from files in LongBench's layout."""
    found = read_templates(CONFIG_FOLDER)
    return Templates(found.prompts, found.max_new_tokens, origin="tenfold")


class LocalRows:
    """Makes the rows of longbench-local.

    Args:
        options: Lengths, samples per length, seed and documents.
        fitter: Counts tokens.
    """

    def __init__(self, options: LongContextOptions, fitter: PromptFitter) -> None:
        self._options, self._fitter = options, fitter
        self._templates = local_templates()
        self._wikipedia: WikipediaRows | None = None
        self._code: CodeRows | None = None

    def rows(self, name: str) -> SetRows:
        """The rows of one set, each with a field `max_tokens`: the length it was made for.

        Raises:
            ValueError: There are no documents, or a length passes the window or is too short.
        """
        options = self._options
        make, largest, smallest = self._maker(name)
        lengths = options.lengths_for(self._fitter.window)
        num_samples = DEFAULT_SAMPLES if options.num_samples is None else options.num_samples
        rows = []
        for length in lengths:
            for sample in range(num_samples):
                seed = f"{options.seed}/{name}/{length}/{sample}"
                made = largest_that_fits(
                    functools.partial(make, seed=seed),
                    self._text_of(name),
                    fitter=self._fitter,
                    length=length,
                    max_new_tokens=self._templates.max_new_tokens[name],
                    smallest=smallest,
                    largest=largest,
                    what=f"longbench_local_{name}",
                )
                rows.append({"_id": f"{length}-{sample}", **made, "max_tokens": length})
        return SetRows(rows=rows, path=None)

    def _text_of(self, name: str) -> Callable[[dict[str, Any]], str]:
        template, chat = self._templates.prompts[name], LOCAL_SETS[name].chat
        return lambda row: self._fitter.wrapped(format_prompt(template, row, name=name), chat=chat)

    def _maker(self, name: str) -> tuple[MakeRow, int, int]:
        """What makes a row, and its most and fewest pieces."""
        if name == "stdlib_completion":
            self._code = self._code or CodeRows(standard_library())
            return self._code.completion, self._code.largest, 4
        if self._wikipedia is None:
            check_documents(self._options.documents, what="longbench_local")
            if len(self._options.documents) < _FEWEST_DOCUMENTS:
                raise ValueError(
                    f"longbench_local needs at least {_FEWEST_DOCUMENTS} documents, "
                    f"and there are {len(self._options.documents)}"
                )
            self._wikipedia = WikipediaRows(self._options.documents)
        makers = {
            "wikipedia_qa": self._wikipedia.qa,
            "wikipedia_retrieval": self._wikipedia.retrieval,
            "wikipedia_count": self._wikipedia.count,
        }
        return makers[name], self._wikipedia.largest, 2
