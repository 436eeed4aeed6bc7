"""Induction heads: scores of attention patterns, captured and then summarised for each head."""
