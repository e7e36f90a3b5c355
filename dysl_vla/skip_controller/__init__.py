"""Dynamic-static layer skipping (DySL-VLA, arXiv 2602.22896), alone: for any decoder that holds its layers in a list.

Knows no environment, no policy and no file. `guidance` is NumPy alone, so that training, evaluation and a robot without
torch run the same one.
"""
