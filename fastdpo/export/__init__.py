"""What a run leaves, handed on: adapters merged into their bases, and what other programs take of them."""
