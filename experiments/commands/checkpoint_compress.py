"""`tenfold checkpoint compress`: plain checkpoints of one run into a chain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...callbacks.excp.chain import ChainWriter
from ...callbacks.excp.container import is_save
from ...callbacks.excp.options import ExCPOptions
from ...callbacks.excp.restore import restore
from ...callbacks.excp.staging import HostStage
from ...callbacks.excp.store import SaveStore
from ...inference.evals.progress import track


def compress(
    paths: Sequence[Path],
    output: Path,
    options: ExCPOptions,
    *,
    key_frame_every: int = 20,
    workers: int = 2,
    weights_only: bool = True,
) -> None:
    """Codes plain checkpoints into a folder, decodes each again, and says what became of it.

    Args:
        paths: files, or folders of `*.ckpt` files.
        output: folder of the coded ones.
        options: settings of the codec.
        key_frame_every: saves from one key frame to the next.
        workers: threads.
        weights_only: refuse what is not plain values and tensors, as in `torch.load`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no plain checkpoint among them, two of one name, or the output is one of their folders.
    """
    files = _files(paths)
    if any(path.parent.resolve() == output.resolve() for path in files):
        raise ValueError(f"--output {output} holds checkpoints to be coded; name another folder")
    ordered = sorted(files, key=lambda path: (_step(path, weights_only), path.name))
    writer = ChainWriter(options, key_frame_every=key_frame_every, workers=workers)
    stage, store = HostStage(), SaveStore(output)
    raw = 0
    try:
        with track("coding, checkpoints", len(ordered)) as advance:
            for path in ordered:
                target = output / path.name
                if target.exists():
                    restored = restore(target, weights_only=weights_only, workers=workers)
                    writer.go_on_from(restored)
                    print(f"{path.name}: is there already", flush=True)
                else:
                    checkpoint = _load(path, weights_only)
                    staged = stage.stage(checkpoint)
                    _, report = writer.save(staged, target, store, repeats=False)
                    restore(target, weights_only=weights_only, workers=workers)
                    kind = "key frame" if report.key_frame else f"error {report.total.error_over_step:.3f} of the step"
                    coded = target.stat().st_size
                    print(
                        f"{path.name}: {path.stat().st_size:,} -> {coded:,} bytes, "
                        f"{path.stat().st_size / coded:.1f} times smaller, {kind}",
                        flush=True,
                    )
                raw += path.stat().st_size
                advance(1)
    finally:
        store.release()
    coded = sum(entry.path.stat().st_size for entry in store.entries().values())
    print(f"{len(ordered)} checkpoints: {raw:,} -> {coded:,} bytes, {raw / coded:.1f} times smaller")


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; name plain checkpoints or a folder of them")
        files += sorted(path.glob("*.ckpt")) if path.is_dir() else [path]
    # links such as last.ckpt would be the same state again
    plain = [path for path in files if not path.is_symlink() and not is_save(path)]
    if not plain:
        raise ValueError(f"no plain checkpoint among {', '.join(map(str, paths))}; they end in .ckpt")
    names = [path.name for path in plain]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two checkpoints are called {twice[0]}; code the folders one by one")
    return plain


def _load(path: Path, weights_only: bool) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a checkpoint of plain data: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def _step(path: Path, weights_only: bool) -> int:
    step = _load(path, weights_only).get("global_step")
    return step if isinstance(step, int) else 0
