"""Evaluation: it runs a policy on a suite, keeps records that survive a kill, and reports and compares the results."""
