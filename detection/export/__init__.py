"""From a checkpoint to the files that phones, boards, recorders and servers run, each verified by running it."""
