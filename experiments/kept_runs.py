"""Studies of many trainings: every run is a JSON file in a folder named after the settings.

A study that was stopped goes on where it was. Several processes, or machines with a common folder, may work on one:
each trains what no other is training, and takes what the others have finished.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..callbacks.atomic_file import replacing


def settings_digest(settings: Any) -> str:
    """Names the settings of a study, a dataclass instance: 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:12]


def mean_and_spread(samples: Sequence[float]) -> tuple[float, float]:
    """Mean, and the largest less the smallest.

    >>> mean_and_spread([1.0, 2.0, 6.0])
    (3.0, 5.0)
    """
    return fmean(samples), max(samples) - min(samples)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class KeptRuns:
    """The runs of one study.

    Attributes:
        folder: where studies of this kind lie; runs are `folder/<digest of settings>/<variant>-<seed>.json`.
        settings: a dataclass instance; what all runs share.
        train: gives the result of a variant and a seed, as plain JSON.
        report: takes a line per run.
        poll_seconds: how often to look again while other processes train all that is left.
    """

    folder: Path
    settings: Any
    train: Callable[[str, int], dict[str, Any]]
    report: Callable[[str], None] = _to_stderr
    poll_seconds: float = 5.0

    def path(self, variant: str, seed: int) -> Path:
        """The file of a run."""
        return self.folder / settings_digest(self.settings) / f"{variant}-{seed}.json"

    def kept(self, variant: str, seed: int) -> dict[str, Any] | None:
        """The result of a run that is done; None where it is not.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        path = self.path(variant, seed)
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no whole JSON file ({error}); delete it to train this run again") from None
        # through JSON, where tuples are lists
        settings = json.loads(json.dumps(asdict(self.settings)))
        expected = {"variant": variant, "seed": seed, "study": settings}
        found = {name: result.get(name) for name in expected} if isinstance(result, dict) else result
        if found != expected:
            raise ValueError(
                f"{path}: holds {found}, not the run {expected} that its name says; delete it to train this run again"
            )
        return result

    def get(self, variant: str, seed: int) -> dict[str, Any]:
        """The result of one run: kept, awaited from the process that is training it, or trained now.

        Raises:
            ValueError: the kept file is damaged, or the training refused.
        """
        return self.all([variant], [seed])[variant][0]

    def all(self, variants: Iterable[str], seeds: Iterable[int]) -> dict[str, list[dict[str, Any]]]:
        """Results of all variants and seeds, by variant, in the order of the seeds.

        First all variants with the first seed, so that there is something to compare when a study is stopped early.

        Raises:
            ValueError: a kept file is damaged, or a training refused; what is done is kept.
        """
        variants, seeds = list(variants), list(seeds)
        wanted = [(variant, seed) for seed in seeds for variant in variants]
        done: dict[tuple[str, int], dict[str, Any]] = {}
        # files that are damaged are told before hours are spent on the others
        for run in wanted:
            self._note(run, self.kept(*run), done, len(wanted), "kept")
        while len(done) < len(wanted):
            if not self._pass(wanted, done):
                time.sleep(self.poll_seconds)
        return {variant: [done[variant, seed] for seed in seeds] for variant in variants}

    def _pass(self, wanted: list[tuple[str, int]], done: dict[tuple[str, int], dict[str, Any]]) -> bool:
        """Train what nobody trains, take what others finished; False where that was nothing."""
        before = len(done)
        for run in wanted:
            if run in done:
                continue
            path = self.path(*run)
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            # at the latest it ends with its process
            try:
                result, how = self.kept(*run), "kept by another process"
                if result is None:
                    begin = time.perf_counter()
                    result = self._trained(*run)
                    how = f"trained in {time.perf_counter() - begin:.0f} s"
            finally:
                lock.release()
            self._note(run, result, done, len(wanted), how)
        return len(done) > before

    def _trained(self, variant: str, seed: int) -> dict[str, Any]:
        result = {
            "variant": variant,
            "seed": seed,
            # as it will be read again: lists for tuples
            "study": json.loads(json.dumps(asdict(self.settings))),
            **self.train(variant, seed),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        with replacing(self.path(variant, seed)) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
        return result

    def _note(
        self,
        run: tuple[str, int],
        result: dict[str, Any] | None,
        done: dict[tuple[str, int], dict[str, Any]],
        total: int,
        how: str,
    ) -> None:
        if result is not None:
            done[run] = result
            self.report(f"run {len(done)} of {total}: {run[0]}, seed {run[1]}: {how}")
