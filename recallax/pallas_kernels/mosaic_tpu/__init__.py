"""Kernel code for TPUs (Pallas Mosaic TPU) that several ops share."""
