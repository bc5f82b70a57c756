"""``fastdpo eval``: what models say of held-out pairs, how sure that is, and what a judge says of their completions."""
