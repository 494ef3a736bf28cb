"""What stands on which device. Run: pytest tests/test_structures.py"""

import torch

from detection.structures import Batch


def test_only_what_a_step_takes_goes_to_the_device() -> None:
    batch = Batch(
        images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        boxes=torch.zeros(2, 1, 4),
        labels=torch.zeros(2, 1, dtype=torch.int64),
        valid=torch.ones(2, 1, dtype=torch.bool),
        image_ids=torch.tensor([7, 9]),
        original_sizes=torch.tensor([[4, 6], [8, 8]]),
        placements=torch.ones(2, 4),
        skipped=["a.jpg: broken"],
    )
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert {tensor.device.type for tensor in moved.inputs()} == {"meta"}
    assert moved.image_ids.tolist() == [7, 9]
    assert moved.original_sizes.tolist() == [[4, 6], [8, 8]]
    assert moved.placements.device.type == "cpu"
    assert moved.skipped == ["a.jpg: broken"]
    assert batch.images.device.type == "cpu"
