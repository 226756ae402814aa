"""The COCO layout: boxes as detectors take them, padding, flips, crowds, resuming, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tenfold.datamodules import CocoDetectionDataModule

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}]


def write(root: Path, split: str, sizes: list[tuple[int, int]], boxes: list[dict[str, Any]], **changes: Any) -> None:
    """Images of (height, width) whose left half is dark, with annotations; `changes` replaces lists of the file."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images = []
    for number, (height, width) in enumerate(sizes, start=1):
        pixels = np.full((height, width, 3), 200, dtype=np.uint8)
        pixels[:, : width // 2] = 10
        Image.fromarray(pixels).save(root / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    annotations = [{"id": n, "image_id": 1, "category_id": 3, "iscrowd": 0} | box for n, box in enumerate(boxes)]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES} | changes
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    write(
        tmp_path,
        "train2017",
        [(40, 60), (50, 30), (20, 20)],
        [
            {"bbox": [6, 4, 12, 8]},
            {"bbox": [0, 0, 60, 40], "category_id": 7, "area": 1000.0},
            {"bbox": [5, 5, 10, 10], "iscrowd": 1},
            {"bbox": [5, 5, 0, 10]},
            {"bbox": [2, 10, 20, 30], "image_id": 2, "category_id": 7},
            {"bbox": [1, 1, 5, 5], "image_id": 3, "iscrowd": 1},
        ],
    )
    return tmp_path


def module(root: Path, **options: Any) -> CocoDetectionDataModule:
    data = CocoDetectionDataModule(str(root), **({"size": 20, "max_size": None, "flip": 0.0} | options))
    data.setup("fit")
    return data


def test_boxes_become_shares_of_the_image_and_batches_are_padded(coco: Path) -> None:
    data = module(coco, size_divisor=16)
    # ids in the order of the file's numbers; the third image has a crowd only
    assert data.classes == ["ant", "cat"]
    assert data.category_ids == [3, 7]
    (batch,) = list(data.train_dataloader())
    first = next(n for n, label in enumerate(batch["labels"]) if label["image_id"] == 1)
    assert {int(label["image_id"]) for label in batch["labels"]} == {1, 2}
    # 40 x 60 to 20 x 30 and 50 x 30 to 33 x 20
    assert batch["pixel_values"].shape == (2, 3, 48, 32)
    sizes = {int(label["image_id"]): label["size"].tolist() for label in batch["labels"]}
    assert sizes == {1: [20, 30], 2: [33, 20]}
    for mask, pixels, label in zip(batch["pixel_mask"], batch["pixel_values"], batch["labels"], strict=True):
        height, width = label["size"].tolist()
        assert mask.sum() == mask[:height, :width].sum() == height * width
        assert pixels[:, mask == 0].abs().max() == 0
        assert pixels[:, mask == 1].abs().min() > 0
    label = batch["labels"][first]
    assert label["class_labels"].tolist() == [0, 1]
    expected = [[12 / 60, 8 / 40, 12 / 60, 8 / 40], [0.5, 0.5, 1, 1]]
    torch.testing.assert_close(label["boxes"], torch.tensor(expected))
    scored = batch["annotations"][first]
    assert scored["boxes"].tolist() == [[6, 4, 18, 12], [0, 0, 60, 40], [5, 5, 15, 15]]
    assert scored["iscrowd"].tolist() == [0, 0, 1]
    assert scored["area"].tolist() == [96, 1000, 100]


def test_a_flip_turns_boxes_with_the_image(coco: Path) -> None:
    plain, flipped = (module(coco, flip=flip, batch_size=1).train_dataloader().dataset for flip in (0.0, 1.0))
    for number in range(2):
        one, other = plain[0, number], flipped[0, number]
        torch.testing.assert_close(other["pixel_values"], one["pixel_values"].flip(-1))
        mirrored = one["labels"]["boxes"] * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0])
        torch.testing.assert_close(other["labels"]["boxes"], mirrored)
        assert torch.equal(flipped[number]["pixel_values"], one["pixel_values"])
        assert torch.equal(other["annotations"]["boxes"], one["annotations"]["boxes"])


def test_draws_depend_on_seed_epoch_and_image_alone(coco: Path) -> None:
    options = {"size": [12, 16, 20, 24], "flip": 0.5, "batch_size": 1}
    dataset = module(coco, **options).train_dataloader().dataset
    again = module(coco, **options).train_dataloader().dataset
    for place in [(3, 1), (0, 0), (3, 0)]:
        torch.testing.assert_close(dataset[place], again[place], rtol=0, atol=0)

    def drawn(dataset: Any) -> list[tuple[int, ...]]:
        return [tuple(dataset[epoch, 0]["labels"]["size"].tolist()) for epoch in range(12)]

    assert set(drawn(dataset)) == {(12, 18), (16, 24), (20, 30), (24, 36)}
    assert drawn(dataset) != drawn(module(coco, seed=1, **options).train_dataloader().dataset)
    # evaluation: the last size, no flip
    assert dataset[0]["labels"]["size"].tolist() == [24, 36]


def test_a_position_inside_an_epoch_continues(tmp_path: Path) -> None:
    write(tmp_path, "train", [(20, 20)] * 5, [{"bbox": [1, 2, 3, 4], "image_id": number} for number in range(1, 6)])
    options: dict[str, Any] = {"batch_size": 2, "size": [16, 20], "size_divisor": 4, "flip": 0.5}
    loader = module(tmp_path, **options).train_dataloader()
    batches, state = [], None
    for number, batch in enumerate(loader):
        batches.append(batch)
        if number == 0:
            state = loader.state_dict()
    resumed = module(tmp_path, **options).train_dataloader()
    resumed.load_state_dict(state)
    for batch, other in zip(batches[1:], resumed, strict=True):
        torch.testing.assert_close(batch["pixel_values"], other["pixel_values"], rtol=0, atol=0)
        torch.testing.assert_close(batch["labels"], other["labels"], rtol=0, atol=0)


def test_square_and_longest_side(coco: Path) -> None:
    square = module(coco, resize="square").train_dataloader().dataset[0]
    assert square["pixel_values"].shape == (3, 20, 20)
    torch.testing.assert_close(square["labels"]["boxes"][0], torch.tensor([0.2, 0.2, 0.2, 0.2]))
    limited = module(coco, max_size=24).train_dataloader().dataset[0]
    assert limited["labels"]["size"].tolist() == [16, 24]


def test_empty_images_on_request(tmp_path: Path) -> None:
    write(tmp_path, "train", [(20, 20), (20, 20)], [{"bbox": [1, 2, 3, 4]}])
    assert len(module(tmp_path).train_dataloader().dataset) == 1
    (batch,) = list(module(tmp_path, keep_empty=True).train_dataloader())
    assert sorted(len(label["boxes"]) for label in batch["labels"]) == [0, 1]
    assert {tuple(label["boxes"].shape[1:]) for label in batch["labels"]} == {(4,)}


def test_pycocotools_reads_the_same(coco: Path) -> None:
    reference = pytest.importorskip("pycocotools.coco").COCO(coco / "annotations" / "instances_train2017.json")
    data = module(coco)
    for number, image_id in enumerate(data._splits["train"].image_ids):
        records = reference.loadAnns(reference.getAnnIds([image_id]))
        theirs = [r["bbox"] for r in records if r["bbox"][2] > 0]
        corners = data._splits["train"].annotations[number].boxes
        ours = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        np.testing.assert_allclose(ours, np.array(theirs))


@pytest.mark.parametrize(
    ("boxes", "changes", "message"),
    [
        ([{"bbox": [1, 1, 2, 2], "category_id": 4}], {}, "category 4, which the file does not have; there are 3, 7"),
        ([{"bbox": [1, 1, 2, 2], "image_id": 9}], {}, "image 9, which the file does not have"),
        ([{"bbox": [50, 1, 12, 2]}], {}, "2.0 pixels outside of its image of 60 x 40"),
        ([{"bbox": [-3, 1, 12, 2]}], {}, "3.0 pixels outside"),
        ([{"bbox": [1, 1, float("nan"), 2]}], {}, "a box is four numbers"),
        ([{"bbox": [1, 1, 2]}], {}, "a box is four numbers"),
        ([], {}, "no image with a box to train on"),
        ([{"bbox": [1, 1, 2, 2], "iscrowd": 1}], {}, "no image with a box to train on"),
        ([], {"images": []}, "has no images"),
        ([], {"annotations": None}, "no list 'annotations'"),
        ([], {"categories": [CATEGORIES[0], CATEGORIES[0]]}, "two categories with one id"),
    ],
)
def test_bad_annotations(boxes: list[dict[str, Any]], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "train", [(40, 60)], boxes, **changes)
    with pytest.raises(ValueError, match=message):
        module(tmp_path)


def test_a_box_may_stick_out_by_rounding(tmp_path: Path) -> None:
    write(tmp_path, "train", [(40, 60)], [{"bbox": [50, 30, 10.6, 10.4]}])
    assert module(tmp_path)._splits["train"].annotations[0].boxes.tolist() == [[50, 30, 60, 40]]


def test_bad_files(coco: Path) -> None:
    (coco / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no instances_train\*\.json"):
        module(coco / "empty")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        module(coco / "nowhere")
    Image.new("RGB", (9, 9)).save(coco / "train2017" / "1.png")
    with pytest.raises(ValueError, match="has 9 x 9 pixels, its annotations say 60 x 40"):
        module(coco).train_dataloader().dataset[0]
    (coco / "train2017" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"names the image 1\.png"):
        module(coco)
    write(coco, "val", [(4, 4)], [], categories=CATEGORIES[:1])
    (coco / "annotations" / "instances_train2017.json").rename(coco / "annotations" / "instances_train.json")
    with pytest.raises(FileNotFoundError, match="has no image folder"):
        module(coco)


def test_splits_have_the_same_categories(coco: Path) -> None:
    write(coco, "val", [(4, 4)], [], categories=CATEGORIES[:1])
    with pytest.raises(ValueError, match="val has other categories than train"):
        module(coco)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "at least 1"),
        ({"size": []}, "at least 1"),
        ({"max_size": 10}, "max_size 10 is below the shortest side 20"),
        ({"resize": "wide"}, "'wide' is not one of shortest, square"),
        ({"flip": 1.5}, "flip 1.5"),
        ({"seed": -1}, "seed -1"),
        ({"mean": (0.5,)}, "1 values for 3 channels"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, coco: Path) -> None:
    with pytest.raises(ValueError, match=message):
        module(coco, **options)
