"""The demo on real texts, and induction heads of a model trained for it."""
