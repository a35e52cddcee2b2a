"""Mixing laws, one file each: the losses that a mixture of data gives, learnt from a table of mixtures and losses."""
