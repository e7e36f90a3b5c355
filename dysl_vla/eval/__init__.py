"""Evaluation: run a policy on a suite, keep records that survive a kill, report success and latency, compare runs."""
