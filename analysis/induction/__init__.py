"""Induction heads: what is kept of attention patterns, and what a store then says of each head."""
