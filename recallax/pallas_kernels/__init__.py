"""Ops: one package each, with validation and dispatch, a readable definition, and one file per implementation.

Import an op from its package, whose `__all__` lists the public names:

    from recallax.pallas_kernels.linear_attention import linear_attention

Each package has `reference.py` (the definition), `xla.py`, `arg_specs.py` (inputs of the named test cases) and, where a
kernel exists, `mosaic_gpu/` and `mosaic_tpu.py`. Code that several ops share is in this package and in its `mosaic_gpu`
and `mosaic_tpu` packages; an op imports public functions of other ops only.
"""
