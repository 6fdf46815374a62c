"""Sweeps: the runner, its worker processes, and backends for one machine, Ray and SLURM."""
