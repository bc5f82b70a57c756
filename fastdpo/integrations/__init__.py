"""Stand-ins with other libraries' contracts. Every module here imports its library when it is used, not before."""
