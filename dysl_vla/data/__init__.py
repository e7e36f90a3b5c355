"""Demonstrations: collected from experts and policies in simulation, kept as LeRobotDataset v3, read for training."""
