"""The first test scenes of a detection data set with their boxes, as one picture."""

from pathlib import Path

from ...callbacks.atomic_file import replacing
from ...datamodules.coco import coco_files, read_coco

COLOURS = ("red", "lime", "cyan", "yellow", "magenta", "white", "orange", "blue")


def draw_scenes(data: str | Path, path: Path, *, rows: int = 2, columns: int = 8) -> None:
    """Write a grid of scenes; a class has the same colour everywhere.

    Args:
        data: a folder in the COCO layout.
        path: of the PNG file.
        rows: of scenes.
        columns: of scenes.
    """
    from PIL import Image, ImageDraw

    scenes = read_coco(*coco_files(data)["test"])
    height, width = (int(side) for side in scenes.sizes.max(0))
    picture = Image.new("RGB", (columns * width, rows * height))
    for number in range(min(rows * columns, len(scenes))):
        scene = Image.open(scenes.paths[number]).convert("RGB")
        pen = ImageDraw.Draw(scene)
        found = scenes.annotations[number]
        for box, label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True):
            pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=COLOURS[label % len(COLOURS)])
        picture.paste(scene, (number % columns * width, number // columns * height))
    with replacing(path) as file:
        picture.save(file, format="PNG", optimize=True)
