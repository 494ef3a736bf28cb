"""What tools/benchmark.py measures with: the peers to compare with, drawn files of COCO's size, counts, costs by size."""
