"""Optimizers with one face: `ask`, `tell`, `state`, `load`. Nothing is imported here: each library when it is used."""
