"""What ``litedet benchmark`` is made of: stages, timing, peers, drawn inputs of COCO's size, counts, costs by size."""
