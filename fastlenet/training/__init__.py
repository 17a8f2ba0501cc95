"""Training LeNet: the loop, its data and checkpoints, several processes, and the demo. `fastlenet.cli` runs it."""
