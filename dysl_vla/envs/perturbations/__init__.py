"""Perturbed worlds: what departs from training, at five levels, the same for every method; see `base`."""

from dysl_vla.envs.perturbations import scene, signals  # noqa: F401 # they register theirs
from dysl_vla.envs.perturbations.base import LEVELS, SWEEP, Perturbation, Perturbing, describe, perturbations
from dysl_vla.envs.perturbations.environment import PerturbedEnv

__all__ = ["LEVELS", "SWEEP", "Perturbation", "PerturbedEnv", "Perturbing", "describe", "perturbations"]
