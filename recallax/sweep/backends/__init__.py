"""Backends of sweeps: processes of this machine, tasks of a Ray cluster, and SLURM jobs."""
